"""DeepSpeed ZeRO on Lightning's strategy, on GPUs and CPUs; its configuration agrees with the YAML."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from sft_lightning.compat.bitsandbytes import keep_quantization_states, store_4bit_as_bytes
from sft_lightning.compat.deepspeed import flat_partitions, skip_serving_operator
from sft_lightning.compat.lightning.loops import inner_optimizer
from sft_lightning.compat.lightning.strategies import HookedDeepSpeedStrategy
from sft_lightning.errors import UserError
from sft_lightning.strategies.full_tensors import gather_optimizer_state
from sft_lightning.strategies.names import FSDP2
from sft_lightning.strategies.refusals import RunFacts
from sft_lightning.strategies.sharded_strategy import TIMEOUT, ShardedStrategy, one_process_at_a_time
from sft_lightning.strategies.sharding import ShardingSpec
from sft_lightning.strategies.zero.checks import (
    check_build_locks,
    check_config,
    check_nvme,
    check_nvme_weight_type,
)
from sft_lightning.strategies.zero.config import YamlSettings, resolve, user_config
from sft_lightning.strategies.zero.engine import ZeroPrecision, cpu_adam
from sft_lightning.strategies.zero.options import OffloadDevice, ZeroOptions, sharding_of_config
from sft_lightning.strategies.zero.partition import (
    gathered_in_forward,
    keep_weights_on_rank_0,
    load_part,
    partition_model,
    register_external_weights,
)
from sft_lightning.strategies.zero.state import gather_state, gather_weights, load_state, load_weights

_OPTIMIZER_BLOCKS = ("optimizer", "scheduler")


class DeepSpeedZeRO(ShardedStrategy, HookedDeepSpeedStrategy):
    """ZeRO stages 0 to 3 (Rajbhandari et al., 2019, arXiv:1910.02054), set by these keys or a DeepSpeed JSON.

    The module loads its model as in a single process; stage 3 partitions the loaded model, 4-bit weights included.
    Checkpoints have the form of a single process's: a run continues on any number of processes, under any strategy.

    Args:
        stage: What is sharded: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing.
        offload_optimizer: Offload the optimizer's state and its step (DeepSpeed's CPU Adam) to `cpu` or, under stage 3,
            to `nvme`.
        offload_parameters: Offload the weights to `cpu` or `nvme`; stage 3 only.
        nvme_path: Folder on a local disk for what is offloaded to NVMe.
        quantized_weights: ZeRO++: gather weights as int8; stage 3 on GPUs only.
        quantized_gradients: ZeRO++: send gradients as int4; stage 3 on GPUs only.
        hpz_partition_size: ZeRO++: processes (of a node) that share a second copy of the weights; stage 3 only.
        config: A DeepSpeed JSON, or its content, instead of the keys above.

    Raises:
        UserError: If DeepSpeed is not installed, the keys contradict each other, or they are combined with `config`.
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
                "trainer.strategy: DeepSpeed is not installed; run pip install 'sft-lightning[deepspeed]', or use "
                f"trainer.strategy: {FSDP2}"
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
        self._user_config = user_config(options, config)
        self._source = config if isinstance(config, str) else "trainer.strategy"
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        given = {key: value for key, value in copy.deepcopy(self._user_config).items() if key not in _OPTIMIZER_BLOCKS}
        super().__init__(config=given, exclude_frozen_parameters=True, timeout=TIMEOUT)
        self._groups: list[list[nn.Parameter]] = []

    @property
    def sharding(self) -> ShardingSpec:
        """What the strategy shards and offloads."""
        return sharding_of_config(self._user_config)

    def check(self, run: RunFacts) -> None:
        """Check that the strategy can train a model, and its DeepSpeed configuration.

        Raises:
            UserError: If it cannot.
        """
        super().check(run)
        check_config(self._user_config, run, source=self._source)
        check_nvme_weight_type(self._user_config, run, source=self._source)

    def check_yaml(self, yaml: YamlSettings) -> None:
        """Check that the DeepSpeed configuration agrees with the YAML.

        Raises:
            UserError: If it does not; the message names all contradictions.
        """
        resolve(self._user_config, yaml, source=self._source)

    @property
    def manages_gradients(self) -> bool:
        """Whether DeepSpeed keeps float32 master weights, scales the loss, and clips gradients: it does."""
        return True

    @property
    def grad_norm(self) -> float | torch.Tensor | None:
        """L2 norm of the gradients of the last optimizer step, before clipping, over all processes; a scalar."""
        norm: float | torch.Tensor | None = self.deepspeed_engine.get_global_grad_norm()
        return norm

    # --- setting up ------------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Refuse, before any weight is read, what cannot be trained or offloaded, and locks that would never open."""
        super().connect(model)
        check_build_locks()
        check_nvme(self._user_config, self._source)

    def setup_environment(self) -> None:
        """As Lightning's, on the CPU too, with our precision."""
        skip_serving_operator()
        super().setup_environment()
        precision: Any = self.precision_plugin.precision
        self.precision_plugin = ZeroPrecision(precision)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let the module load the full model; under ZeRO-3, partition it before it is moved to a device."""
        self.prepare_config()
        module, config = self._module, self.config or {}
        with one_process_at_a_time(wanted=self.shards_weights and self.world_size > 1 and module.copies_weights):
            yield
            store_4bit_as_bytes(module)
            self.precision_plugin.convert_module(module)  # types are changed before partitioning
            if self.shards_weights:
                keep_weights_on_rank_0(module, config)
        if self.shards_weights:
            partition_model(module, config, self.root_device)
            register_external_weights(module)
            keep_quantization_states(module, self.root_device)

    def fill_config(self) -> None:
        """Fill in the configuration from the YAML; its optimizer blocks are checked once the optimizer is made."""
        self.config = resolve(self._user_config, self._yaml_settings, source=self._source)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, or DeepSpeed's CPU Adam in its place if it is offloaded.

        Raises:
            UserError: If it cannot step on shards, cannot be offloaded, or is not the one in the JSON.
        """
        yaml = self._yaml_settings.with_optimizer(optimizer)
        if "scheduler" in self._user_config:
            num_steps = self._module.data.num_optimizer_steps
            warmup_steps = self._module.spec.lr_scheduler.num_warmup_steps(num_steps)
            yaml = replace(yaml, num_steps=num_steps, warmup_steps=warmup_steps)
        self.check_yaml(yaml)
        optimizer = super().prepare_optimizer(optimizer)
        return cpu_adam(optimizer) if self.sharding.offloads_optimizer else optimizer

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Make the optimizer; forward passes meanwhile gather ZeRO-3's partitions."""
        with gathered_in_forward(self._module):  # the module verifies on its model what can be packed
            optimizer, schedule = super().make_optimizer()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]  # ZeRO replaces them
        return optimizer, schedule

    @property
    def _yaml_settings(self) -> YamlSettings:
        module: Any = self.lightning_module
        trainer = module.trainer
        return YamlSettings(
            schedule=module.spec.lr_scheduler.name,
            min_lr_ratio=module.spec.lr_scheduler.min_lr_ratio,
            batch_size=trainer.datamodule.spec.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            gradient_clip_val=trainer.gradient_clip_val or 0.0,
            precision=str(self.precision_plugin.precision),
        )

    # --- checkpoints, in the form of a single process's ------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights that train, in float32, to rank 0; other ranks get an empty dict."""
        if not flat_partitions(self._zero):
            return dict(self._module.state_dict())
        names = {parameter: name for name, parameter in self._trained.items()}
        return gather_weights(self._zero, names, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state to rank 0; other ranks get an empty dict."""
        if not flat_partitions(self._zero):
            return gather_optimizer_state(self._zero, keep=self.is_global_zero)
        return gather_state(self._zero, self._groups, keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load full weights, before DeepSpeed's optimizer copies them.

        Args:
            checkpoint: A checkpoint whose `state_dict` has full tensors.
            strict: Passed on to the module.
        """
        parameters = dict(self._module.named_parameters())
        state = {name: load_part(parameters.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's partition of the float32 weights and of the optimizer's state."""
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
