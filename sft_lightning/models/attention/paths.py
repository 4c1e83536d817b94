"""Which kernel computes packed attention: decided by a pure function from facts, and named in the log.

Every path keeps documents apart. Variable-length kernels take all documents of a micro-batch at once; where none fits,
each document is computed by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from sft_lightning.compat.torch import shares_key_value_heads
from sft_lightning.models.attention.kernels import has_flash_attn, prepare_kernel

Kernel = Literal["torch", "flash_attn", "per_document"]
"""torch's variable-length kernel, that of the flash-attn package, or one call for each document."""

_MIN_CAPABILITY = (8, 0)
_MAX_WIDTH = 256
_NAMES = {
    "torch": "torch's variable-length FlashAttention",
    "flash_attn": "flash-attn's variable-length kernel",
    "per_document": "one call per document",
}


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """What the choice of a kernel depends on."""

    device: str
    """Type of the device."""

    capability: tuple[int, int]
    """CUDA's compute capability; (0, 0) for other devices."""

    dtype: torch.dtype
    """Type of queries, keys and values."""

    head_dim: int
    """Width of queries and keys."""

    value_dim: int
    """Width of values."""

    grouped: bool = False
    """Whether several query heads share a key/value head."""

    softcap: bool = False
    """Whether scores are capped."""

    dropout: bool = False
    """Whether attention weights are dropped."""

    has_flash_attn: bool = False
    """Whether the flash-attn package is installed."""

    torch_shares_heads: bool = True
    """Whether torch's kernel lets query heads share key/value heads; else these are repeated."""


@dataclass(frozen=True)
class AttentionPath:
    """How packed attention is computed."""

    kernel: Kernel
    """Which kernel."""

    reason: str
    """Why, for the log."""

    width: int = 0
    """Width that queries, keys and values are padded to with zeros, which change no score; 0 for no kernel's."""

    def __str__(self) -> str:
        return f"{_NAMES[self.kernel]} ({self.reason})"


def choose_path(facts: AttentionFacts) -> AttentionPath:
    """Return the fastest kernel that computes what is asked; see `AttentionPath`.

    Args:
        facts: Device, types and shapes.
    """
    width = -(-max(facts.head_dim, facts.value_dim) // 8) * 8
    major, minor = facts.capability
    kind = f"{str(facts.dtype).removeprefix('torch.')}, head_dim {facts.head_dim}"
    if facts.device != "cuda":
        return AttentionPath("per_document", f"variable-length kernels need a CUDA device, this is {facts.device}")
    if facts.capability < _MIN_CAPABILITY:
        return AttentionPath(
            "per_document",
            f"compute capability {major}.{minor}; variable-length kernels need 8.0",
        )
    if facts.dtype not in (torch.float16, torch.bfloat16):
        return AttentionPath("per_document", f"{kind}; variable-length kernels take float16 and bfloat16")
    if width > _MAX_WIDTH:
        return AttentionPath(
            "per_document", f"{kind}, value width {facts.value_dim}; variable-length kernels take up to {_MAX_WIDTH}"
        )
    if {facts.head_dim, facts.value_dim} != {width}:
        kind += f", value width {facts.value_dim}, padded to {width}"
    asked = [name for name, wanted in (("softcap", facts.softcap), ("dropout", facts.dropout)) if wanted]
    if asked and not facts.has_flash_attn:
        return AttentionPath("per_document", f"torch's kernel has no {asked[0]}, and flash-attn is not installed")
    if asked:
        return AttentionPath("flash_attn", f"{kind}; torch's kernel has no {asked[0]}", width)
    if facts.grouped and facts.has_flash_attn and not facts.torch_shares_heads:
        return AttentionPath("flash_attn", f"{kind}; this torch would repeat key/value heads", width)
    return AttentionPath("torch", kind, width)


@contextmanager
def noting_paths() -> Iterator[list[AttentionPath]]:
    """Collect, without repeats, the paths that packed attention takes inside the block."""
    found: list[AttentionPath] = []
    _collectors.append(found)
    try:
        yield found
    finally:
        _collectors.remove(found)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def path_of_call(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, grouped: bool, softcap: bool, dropout: bool
) -> AttentionPath:
    """Return the path of a call; decided once for each combination of arguments.

    Args:
        device: The device.
        dtype: Type of queries, keys and values.
        head_dim: Width of queries and keys.
        value_dim: Width of values.
        grouped: Whether several query heads share a key/value head.
        softcap: Whether scores are capped.
        dropout: Whether attention weights are dropped.
    """
    path = _decided(device, dtype, head_dim, value_dim, grouped, softcap, dropout)
    if path.kernel != "per_document":
        prepare_kernel(path.kernel)
    for found in _collectors:
        if path not in found:
            found.append(path)
    return path


@functools.cache
def _decided(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, grouped: bool, softcap: bool, dropout: bool
) -> AttentionPath:
    return choose_path(
        AttentionFacts(
            device=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
            dtype=dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            grouped=grouped,
            softcap=softcap,
            dropout=dropout,
            has_flash_attn=has_flash_attn(),
            torch_shares_heads=shares_key_value_heads(),
        )
    )


_collectors: list[list[AttentionPath]] = []
