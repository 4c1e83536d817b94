"""Decide whether compiling the decoder layers pays: what it saves over the whole run, against what it takes once."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig

SECONDS_PER_GRAPH = 40.0
"""Seconds that a decoder layer, forward and backward, takes to compile for a GPU. A prediction, not a measurement."""

BYTES_PER_SECOND = 3.0e12
"""Memory bandwidth of the GPU. That of the fastest ones, so that the time saved is not overestimated on others."""

VALUES_PER_WIDTH = 100
"""16-bit values that compiled layers neither read nor write, per token, layer, and unit of hidden and feed-forward
width: norms, rotations, activation functions and residuals become few kernels. Counted on fake tensors for a Llama 7B
with LoRA, where compiling brings 4.45 MB per token and layer to 1.50."""

LEAST_GAIN = 2.0
"""How many times the seconds of compiling must be saved."""


@dataclass(frozen=True)
class CompileDecision:
    """Whether the decoder layers are compiled, and why."""

    enabled: bool
    """Whether they are."""

    reason: str
    """Why, for the log."""

    def __str__(self) -> str:
        return f"{'on' if self.enabled else 'off'} ({self.reason})"


def seconds_saved(config: PretrainedConfig, num_tokens: int) -> float:
    """Predict how much faster compiled layers train on a number of tokens, in seconds.

    Args:
        config: The model's configuration.
        num_tokens: Tokens that one GPU trains on.
    """
    text = config.get_text_config()
    feed_forward = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    values = VALUES_PER_WIDTH * (text.hidden_size + feed_forward) * text.num_hidden_layers
    return 2.0 * float(values) * num_tokens / BYTES_PER_SECOND


def decide_compiling(
    setting: bool | Literal["auto"],
    config: PretrainedConfig,
    *,
    num_tokens: int,
    num_graphs: int,
    obstacle: str | None,
) -> CompileDecision:
    """Decide whether to compile the decoder layers.

    Args:
        setting: `model.torch_compile`.
        config: The model's configuration.
        num_tokens: Tokens that one GPU trains on in the whole run.
        num_graphs: Graphs that have to be compiled.
        obstacle: Why `auto` does not compile in this run; `None` if it may.
    """
    if setting != "auto":
        return CompileDecision(setting, "as set")
    if obstacle is not None:
        return CompileDecision(False, f"auto: {obstacle}")
    saved, spent = seconds_saved(config, num_tokens), SECONDS_PER_GRAPH * num_graphs
    return CompileDecision(
        saved >= LEAST_GAIN * spent,
        f"auto: predicted to save {saved:.0f} s of this run, and to take {spent:.0f} s",
    )


def obstacle_to_compiling(device: torch.device, *, strategy: str, bits: int | None) -> str | None:
    """Return why `auto` does not compile, in a few words; `None` if nothing is in the way.

    Args:
        device: Where the model trains.
        strategy: What shards the model: `ddp` for nothing, `fsdp2` or `zero`.
        bits: Bits of the base's quantized weights; `None` if they are not quantized.
    """
    if device.type != "cuda":
        return f"not on {device.type}, where results stay the same to the bit"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, below 8.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if strategy != "ddp":
        return "not tried with sharded weights"
    return "8-bit layers break the graph" if bits == 8 else None
