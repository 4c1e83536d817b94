"""Arithmetic per token, and the time that it takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations per token of training; a multiplication and an addition are two."""

    model: float
    """What the training is: the part that MFU counts."""

    recomputed: float
    """What gradient checkpointing runs a second time."""

    def seconds(self, num_tokens: int, *, mfu: float, tflops: float, num_gpus: int, checkpointing: bool) -> float:
        """Return how long training on tokens takes.

        Args:
            num_tokens: Tokens, padding left out.
            mfu: Share of the peak that the executed operations reach, 0 to 1.
            tflops: Peak of a GPU in its training type, in 10¹² operations a second.
            num_gpus: GPUs that share the tokens.
            checkpointing: Whether layers are run again.
        """
        executed = self.model + (self.recomputed if checkpointing else 0.0)
        return num_tokens * executed / (mfu * tflops * 1e12 * num_gpus)


def arithmetic(
    config: PretrainedConfig, *, num_matmul: int, num_adapter: int, full: bool, document_length: float
) -> Arithmetic:
    """Return the operations per token.

    A forward pass takes 2N for its N matrix parameters and 2·s·h·L for causal attention over documents of s tokens; the
    backward as much again for the inputs' gradients, and as much again for the weights', which a frozen base has not
    (PaLM, Chowdhery et al., 2022, arXiv:2204.02311, appendix B, with causal attention counted at half).

    Args:
        config: The model's configuration.
        num_matmul: N: parameters of the base's linear layers, head included.
        num_adapter: Parameters of the adapter.
        full: Whether the base trains.
        document_length: s: mean length of the document that a token is in.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    attention = 2 * document_length * width * text.num_hidden_layers
    base = 6 * num_matmul if full else 4 * num_matmul
    return Arithmetic(base + 6 * num_adapter + 3 * attention, 2 * num_matmul + attention)


def mean_document_length(lengths: npt.NDArray[np.int64]) -> float:
    """Return the length of the document that a token is in, the mean over tokens: Σ s² / Σ s."""
    return float((lengths.astype(np.float64) ** 2).sum() / max(1, lengths.sum()))
