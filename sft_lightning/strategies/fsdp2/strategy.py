"""Fully sharded data parallelism (FSDP2) on Lightning's `ModelParallelStrategy`.

Only the strategy knows about shards: the module loads its model as in a single process, checkpoints have the form of a
single process's (so a run continues on any number of processes, sharded or not), and exports find full weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from sft_lightning.compat.lightning.loops import inner_optimizer, set_device
from sft_lightning.compat.lightning.strategies import MeshStrategy
from sft_lightning.errors import UserError
from sft_lightning.models.inspection import base_model
from sft_lightning.strategies.fsdp2.groups import shard_model
from sft_lightning.strategies.full_tensors import (
    gather_optimizer_state,
    gather_parameters,
    shard_like,
    shard_optimizer_state,
)
from sft_lightning.strategies.sharded_strategy import TIMEOUT, ShardedStrategy, one_process_at_a_time
from sft_lightning.strategies.sharding import ShardingSpec, fsdp2_sharding


class FSDP2(ShardedStrategy, MeshStrategy):
    """Shard weights, gradients and optimizer state over all processes, layer by layer (`--trainer.strategy fsdp2`).

    Zhao et al., 2023, arXiv:2304.11277, in torch's per-parameter form (`fully_shard`). The losses are those of a single
    process. Trains full models, adapters over a base of another type, and adapters over 4-bit bases. Under `bf16-mixed`
    weights are gathered, and gradients reduced, in bfloat16; shards and optimizer state stay in float32.

    Args:
        offload: Keep shards and optimizer state in CPU memory (`fsdp2_offload`).
        replicas: Copies of the model, each sharded over its part of the processes (hybrid sharding). With one replica
            per node, weights are gathered within a node.
        process_group_backend: Default: NCCL on GPUs (with `offload`, gloo too), gloo on CPUs.

    Raises:
        UserError: If `replicas` is below 1.
    """

    strategy_name = "fsdp2"

    def __init__(self, offload: bool = False, replicas: int = 1, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=TIMEOUT
        )
        if replicas < 1:
            raise UserError(f"trainer.strategy.replicas: must be at least 1 (got {replicas})")
        self.offload = offload
        self.replicas = replicas
        self._sharding_mesh: DeviceMesh | None = None

    @property
    def sharding(self) -> ShardingSpec:
        """What the strategy shards and offloads."""
        return fsdp2_sharding(replicas=self.replicas, offload=self.offload)

    # --- setting up ------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Make the device mesh, (processes,) or (replicas, processes / replicas)."""
        world_size = self.num_nodes * self.num_processes
        self.use_one_mesh_axis(world_size)
        if self.process_group_backend is None and self.offload and self.root_device.type == "cuda":
            self.use_backend("cpu:gloo,cuda:nccl")  # offloaded gradients are reduced to one norm on the CPU
        super().setup_environment()
        if self.replicas == 1:
            self._sharding_mesh = self.device_mesh["data_parallel"]
        else:
            shape = (self.replicas, world_size // self.replicas)
            self._sharding_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let the module load the full model, and shard it."""
        if self._sharding_mesh is None:
            raise RuntimeError("the trainer must call setup_environment before a model is loaded")
        with one_process_at_a_time(wanted=self.world_size > 1 and self._module.copies_weights):
            yield
            model = self._language_model
            self.precision_plugin.convert_module(model)  # types are changed before sharding
            shard_model(
                base_model(model),
                self._sharding_mesh,
                self.root_device,
                offload=self.offload,
                gather_dtype=torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None,
            )

    def model_to_device(self) -> None:
        """Move what sharding has left on the CPU; with `offload`, only buffers."""
        if not self.offload:
            super().model_to_device()
            return
        for buffer in self._language_model.buffers():
            buffer.data = buffer.data.to(self.root_device)
        set_device(self._module, self.root_device)

    @property
    def _language_model(self) -> Any:
        return self._module.language_model

    # --- checkpoints, in the form of a single process's ------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights that train to rank 0; other ranks get an empty dict."""
        return dict(gather_parameters(self._module, keep=self.is_global_zero, trainable_only=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the optimizer's state to rank 0; other ranks get an empty dict."""
        return gather_optimizer_state(inner_optimizer(optimizer), keep=self.is_global_zero)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load full weights; where an earlier stage has sharded the model, each process loads its shard.

        Args:
            checkpoint: A checkpoint whose `state_dict` has full tensors.
            strict: Passed on to the module.
        """
        parameters = dict(self._module.named_parameters())
        state = checkpoint["state_dict"]
        state = {name: shard_like(parameters.get(name, tensor), tensor) for name, tensor in state.items()}
        self._module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shard of the optimizer's state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
