"""ShardingSpec: what a strategy shards over processes and what it offloads; for strategies, refusals and `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sft_lightning.strategies.names import DDP, FSDP2, FSDP2_OFFLOAD, deepspeed_name


class Shards(NamedTuple):
    """How many processes each part is divided over; 1: every process holds all of it."""

    weights: int
    """Number of shards of the weights."""

    gradients: int
    """Number of shards of the gradients."""

    optimizer: int
    """Number of shards of the optimizer state."""


@dataclass(frozen=True, kw_only=True)
class ShardingSpec:
    """What a strategy shards and offloads."""

    name: str
    """Short name for `trainer.strategy`, or the nearest one for a strategy with other options; for messages."""

    kind: Literal["ddp", "fsdp2", "zero"]
    """What shards the model: nothing (DDP, a single process), torch's FSDP2, or DeepSpeed's ZeRO."""

    stage: int = 0
    """What is sharded, as ZeRO counts (Rajbhandari et al., 2019, arXiv:1910.02054): 0 nothing, 1 the optimizer state,
    2 gradients too, 3 weights too. FSDP2 is 3."""

    replicas: int = 1
    """Copies of the model, each sharded over its part of the processes."""

    offloads_weights: bool = False
    """Weights wait on the CPU, or on NVMe."""

    offloads_optimizer: bool = False
    """The optimizer state and its step, and so reduced gradients, are on the CPU or on NVMe."""

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the whole model."""
        return self.stage == 3

    def shards(self, num_processes: int) -> Shards:
        """Return the number of shards of each part.

        Args:
            num_processes: All processes, those of all replicas together.
        """
        num_shards = max(1, num_processes // self.replicas)
        weights, gradients, optimizer = (num_shards if self.stage >= stage else 1 for stage in (3, 2, 1))
        return Shards(weights, gradients, optimizer)


def fsdp2_sharding(*, replicas: int = 1, offload: bool = False) -> ShardingSpec:
    """Return what FSDP2 shards: everything (Zhao et al., 2023, arXiv:2304.11277).

    Args:
        replicas: Copies of the model (hybrid sharding).
        offload: Whether shards and optimizer state are offloaded to the CPU.
    """
    name = FSDP2_OFFLOAD if offload else FSDP2
    return ShardingSpec(
        name=name, kind="fsdp2", stage=3, replicas=replicas, offloads_weights=offload, offloads_optimizer=offload
    )


def zero_sharding(stage: int, *, offload_optimizer: bool = False, offload_weights: bool = False) -> ShardingSpec:
    """Return what a ZeRO stage shards.

    Args:
        stage: ZeRO stage, 0 to 3.
        offload_optimizer: Whether the optimizer is offloaded.
        offload_weights: Whether weights are offloaded; stage 3 only.
    """
    return ShardingSpec(
        name=deepspeed_name(stage, offload=offload_weights if stage == 3 else offload_optimizer),
        kind="zero",
        stage=stage,
        offloads_weights=offload_weights,
        offloads_optimizer=offload_optimizer,
    )


REPLICATED = ShardingSpec(name=DDP, kind="ddp")
"""DDP and single processes: nothing is sharded."""

SHORT_NAMES: Mapping[str, ShardingSpec] = {
    each.name: each
    for each in (
        REPLICATED,
        fsdp2_sharding(),
        fsdp2_sharding(offload=True),
        *(
            zero_sharding(stage, offload_optimizer=offload, offload_weights=offload and stage == 3)
            for stage in (1, 2, 3)
            for offload in (False, True)
        ),
    )
}
"""Every short name of `trainer.strategy` → what it shards."""
