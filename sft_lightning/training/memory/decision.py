"""Decide what is recomputed in the backward pass: the fastest way whose memory fits. `fit` and `plan` both use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.checkpointing import (
    Recomputation,
    describe_recomputation,
    free_memory_bytes,
    recomputable_layers,
)
from sft_lightning.strategies.sharding import ShardingSpec
from sft_lightning.training.losses import CHUNK_LOGITS
from sft_lightning.training.memory.parts import GIB, Memory, Setup

USABLE_SHARE = 0.92
"""Share of the memory that a run is planned to take; the rest is for what the allocator cannot use."""

_OBVIOUS_SHARE = 0.25
"""If a generous bound is below this share of the memory, nothing is simulated."""


@dataclass(frozen=True)
class RecomputationDecision:
    """What is recomputed, and why."""

    how: Recomputation
    """What is recomputed in the backward pass."""

    reason: str
    """Why, for the log."""

    def __str__(self) -> str:
        return f"{describe_recomputation(self.how)} ({self.reason})"


def given_recomputation(setting: bool | int | Literal["auto", "selective"]) -> Recomputation | None:
    """Return what `model.gradient_checkpointing` says is recomputed; `None` for `auto`."""
    if isinstance(setting, str):
        return "selective" if setting == "selective" else None
    return int(setting)


def choices(model: PreTrainedModel, sharding: ShardingSpec) -> list[Recomputation]:
    """Return the ways to recompute that a model has, from the fastest; each takes less memory than the one before.

    Args:
        model: The transformers model.
        sharding: What the strategy shards.
    """
    num_layers = len(recomputable_layers(model))
    if not num_layers or not model.supports_gradient_checkpointing:
        return [0]
    ways: list[Recomputation] = [0, "selective", 2, 1] if num_layers > 1 else [0, "selective", 1]
    return [how for how in ways if how != "selective" or not _gathers_within_layers(sharding)]


def check_recomputation(how: Recomputation, sharding: ShardingSpec) -> None:
    """Check that a strategy's layers can be recomputed in the way that was asked for.

    Args:
        how: What is recomputed.
        sharding: What the strategy shards.

    Raises:
        UserError: If they cannot.
    """
    if how == "selective" and _gathers_within_layers(sharding):
        raise UserError(
            f"model.gradient_checkpointing: selective is not available with trainer.strategy {sharding.name}, which "
            "gathers weights inside the layers; set true"
        )


def _gathers_within_layers(sharding: ShardingSpec) -> bool:
    """Whether a layer's recomputation runs other operations than its forward pass did, as under ZeRO-3."""
    return sharding.kind == "zero" and sharding.shards_weights


def decide_recomputation(
    estimate: Callable[[Setup], Memory], setup: Setup, ways: Sequence[Recomputation], budget: float
) -> RecomputationDecision:
    """Return the fastest way whose memory fits; the last one if none does.

    Args:
        estimate: Returns the memory of a setup: weights, gradients, the optimizer's state, activations and buffers.
        setup: The configuration.
        ways: What may be recomputed, from the fastest.
        budget: Memory of the device, in bytes.
    """
    usable = USABLE_SHARE * budget
    tried: list[str] = []
    for how in ways:
        words = describe_recomputation(how)
        try:
            total = estimate(replace(setup, recomputation=how)).total
        except (RuntimeError, UserError) as error:  # an operation that reads values, or changes an output that is kept
            tried.append(f"{words}: not simulated, {str(error).strip().splitlines()[0]}")
            continue
        tried.append(f"{words}: {total / GIB:.2f} GiB")
        if total <= usable:
            return RecomputationDecision(how, f"auto: {', '.join(tried)}; available: {usable / GIB:.2f} GiB")
    return RecomputationDecision(
        ways[-1], f"auto: {', '.join(tried)}; available: {usable / GIB:.2f} GiB, too little; see the command plan"
    )


def generous_bound(config: PretrainedConfig, *, tokens: int, width: int, num_trained: int) -> float:
    """Return more bytes than gradients, the optimizer's state and all activations take in a usual model.

    Activations are counted at four times the 6 hidden, 2 key/value and 3 feed-forward vectors that a layer needs, in
    float32, with the scores of attention and the states of a state-space model's scan; the optimizer at five float32
    tensors per trained parameter.

    Args:
        config: The model's configuration.
        tokens: Tokens of a micro-batch on one device.
        width: Tokens of a row.
        num_trained: Parameters that train.
    """
    text = config.get_text_config()
    hidden = text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or 0
    feed_forward = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = getattr(text, "num_experts_per_tok", None) or 1
    per_layer = 4 * (8 * hidden + 3 * feed_forward * experts) + 4 * heads * width
    if not heads:
        per_layer += 4 * feed_forward * text.state_size
    logits = 4 * min(CHUNK_LOGITS, tokens * text.vocab_size)
    return float(4 * (tokens * text.num_hidden_layers * per_layer + logits + 6 * num_trained))


def obviously_fits(model: PreTrainedModel, setup: Setup, budget: float) -> RecomputationDecision | None:
    """Return the decision to keep everything if even a generous bound is small beside the memory, else `None`.

    Args:
        model: The transformers model.
        setup: The configuration.
        budget: Memory of the device, in bytes, without the weights.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tokens = setup.batch_size * setup.max_length
    bound = generous_bound(model.config, tokens=tokens, width=setup.max_length, num_trained=trained)
    if bound > _OBVIOUS_SHARE * budget:
        return None
    return RecomputationDecision(0, f"auto: at most {bound / GIB:.2f} GiB needed, {budget / GIB:.2f} GiB available")


def budget_of(model: torch.nn.Module, device: torch.device) -> float:
    """Return the memory that this process can have: what is free, and what its weights take already, in bytes.

    Args:
        model: The loaded model.
        device: Where it trains.
    """
    if device.type == "cuda":
        return free_memory_bytes(device) + float(torch.cuda.memory_reserved(device))
    return free_memory_bytes(device) + float(sum(p.numel() * p.element_size() for p in model.parameters()))
