"""What fits into the memory of a GPU, and changes that make a configuration fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from sft_lightning.models.checkpointing import Recomputation
from sft_lightning.strategies.names import FSDP2
from sft_lightning.strategies.sharding import SHORT_NAMES
from sft_lightning.training.memory.parts import Memory, Setup

Estimate = Callable[[Setup], Memory]
"""Returns the memory of a setup."""


def largest_batch_size(estimate: Estimate, setup: Setup, budget: float) -> int:
    """Return the largest `batch_size` that fits; 0 if not even 1 does.

    Args:
        estimate: Returns the memory of a setup.
        setup: The other settings.
        budget: Memory of the GPU, in bytes.
    """
    return largest(lambda rows: estimate(replace(setup, batch_size=rows)).total <= budget, 1 << 12)


def largest_max_length(estimate: Estimate, setup: Setup, budget: float, limit: int) -> int:
    """Return the largest multiple of 64 that fits as `max_length`; 0 if none does.

    Args:
        estimate: Returns the memory of a setup.
        setup: The other settings.
        budget: Memory of the GPU, in bytes.
        limit: Largest `max_length`, in tokens.
    """

    def fits(number: int) -> bool:
        return estimate(replace(setup, max_length=64 * number)).total <= budget

    return 64 * largest(fits, max(1, limit // 64))


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number that fits, found by bisection.

    Args:
        fits: Whether a number fits; it must hold for every number below one that fits. 0 always fits.
        limit: Largest number to try.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class Change(NamedTuple):
    """A change of the configuration that saves memory."""

    words: str
    """The key and its new value."""

    setup: Setup
    """The setup after this change and those before it."""


def changes(setup: Setup, *, has_adapter: bool, can_quantize: bool) -> Iterator[Change]:
    """Yield changes that save memory, cheapest first; each is applied on top of the previous ones.

    A smaller micro-batch with more accumulation costs only kernel launches, checkpointing up to a third of the speed, 4
    bits some accuracy of the base and time to unpack it. Sharding needs more GPUs, and shorter rows change the data.

    Args:
        setup: The configuration.
        has_adapter: Whether an adapter is trained, so that the base can be quantized.
        can_quantize: Whether the base is loaded from a checkpoint, which can be quantized.
    """
    if setup.batch_size > 1:
        factor = setup.batch_size
        setup = replace(setup, batch_size=1)
        yield Change(f"data.batch_size: 1 and {factor} times the trainer.accumulate_grad_batches", setup)
    ways: tuple[Recomputation, ...] = (0, "selective", 1)
    if setup.sharding.kind == "zero" and setup.sharding.shards_weights:
        ways = (0, 1)
    for how in ways[1 + ways.index(setup.recomputation) if setup.recomputation in ways else -1 :]:
        setup = replace(setup, recomputation=how)
        yield Change(f"model.gradient_checkpointing: {'true' if how == 1 else how}", setup)
    if has_adapter and can_quantize and setup.bits is None:
        setup = replace(setup, bits=4)
        yield Change("model.quantization: {bits: 4}", setup)
    for num_gpus in (2, 4, 8):
        if num_gpus > setup.shards.weights:
            setup = replace(setup, num_gpus=num_gpus, sharding=SHORT_NAMES[FSDP2])
            yield Change(f"{num_gpus} GPUs, with trainer.strategy: {FSDP2}", setup)
    while setup.max_length > 512:
        setup = replace(setup, max_length=max(512, setup.max_length // 2))
        yield Change(f"data.max_length: {setup.max_length} (drops or truncates longer examples)", setup)


def largest_model(memory: Memory, num_parameters: int, budget: float) -> float:
    """Return the approximate number of parameters of the largest model of the same kind that fits.

    The memory of a micro-batch is taken to grow with the parameters to the power of 2/3 (depth and width grow together,
    and parameters grow as depth · width²), all other memory in proportion to the parameters.

    Args:
        memory: Memory of this model.
        num_parameters: Parameters of this model.
        budget: Memory of the GPU, in bytes.
    """

    def fits(millions: int) -> bool:
        times = millions * 1e6 / num_parameters
        micro_batch = memory.activations + memory.temporary
        return (memory.total - micro_batch) * times + micro_batch * math.pow(times, 2 / 3) <= budget

    return largest(fits, 1 << 22) * 1e6
