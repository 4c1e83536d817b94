"""Gradient checkpointing, and whether it is needed: what a step's activations take against what is free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.7


@dataclass(frozen=True)
class CheckpointingDecision:
    """Whether gradient checkpointing is on, and why."""

    enabled: bool
    reason: str


def activation_gib(config: PretrainedConfig, *, tokens: int, bytes_per_value: int) -> float:
    """Predict the activations that a forward pass keeps for the backward, without checkpointing, in GiB.

    Per layer and token, a decoder keeps about 6 hidden, 2 key/value and 3 feed-forward vectors; transformers' unfused
    layers with a PEFT adapter keep about twice that. Logits add three float32 copies of the vocabulary.

    Args:
        config: The model's configuration.
        tokens: Tokens of a micro-batch on one device.
        bytes_per_value: Bytes of an activation.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = text.num_attention_heads
    kv = hidden * (getattr(text, "num_key_value_heads", None) or heads) // heads
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    per_layer = 2 * (6 * hidden + 2 * kv + 3 * feed_forward) * bytes_per_value
    values: float = tokens * (text.num_hidden_layers * per_layer + 12 * text.vocab_size)
    return values / _GIB


def decide_checkpointing(
    setting: bool | Literal["auto"], config: PretrainedConfig, *, tokens: int, bytes_per_value: int, free_gib: float
) -> CheckpointingDecision:
    """Decide whether to recompute activations in the backward pass, which costs about a third of the speed.

    Args:
        setting: `model.gradient_checkpointing`.
        config: The model's configuration.
        tokens: Tokens of a micro-batch on one device.
        bytes_per_value: Bytes of an activation.
        free_gib: Memory that is free once the weights are loaded.
    """
    if setting != "auto":
        return CheckpointingDecision(setting, f"set to {str(setting).lower()}")
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


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass; works with frozen inputs because it is not reentrant."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
