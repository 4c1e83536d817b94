"""What merging did, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_lightning.merging.checks import Difference

BaseName = Literal["original", "dequantized"]
"""What adapters are merged into: the base as it is stored, or the values that quantization left of it."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merging did."""

    output_dir: Path
    base: BaseName
    """What the adapters were merged into: the base as it is stored, or the values that quantization left of it."""

    dtype: str
    """Types of the written weights."""

    difference: Difference | None
    """`None` if it was not measured."""

    divergences: Mapping[BaseName, float]
    """For a quantized base, KL(trained model ‖ merged model) in nats per token, for each base that was tried."""

    whole: str | None
    """Why the whole model had to be in memory; `None`: the base was read shard by shard."""

    left_out: Sequence[str]
    """Tensors of the base's files that the model does not have."""

    untied: bool
    """Whether the head became a matrix of its own."""

    format: Literal["huggingface", "pth"]
    """Layout of the folder."""
