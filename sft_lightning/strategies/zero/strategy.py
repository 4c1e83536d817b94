"""DeepSpeed ZeRO on Lightning's strategy: one configuration that agrees with the YAML; runs on the CPU too."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from sft_lightning.compat.bitsandbytes import keep_quantization_states, store_4bit_as_bytes
from sft_lightning.compat.deepspeed import flat_partitions
from sft_lightning.compat.lightning.loops import inner_optimizer
from sft_lightning.compat.lightning.strategies import HookedDeepSpeedStrategy
from sft_lightning.errors import UserError
from sft_lightning.strategies.full_tensors import gather_optimizer_state
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.sharded_strategy import TIMEOUT, ShardedStrategy, one_process_at_a_time
from sft_lightning.strategies.sharding import ShardingSpec
from sft_lightning.strategies.zero.checks import check_nvme, check_one_type, check_sense
from sft_lightning.strategies.zero.config import FromYaml, asked_config, resolve
from sft_lightning.strategies.zero.engine import ZeroPrecision, cpu_adam
from sft_lightning.strategies.zero.options import (
    OffloadDevice,
    ZeroOptions,
    sharding_of_config,
)
from sft_lightning.strategies.zero.partition import (
    gathered_in_forward,
    keep_what_is_sent,
    load_part,
    name_external_weights,
    partition_model,
)
from sft_lightning.strategies.zero.state import gather_state, gather_weights, load_state, load_weights

_OF_OPTIMIZER = ("optimizer", "scheduler")


class DeepSpeedZeRO(ShardedStrategy, HookedDeepSpeedStrategy):
    """ZeRO stages 0 to 3 (Rajbhandari et al., 2019, arXiv:1910.02054), by our keys or a DeepSpeed JSON.

    The module loads its model as always; stage 3 partitions what is loaded, 4-bit weights too. Checkpoints are those of
    a single process, and continue on any number of processes, under any strategy.

    Args:
        stage: See `ZeroOptions`, as all that follow.
        offload_optimizer: Where the optimizer's state and its step go; the step is DeepSpeed's Adam for the host. To
            NVMe: stage 3.
        offload_parameters: Where weights wait; stage 3.
        nvme_path: Folder on a local disk.
        quantized_weights: ZeRO++, stage 3.
        quantized_gradients: ZeRO++, stage 3.
        hpz_partition_size: ZeRO++, stage 3.
        config: A DeepSpeed JSON, or its content; instead of the keys above.

    Raises:
        UserError: If DeepSpeed is not installed, keys contradict each other, or stand beside a JSON.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: OffloadDevice | None = None,
        offload_parameters: OffloadDevice | None = None,
        nvme_path: str | None = None,
        quantized_weights: bool = False,
        quantized_gradients: bool = False,
        hpz_partition_size: int = 1,
        config: str | dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "trainer.strategy: DeepSpeed is not installed; pip install 'sft-lightning[deepspeed]', or use fsdp2"
            )
        options = ZeroOptions(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            nvme_path=nvme_path,
            quantized_weights=quantized_weights,
            quantized_gradients=quantized_gradients,
            hpz_partition_size=hpz_partition_size,
        )
        self._asked = asked_config(options, config)
        self._source = config if isinstance(config, str) else "trainer.strategy"
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        given = {key: value for key, value in copy.deepcopy(self._asked).items() if key not in _OF_OPTIMIZER}
        super().__init__(config=given, exclude_frozen_parameters=True, timeout=TIMEOUT)
        self._groups: list[list[nn.Parameter]] = []

    @property
    def sharding(self) -> ShardingSpec:
        """What the strategy shards and offloads."""
        return sharding_of_config(self._asked)

    def check(self, run: RunFacts) -> None:
        """Check the configuration, too.

        Raises:
            UserError: If the strategy cannot train the model.
        """
        super().check(run)
        check_sense(self._asked, run, source=self._source)
        check_one_type(self._asked, run, source=self._source)

    @property
    def manages_gradients(self) -> bool:
        """Whether DeepSpeed keeps float32 master weights, scales the loss, and clips gradients: it does."""
        return True

    @property
    def grad_norm(self) -> float | torch.Tensor | None:
        """Norm of the gradients of the last optimizer step, before clipping, over all processes."""
        norm: float | torch.Tensor | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    # --- setting up ------------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Refuse, before any weight is read, what cannot be sharded or offloaded."""
        check_nvme(self._asked, self._source)
        super().connect(model)

    def setup_environment(self) -> None:
        """As Lightning's, on the CPU too, with our precision."""
        super().setup_environment()
        precision: Any = self.precision_plugin.precision
        self.precision_plugin = ZeroPrecision(precision)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let the module load its model whole; ZeRO-3 partitions it then, before any device would hold it."""
        self.prepare_config()
        module, config = self._module, self.config or {}
        with one_process_at_a_time(wanted=self.shards_weights and self.world_size > 1 and module.copies_weights):
            yield
            store_4bit_as_bytes(module)
            self.precision_plugin.convert_module(module)  # a type is changed before it is partitioned
            if self.shards_weights:
                keep_what_is_sent(module, config)
        if self.shards_weights:
            partition_model(module, config, self.root_device)
            name_external_weights(module)
            keep_quantization_states(module, self.root_device)

    def fill_config(self) -> None:
        """Let the YAML fill the configuration, or refuse it; what is of the optimizer is checked once that is made."""
        config = {key: value for key, value in self._asked.items() if key not in _OF_OPTIMIZER}
        self.config = resolve(config, self._from_yaml(None), source=self._source)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, or DeepSpeed's CPU Adam in its place if it is offloaded.

        Raises:
            UserError: If it cannot step on shards or be offloaded, or differs from the one in the JSON.
        """
        resolve(self._asked, self._from_yaml(optimizer), source=self._source)
        optimizer = super().prepare_optimizer(optimizer)
        return cpu_adam(optimizer) if self.sharding.offloads_optimizer else optimizer

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Make the optimizer while ZeRO-3's partitions are gathered where a forward pass needs them."""
        with gathered_in_forward(self._module):  # the module asks its model what can be packed
            optimizer, schedule = super().make_optimizer()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]  # ZeRO puts its partitions there
        return optimizer, schedule

    def _from_yaml(self, optimizer: Optimizer | None) -> FromYaml:
        module: Any = self.lightning_module
        trainer = module.trainer
        defaults = optimizer.defaults if optimizer is not None else {}
        return FromYaml(
            optimizer=type(optimizer).__name__ if optimizer is not None else "AdamW",
            lr=defaults.get("lr", 0.0),
            weight_decay=defaults.get("weight_decay", 0.0),
            schedule=module.spec.lr_scheduler.name,
            batch_size=trainer.datamodule.spec.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            gradient_clip_val=trainer.gradient_clip_val or 0.0,
            precision=str(self.precision_plugin.precision),
        )

    # --- checkpoints: those of a single process --------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather what trains, in float32; empty but on rank 0."""
        if not flat_partitions(self._zero):
            return dict(self._module.state_dict())
        names = {parameter: name for name, parameter in self._trained.items()}
        return gather_weights(self._zero, names, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state; empty but on rank 0."""
        if not flat_partitions(self._zero):
            return gather_optimizer_state(self._zero, keep=self.is_global_zero)
        return gather_state(self._zero, self._groups, keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, before DeepSpeed's optimizer has them."""
        parameters = dict(self._module.named_parameters())
        state = {name: load_part(parameters.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give DeepSpeed its part of the float32 weights and of the optimizer's state."""
        [state] = checkpoint["optimizer_states"]
        if not flat_partitions(self._zero):
            self._zero.load_state_dict(state)
            return
        trained = self._trained
        load_weights(self._zero, {trained[name]: value for name, value in checkpoint["state_dict"].items()})
        load_state(self._zero, self._groups, state)

    @property
    def _zero(self) -> Any:
        [optimizer] = self.optimizers
        return inner_optimizer(optimizer)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._module.named_parameters() if parameter.requires_grad}
