"""Lightning's sharded strategies, with hooks in the places where they decide by private methods."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from sft_lightning.compat.names import uses

_DEEPSPEED = "lightning.pytorch.strategies.deepspeed:DeepSpeedStrategy"


class MeshStrategy(ModelParallelStrategy):
    """`ModelParallelStrategy` whose mesh and process groups are chosen once the processes are known."""

    @uses(
        "lightning.pytorch.strategies.model_parallel:ModelParallelStrategy.setup_environment",
        attributes=("_data_parallel_size", "_tensor_parallel_size"),
        feature="trainer.strategy: fsdp2",
        since="2.3",
        replacement="the constructor's `data_parallel_size`, required before the number of processes is known",
    )
    def use_one_mesh_axis(self, num_processes: int) -> None:
        """Use a device mesh with one axis; Lightning's default is tensor parallelism within a node."""
        self._data_parallel_size, self._tensor_parallel_size = num_processes, 1

    @uses(
        "lightning.pytorch.strategies.model_parallel:ModelParallelStrategy.process_group_backend",
        attributes=("_process_group_backend",),
        feature="trainer.strategy: fsdp2_offload",
        since="2.3",
        replacement="the constructor's `process_group_backend`, required before the device is known",
    )
    def use_backend(self, backend: str) -> None:
        """Set the backend of process groups, such as `cpu:gloo,cuda:nccl`."""
        self._process_group_backend = backend


class HookedDeepSpeedStrategy(DeepSpeedStrategy):
    """`DeepSpeedStrategy` that runs on a CPU too, and whose subclass makes the configuration and the optimizer.

    Args:
        options: What `DeepSpeedStrategy` takes.
    """

    @uses(
        f"{_DEEPSPEED}._format_config",
        f"{_DEEPSPEED}._init_optimizers",
        f"{_DEEPSPEED}._init_config_if_needed",
        f"{_DEEPSPEED}._init_deepspeed_distributed",
        feature="trainer.strategy: deepspeed_stage_*",
        since="2.2",
        replacement="trainer.strategy: fsdp2",
    )
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def fill_config(self) -> None:
        """Set `self.config` to what DeepSpeed gets; called once, when module and trainer are known."""
        super()._format_config()

    def _format_config(self) -> None:
        self.fill_config()

    def prepare_config(self) -> None:
        """Call `fill_config`, if that has not been done."""
        self._init_config_if_needed()

    def make_optimizer(self) -> tuple[Optimizer, Any]:
        """Return the module's optimizer and its schedule, before DeepSpeed wraps them."""
        made: tuple[Optimizer, Any] = super()._init_optimizers()
        return made

    def _init_optimizers(self) -> tuple[Optimizer, Any]:
        return self.make_optimizer()

    def setup_environment(self) -> None:
        """Set the processes up as Lightning does, on a CPU too."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Start the process group as Lightning does; on a CPU by gloo, and without its check of device indices."""
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
