"""DeepSpeed ZeRO on Lightning's strategy: one configuration that agrees with the YAML; runs on the CPU too."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from sft_lightning.errors import UserError
from sft_lightning.strategies.deepspeed_config import (
    FromYaml,
    OffloadDevice,
    ZeroOptions,
    from_options,
    offloads_optimizer,
    read_config,
    resolve,
    stage_of,
)
from sft_lightning.strategies.refusals import Sharding, check_module

_OF_OPTIMIZER = ("optimizer", "scheduler")


class DeepSpeedZeRO(DeepSpeedStrategy):
    """ZeRO stages 0 to 2 (Rajbhandari et al., 2019, arXiv:1910.02054), by our keys or a DeepSpeed JSON.

    Checkpoints are DeepSpeed's folders, and continue on the same number of processes. Stage 3 is refused when the
    module is connected: fsdp2 shards as much.

    Args:
        stage: See `ZeroOptions`, as all that follow.
        offload_optimizer: Where the optimizer's state and its step go; the step is DeepSpeed's Adam for the host.
        offload_parameters: Where weights wait; stage 3.
        nvme_path: Folder on a local disk.
        quantized_weights: ZeRO++, stage 3.
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
            hpz_partition_size=hpz_partition_size,
        )
        self._asked = _asked(options, config)
        self._source = config if isinstance(config, str) else "trainer.strategy.config"
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        given = {key: value for key, value in copy.deepcopy(self._asked).items() if key not in _OF_OPTIMIZER}
        super().__init__(config=given, exclude_frozen_parameters=True)

    @property
    def sharding(self) -> Sharding:
        """What it does with weights."""
        zero = self._asked.get("zero_optimization", {})
        offload = (zero.get("offload_param") or {}).get("device", "none") != "none"
        stage = stage_of(self._asked)
        return Sharding(f"deepspeed_stage_{stage}{'_offload' if offload else ''}", stage, offload=offload)

    # --- setting up ------------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Refuse, before any weight is read, what cannot be sharded."""
        check_module(model, self.sharding)
        super().connect(model)

    def setup_environment(self) -> None:
        """As Lightning's, without its refusal of the CPU."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning's, without its check of device indices, which the CPU has not."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = "gloo"
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The device of this process; DeepSpeed reads its index, on the CPU too."""
        device: torch.device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def _format_config(self) -> None:
        """Let the YAML fill the configuration, or refuse it; what is of the optimizer is checked once that is made."""
        config = {key: value for key, value in self._asked.items() if key not in _OF_OPTIMIZER}
        self.config = resolve(config, self._from_yaml(None), source=self._source)
        if offloads_optimizer(self.config):
            module: Any = self.lightning_module
            module.optimizer = _OnHost(module.optimizer)

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        optimizer, schedule = super()._init_optimizers()
        resolve(self._asked, self._from_yaml(optimizer), source=self._source)
        return optimizer, schedule

    def _from_yaml(self, optimizer: Optimizer | None) -> FromYaml:
        module: Any = self.lightning_module
        trainer = module.trainer
        defaults = optimizer.defaults if optimizer is not None else {}
        return FromYaml(
            optimizer=type(optimizer).__name__ if optimizer is not None else "AdamW",
            lr=defaults.get("lr", 0.0),
            weight_decay=defaults.get("weight_decay", 0.0),
            schedule=module.lr_scheduler.name,
            batch_size=trainer.datamodule.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            gradient_clip_val=trainer.gradient_clip_val or 0.0,
            precision=str(self.precision_plugin.precision),
        )


def _asked(options: ZeroOptions, config: str | dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return from_options(options)
    beside = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    if beside:
        raise UserError(f"trainer.strategy.config: says it all, so there is no place for {', '.join(beside)}")
    return read_config(config) if isinstance(config, str) else config


class _OnHost:
    """Makes DeepSpeed's Adam for the host in the place of a torch Adam with the same groups and values.

    Args:
        make: `model.optimizer`.
    """

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, groups: Any) -> Optimizer:
        made: Optimizer = self._make(groups)
        name = type(made).__name__
        if name not in ("Adam", "AdamW"):
            raise UserError(f"model.optimizer: {name} has no version for the host; take AdamW, or do not offload it")
        host_adam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam

        keys: Mapping[str, Any] = {key: made.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
        rank_zero_info(f"optimizer: DeepSpeedCPUAdam takes {name}'s steps on the host, with its values")
        on_host: Optimizer = host_adam(made.param_groups, adamw_mode=name == "AdamW", **keys)
        return on_host
