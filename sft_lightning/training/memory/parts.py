"""Memory of one GPU by part, and the settings that decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sft_lightning.models.checkpointing import Recomputation
from sft_lightning.strategies.sharding import ShardingSpec, Shards

GIB = 2**30


class StepBytes(NamedTuple):
    """Bytes of a micro-batch, without weights; see `SimulatedStep`."""

    kept: float
    """Activations that the forward pass keeps for the backward pass."""

    peak: float
    """Largest number of bytes at once."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of a configuration that decide its memory."""

    batch_size: int
    """Rows per micro-batch and GPU."""

    max_length: int
    """Tokens per row."""

    recomputation: Recomputation
    """What is recomputed in the backward pass."""

    bits: int | None
    """Bits of the base's quantized weights: 4 or 8; `None` if they are not quantized."""

    sharding: ShardingSpec
    """What the strategy shards and offloads."""

    num_gpus: int = 1
    """GPUs of all nodes together."""

    @property
    def shards(self) -> Shards:
        """Number of shards of each part."""
        return self.sharding.shards(self.num_gpus)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one GPU by part, in bytes."""

    weights: float
    """Frozen weights; in full fine-tuning, all weights."""

    adapter: float
    """Weights that train beside a frozen base."""

    gradients: float
    """Gradients of the weights that train."""

    optimizer: float
    """The optimizer's state."""

    activations: float
    """Tensors that the forward pass keeps for the backward pass."""

    temporary: float
    """The rest of the peak: a layer's working memory, the head's chunk of logits, an unpacked 4-bit weight."""

    communication: float = 0.0
    """Weights gathered from other GPUs, and buffers for sending."""

    @property
    def total(self) -> float:
        """The peak, in bytes."""
        return float(sum(vars(self).values()))
