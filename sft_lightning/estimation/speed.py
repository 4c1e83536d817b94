"""Floating-point operations per token, and the time that they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

PEAK_TFLOPS = {
    "A10": 125.0, "A10G": 70.0, "A30": 165.0, "A40": 149.7, "A100": 312.0, "A800": 312.0, "RTX A6000": 154.8,
    "B200": 2250.0, "H100": 989.4, "H100 PCIe": 756.0, "H200": 989.4, "H800": 989.4,
    "L4": 121.0, "L40": 181.0, "L40S": 362.0, "RTX 3090": 71.0, "RTX 4090": 165.2, "T4": 65.0, "V100": 125.0,
}  # fmt: skip
"""Dense peaks of GPUs in 10¹² operations per second, in bfloat16 (T4, V100: float16), from NVIDIA's data sheets."""


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a GPU by its CUDA device name, in 10¹² operations per second; `None` if it is unknown."""
    words = f" {device_name.replace('-', ' ').replace('/', ' ')} "
    found = [name for name in PEAK_TFLOPS if f" {name} " in words]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def num_matrix_entries(model: torch.nn.Module) -> int:
    """Return the number of entries of a model's linear layers, with its head and without an adapter.

    A quantized layer counts the entries that it multiplies with, not the fewer numbers that it stores.
    """
    modules = list(model.modules())
    tuned = [module for module in modules if isinstance(module, BaseTunerLayer)]
    of_base = {id(inner) for module in tuned for inner in module.get_base_layer().modules()}
    of_adapters = {id(inner) for module in tuned for inner in module.modules()} - of_base
    linears = [m for m in modules if isinstance(m, torch.nn.Linear) and id(m) not in of_adapters]
    return sum(m.in_features * m.out_features for m in linears) + sum(
        m.weight.numel() for m in modules if isinstance(m, Conv1D)
    )


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations per token of training; a multiplication and an addition are two operations."""

    model: float
    """Operations of the forward and backward pass, the part that MFU counts."""

    recomputed: float
    """Operations that gradient checkpointing runs a second time."""

    def seconds(self, num_tokens: int, *, mfu: float, tflops: float, num_gpus: int, recomputed: float) -> float:
        """Return how long training takes, in seconds.

        Args:
            num_tokens: Tokens, without padding.
            mfu: Share of the peak that the executed operations reach, 0 to 1.
            tflops: Peak of a GPU in its training type, in 10¹² operations per second.
            num_gpus: GPUs that share the tokens.
            recomputed: Share of the layers that are recomputed, 0 to 1.
        """
        executed = self.model + recomputed * self.recomputed
        return num_tokens * executed / (mfu * tflops * 1e12 * num_gpus)


def arithmetic(
    config: PretrainedConfig, *, num_matmul: int, num_adapter: int, full: bool, document_length: float
) -> Arithmetic:
    """Return the operations per token.

    A forward pass takes 2·N operations for N matrix parameters and 2·s·h·L for causal attention over documents of s
    tokens, with L layers of width h. The backward pass takes as many again for the gradients of the inputs, and as many
    again for the gradients of the weights, which a frozen base does not need (PaLM, Chowdhery et al., 2022,
    arXiv:2204.02311, appendix B, with causal attention counted at half).

    Args:
        config: The model's configuration.
        num_matmul: N: parameters of the base's linear layers, head included.
        num_adapter: Parameters of the adapter.
        full: Whether the base trains.
        document_length: s: mean length of the document that a token is in, in tokens.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0  # a state-space model has none
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    attention = 2 * document_length * width * text.num_hidden_layers
    base = 6 * num_matmul if full else 4 * num_matmul
    return Arithmetic(base + 6 * num_adapter + 3 * attention, 2 * num_matmul + attention)


def mean_document_length(lengths: npt.NDArray[np.int64]) -> float:
    """Return the mean length of the document that a token is in, Σ s² / Σ s tokens, for lengths (num_documents,)."""
    return float((lengths.astype(np.float64) ** 2).sum() / max(1, lengths.sum()))
