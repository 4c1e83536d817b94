"""Floating-point operations per token, and the time that they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.models.inspection import base_model


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
class TrainingOperations:
    """Floating-point operations of a loaded model's forward and backward pass, as MFU counts them.

    A multiplication and an addition are two operations. Recomputed activations do not count.
    """

    per_token: float
    """Matrix products of each token: 2 per weight in the forward pass, 2 for the gradient of its input, and 2 more for
    its own gradient if it trains."""

    per_supervised_token: float
    """The same for the head, which sees only hidden states that predict a supervised token."""

    per_pair: float
    """Causal attention of one token to one of its document, over all layers: 6 per unit of width, as half of the pairs
    are masked."""

    def count(self, *, num_tokens: float, num_supervised: float, document_length: float) -> float:
        """Return the number of operations for some tokens.

        Args:
            num_tokens: Tokens, without padding.
            num_supervised: Supervised tokens among them.
            document_length: Mean length of the document that a token is in, in tokens (`mean_document_length`).
        """
        of_tokens = self.per_token + self.per_pair * document_length
        return of_tokens * num_tokens + self.per_supervised_token * num_supervised


def training_operations(model: PreTrainedModel | PeftModel) -> TrainingOperations:
    """Count the operations of a model as it stands: adapters, frozen and trained weights, quantized or not.

    Args:
        model: A decoder without experts; of experts a token uses only some.
    """
    base = base_model(model)
    unused = {
        id(each) for m in model.modules() if isinstance(m, ModulesToSaveWrapper) for each in m.original_module.modules()
    }
    head = base.get_output_embeddings()
    of_head = {id(each) for each in head.modules()} if isinstance(head, torch.nn.Module) else set[int]()
    per_token = per_supervised = 0.0
    for module in model.modules():
        if id(module) in unused:
            continue
        if id(module) in of_head:
            per_supervised += _operations_of(module)
        else:
            per_token += _operations_of(module)
    return TrainingOperations(per_token, per_supervised, 6 * _attention_width(base.config))


def _operations_of(module: torch.nn.Module) -> float:
    """Return the operations per token of one module's own matrix product; 0 if it has none."""
    if isinstance(module, torch.nn.Linear):
        entries = module.in_features * module.out_features  # a quantized weight stores fewer numbers
    elif isinstance(module, Conv1D):
        entries = module.weight.numel()
    else:
        return 0.0
    return float(entries * (6 if module.weight.requires_grad else 4))


def _attention_width(config: PretrainedConfig) -> int:
    """Return the width of attention, all heads together, summed over layers; a state-space model has none."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    return int(width * text.num_hidden_layers)


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
    attention = 2 * document_length * _attention_width(config)
    base = 6 * num_matmul if full else 4 * num_matmul
    return Arithmetic(base + 6 * num_adapter + 3 * attention, 2 * num_matmul + attention)


def mean_document_length(lengths: npt.NDArray[np.int64]) -> float:
    """Return the mean length of the document that a token is in, Σ s² / Σ s tokens, for lengths (num_documents,)."""
    return float((lengths.astype(np.float64) ** 2).sum() / max(1, lengths.sum()))
