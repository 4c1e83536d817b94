"""Gradient checkpointing: decide whether it is needed, from activations and free memory, and enable it for layers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_lightning.compat.transformers import recompute_activations
from sft_lightning.errors import UserError

_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.7


@dataclass(frozen=True)
class CheckpointingDecision:
    """Whether gradient checkpointing is on, and why."""

    enabled: bool
    """Whether activations are recomputed."""

    reason: str
    """Why, for the log."""

    every: int = 1
    """Recompute every n-th decoder layer, starting with the first; the other layers keep their activations."""


def activation_gib(config: PretrainedConfig, *, tokens: int, bytes_per_value: int) -> float:
    """Predict the activations that a forward pass keeps for the backward pass, without checkpointing, in GiB.

    Per layer and token, a decoder keeps about 6 hidden, 2 key/value and 3 feed-forward vectors; transformers' unfused
    layers with a PEFT adapter keep about twice as much. A state space model has no heads; its scan keeps three float32
    states of each feed-forward channel and token. Logits add three float32 copies of the vocabulary per token.

    Args:
        config: The model's configuration.
        tokens: Tokens of a micro-batch on one device.
        bytes_per_value: Bytes of an activation.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = getattr(text, "num_attention_heads", None)
    kv = hidden * (getattr(text, "num_key_value_heads", None) or heads) // heads if heads else 0
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    per_layer = 2 * (6 * hidden + 2 * kv + 3 * feed_forward) * bytes_per_value
    if not heads:
        per_layer += 12 * feed_forward * text.state_size
    values: float = tokens * (text.num_hidden_layers * per_layer + 12 * text.vocab_size)
    return values / _GIB


def decide_checkpointing(
    setting: bool | int | Literal["auto"],
    config: PretrainedConfig,
    *,
    tokens: int,
    bytes_per_value: int,
    free_gib: float,
) -> CheckpointingDecision:
    """Decide whether to recompute activations in the backward pass, which costs about a third of the speed.

    Args:
        setting: `model.gradient_checkpointing`.
        config: The model's configuration.
        tokens: Tokens of a micro-batch on one device.
        bytes_per_value: Bytes of an activation.
        free_gib: Free memory of the device, in GiB, after the weights were loaded.
    """
    if isinstance(setting, bool):
        return CheckpointingDecision(setting, f"set to {str(setting).lower()}")
    if isinstance(setting, int):
        return CheckpointingDecision(True, f"every {_ordinal(setting)}decoder layer", every=setting)
    needed = activation_gib(config, tokens=tokens, bytes_per_value=bytes_per_value)
    enabled = needed > _SHARE_OF_FREE_MEMORY * free_gib
    sign = ">" if enabled else "≤"
    return CheckpointingDecision(
        enabled,
        f"auto: activations of {tokens} tokens take about {needed:.2f} GiB {sign} "
        f"{_SHARE_OF_FREE_MEMORY:.0%} of {free_gib:.2f} GiB free",
    )


def free_memory_gib(device: torch.device) -> float:
    """Return the free memory of a device, in GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _GIB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB


def recomputable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers that can be recomputed, or compiled, one by one, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable_gradient_checkpointing(model: PreTrainedModel, every: int = 1) -> int:
    """Recompute layers in the backward pass; non-reentrant, so it works with frozen inputs.

    Args:
        model: The transformers model, without the PEFT model around it.
        every: Recompute every n-th decoder layer, starting with the first; 1 recomputes all.

    Returns:
        The number of layers that are recomputed.

    Raises:
        UserError: If the model does not support it, or has fewer than `every` layers.
    """
    layers = recomputable_layers(model)
    if every > max(1, len(layers)):
        raise UserError(
            f"model.gradient_checkpointing: must be at most {max(1, len(layers))}, the number of decoder layers that "
            f"this {model.config.model_type} model can recompute (got {every})"
        )
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.gradient_checkpointing: {model.config.model_type} models do not support it; set false")
    recompute_activations(model, every)
    return -(-len(layers) // every)


def _ordinal(number: int) -> str:
    return {1: "", 2: "second ", 3: "third "}.get(number, f"{number}th ")
