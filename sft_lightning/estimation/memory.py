"""Memory of one GPU by part, what of it fits, and what would make the rest fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from sft_lightning.strategies.names import FSDP2
from sft_lightning.strategies.sharding import SHORT_NAMES, ShardingSpec, Shards

GIB = 2**30


class StepBytes(NamedTuple):
    """Bytes of a micro-batch; see `SimulatedStep`."""

    kept: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A configuration, as far as its memory goes."""

    batch_size: int
    max_length: int
    checkpointing: bool
    bits: int | None
    """Of the base's quantized weights."""

    sharding: ShardingSpec
    """What the strategy shards."""

    num_gpus: int = 1
    """GPUs of all nodes together."""

    @property
    def shards(self) -> Shards:
        """How many GPUs each part is divided over."""
        return self.sharding.shards(self.num_gpus)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    """What is frozen, or all of it in full fine-tuning."""

    adapter: float
    """What trains beside a frozen base."""

    gradients: float
    """Of what trains."""

    optimizer: float
    activations: float
    """What the forward pass keeps for the backward."""

    temporary: float
    """The rest of the peak: a layer's working memory, the head's chunk of logits, a weight taken out of its 4 bits."""

    communication: float = 0.0
    """Weights gathered from other GPUs, and buffers of what is sent to them."""

    @property
    def total(self) -> float:
        """The peak."""
        return float(sum(vars(self).values()))


Estimate = Callable[[Setup], Memory]


def largest_batch_size(estimate: Estimate, setup: Setup, budget: float) -> int:
    """Return the largest `batch_size` that fits into a budget of bytes; 0 if not even 1 does."""
    return largest(lambda rows: estimate(replace(setup, batch_size=rows)).total <= budget, 1 << 12)


def largest_max_length(estimate: Estimate, setup: Setup, budget: float, limit: int) -> int:
    """Return the largest `max_length` up to a limit that fits into a budget of bytes, a multiple of 64; 0 if none."""

    def fits(number: int) -> bool:
        return estimate(replace(setup, max_length=64 * number)).total <= budget

    return 64 * largest(fits, max(1, limit // 64))


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 0 to `limit` that fits; every number below one that fits does, and so does 0."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class Change(NamedTuple):
    """A change of the configuration, with those before it."""

    words: str
    setup: Setup


def changes(setup: Setup, *, has_adapter: bool, can_quantize: bool) -> Iterator[Change]:
    """Yield changes that save memory, the cheapest first; each keeps the ones before it.

    A smaller micro-batch with more accumulation costs nothing but launches; checkpointing a third of the speed;
    8 and 4 bits some accuracy of the base and time to unpack; sharding takes more GPUs; an adapter is another training,
    and shorter rows are other data.

    Args:
        setup: The configuration.
        has_adapter: Whether it trains an adapter.
        can_quantize: Whether the base may be quantized.
    """
    if setup.batch_size > 1:
        factor = setup.batch_size
        setup = replace(setup, batch_size=1)
        yield Change(f"data.batch_size: 1, with {factor} times the trainer.accumulate_grad_batches", setup)
    if not setup.checkpointing:
        setup = replace(setup, checkpointing=True)
        yield Change("model.gradient_checkpointing: true", setup)
    if has_adapter and can_quantize and setup.bits is None:
        setup = replace(setup, bits=4)
        yield Change("model.quantization: {bits: 4}", setup)
    for num_gpus in (2, 4, 8):
        if num_gpus > setup.shards.weights:
            setup = replace(setup, num_gpus=num_gpus, sharding=SHORT_NAMES[FSDP2])
            yield Change(f"{num_gpus} GPUs, with trainer.strategy: {FSDP2}", setup)
    while setup.max_length > 512:
        setup = replace(setup, max_length=max(512, setup.max_length // 2))
        yield Change(f"data.max_length: {setup.max_length} (leaves out or cuts longer examples)", setup)


def largest_model(memory: Memory, num_parameters: int, budget: float) -> float:
    """Return about how many parameters a model of the same kind may have in a budget of bytes.

    Everything but the micro-batch is taken to grow with the parameters, the micro-batch with their power of 2/3: depth
    and width grow together, and parameters as depth · width².
    """

    def fits(millions: int) -> bool:
        times = millions * 1e6 / num_parameters
        moving = memory.activations + memory.temporary
        return (memory.total - moving) * times + moving * math.pow(times, 2 / 3) <= budget

    return largest(fits, 1 << 22) * 1e6
