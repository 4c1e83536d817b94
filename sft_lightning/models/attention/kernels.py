"""Variable-length kernels under one signature: all documents of a micro-batch in one call, on a GPU."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any, Literal, Protocol

import torch

from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.torch import variable_length_attention

_FLASH_ATTN = "flash-attn"
_FIRST_WITH_SOFTCAP = (2, 6)


class VariableLengthKernel(Protocol):
    """Causal attention within documents that stand one after the other."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: DocumentLengths,
        *,
        scale: float,
        window: int,
        softcap: float,
        dropout: float,
    ) -> torch.Tensor:
        """Return the attention's result, (Tq, heads, head_dim).

        Args:
            query: (Tq, heads, head_dim).
            key: (Tk, key/value heads, head_dim).
            value: (Tk, key/value heads, head_dim).
            documents: Where the documents start.
            scale: Factor on the scores.
            window: Number of tokens that a token sees, itself included; 0: all before it.
            softcap: Scores become softcap · tanh(score / softcap); 0: no cap.
            dropout: Probability of dropping an attention weight.
        """


KERNELS: dict[str, VariableLengthKernel] = {}
"""The kernels that were prepared, by name: where compiled code finds them."""


def prepare_kernel(name: Literal["torch", "flash_attn"]) -> None:
    """Put a kernel into `KERNELS`.

    Args:
        name: torch's kernel, or that of the flash-attn package.
    """
    if name not in KERNELS:
        KERNELS[name] = torch_kernel() if name == "torch" else _flash_attn_kernel()


def torch_kernel(*, repeat_heads: bool = True) -> VariableLengthKernel:
    """Return torch's kernel; it has neither softcap nor dropout.

    Args:
        repeat_heads: Repeat key/value heads where the kernel has no argument for sharing them (before torch 2.12).
    """
    attend_to = variable_length_attention(repeat_heads=repeat_heads)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: DocumentLengths, **options: Any
    ) -> torch.Tensor:
        window = (options["window"] - 1, 0)
        return attend_to(
            query, key, value, documents.starts[0], documents.starts[1], *documents.extent.shape,
            scale=options["scale"], window_size=window,
        )  # fmt: skip

    return attend


def _flash_attn_kernel() -> VariableLengthKernel:
    """Return the kernel of the flash-attn package, which query heads may share key/value heads in."""
    attend_to = importlib.import_module("flash_attn").flash_attn_varlen_func

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: DocumentLengths, **options: Any
    ) -> torch.Tensor:
        window = (options["window"] - 1, 0) if options["window"] else (-1, -1)
        out: torch.Tensor = attend_to(
            query, key, value, documents.starts[0], documents.starts[1], *documents.extent.shape,
            dropout_p=options["dropout"], softmax_scale=options["scale"], causal=True, window_size=window,
            softcap=options["softcap"],
        )  # fmt: skip
        return out

    return attend


@functools.cache
def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed, in a version that caps scores (2.6)."""
    try:
        version = importlib.metadata.version(_FLASH_ATTN)
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_WITH_SOFTCAP
