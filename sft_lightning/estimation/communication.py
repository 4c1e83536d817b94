"""What a GPU holds for the sake of the others: weights gathered from them, and buffers of what is sent to them.

Counted from what the strategies' code allocates, not simulated: upper bounds where it decides while running.
"""

from __future__ import annotations

from sft_lightning.estimation.sharding import Sharding
from sft_lightning.estimation.skeleton import Skeleton, stored_bytes, stored_bytes_of
from sft_lightning.models.base.quantization import QuantizationConfig
from sft_lightning.strategies.sharding import shard_groups

_ZERO_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements; allocated whole, however few parameters train."""

_ZERO_LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: weights that ZeRO-3 keeps gathered, in elements."""


def communication_bytes(
    skeleton: Skeleton, sharding: Sharding, quantization: QuantizationConfig | None, element_size: int
) -> float:
    """Return the bytes that a strategy holds for communication.

    DDP copies gradients into buckets of their size. FSDP2 has two decoder layers whole, the one that runs and the next,
    what belongs to no layer for the whole step, and a layer's gradients while they are reduced. ZeRO has its buckets,
    two of them below stage 3, and in stage 3 gathered weights.

    Args:
        skeleton: The model.
        sharding: The strategy.
        quantization: Of the base.
        element_size: Bytes of an element of what ZeRO sends.
    """
    if sharding.kind == "ddp":
        return float(sum(p.numel() * p.element_size() for p in skeleton.trainable))
    if sharding.kind == "fsdp2":
        return _fsdp2(skeleton, quantization)
    if sharding.stage == 0:
        return 0.0
    if sharding.stage < 3:
        return 2.0 * _ZERO_BUCKET * element_size
    num_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    gathered = sum(stored_bytes(skeleton, quantization)) * min(1.0, _ZERO_LIVE / num_parameters)
    return float(_ZERO_BUCKET * element_size) + gathered


def _fsdp2(skeleton: Skeleton, quantization: QuantizationConfig | None) -> float:
    seen: set[int] = set()
    groups: list[tuple[float, float]] = []
    for module in shard_groups(skeleton.base):
        own = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        groups.append(stored_bytes_of(own, skeleton.linears, quantization))
    *layers, rest = groups
    largest = max(frozen + trained for frozen, trained in layers)
    reduced = max(trained for _, trained in groups)
    return sum(rest) + 2 * largest + reduced
