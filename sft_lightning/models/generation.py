"""Answers from a model: one batched, left-padded generation that any command or callback uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are generated.

    Raises:
        UserError: If `max_new_tokens` is below 1 or `temperature` below 0.
    """

    max_new_tokens: int = 64
    """Tokens per answer at most."""

    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""

    seed: int = 0
    """Seed of the sampling; the run's own random state is left as it is."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"generation: max_new_tokens must be at least 1 (got {self.max_new_tokens})")
        if self.temperature < 0:
            raise UserError(f"generation: temperature must be at least 0 (got {self.temperature})")


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, without an adapter around it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"expected a transformers model inside, found a {type(base).__name__}")
    return base


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    stop_token_id: int,
    config: GenerationConfig,
) -> list[str]:
    """Generate an answer to each prompt.

    Args:
        model: The model; its mode and its attention implementation are restored afterwards.
        tokenizer: Its tokenizer.
        prompts: Rendered generation prompts, special tokens included.
        stop_token_id: The token that ends an answer.
        config: How to generate.

    Returns:
        The answers without the stop token.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    width = max(len(row) for row in ids)
    pad = stop_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    devices = [device] if device.type == "cuda" else []
    with _serving(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        out: torch.Tensor = model.generate(  # type: ignore[operator]  # PeftModel forwards to its base
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=stop_token_id,
            pad_token_id=pad,
            use_cache=True,
            do_sample=config.temperature > 0,
            **({"temperature": config.temperature} if config.temperature > 0 else {}),
        )
    answers = out[:, width:].tolist()
    cut = [row[: row.index(stop_token_id)] if stop_token_id in row else row for row in answers]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in cut]


@contextmanager
def _serving(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Evaluation mode and masked attention, as a served model runs; packed attention knows no left padding."""
    base = base_model(model)
    implementation, training = base.config._attn_implementation, model.training
    model.eval()
    if implementation == "packed":
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if implementation == "packed":
            base.set_attn_implementation(implementation)
        model.train(training)
