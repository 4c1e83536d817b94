"""Answers from a model: one batched, left-padded generation that every command and callback uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from sft_lightning.compat.transformers import attention_of
from sft_lightning.errors import UserError
from sft_lightning.models.generation.contrastive import contrastive_search
from sft_lightning.models.generation.diverse_beam import diverse_beam_search
from sft_lightning.models.generation.lockstep import in_step
from sft_lightning.models.inspection import base_model, computing_device, evaluating

DecodingMode = Literal["greedy", "sampling", "beam", "beam_sampling", "diverse_beam", "contrastive"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are generated.

    Raises:
        UserError: If a value is out of range, or two do not go together.
    """

    max_new_tokens: int = 64
    """Tokens per answer at most."""

    temperature: float = 0.0
    """0 takes the most likely token; above 0 samples."""

    top_k: int = 0
    """Sample among this many most likely tokens, 0 for all; candidates of contrastive search."""

    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""

    repetition_penalty: float = 1.0
    """Divides the logits of tokens that have occurred (Keskar et al., 2019, arXiv:1909.05858); 1 is none."""

    num_beams: int = 1
    """Above 1: beam search; with a temperature above 0, beam search that samples."""

    num_beam_groups: int = 1
    """Above 1: diverse beam search in this many groups (Vijayakumar et al., 2016, arXiv:1610.02424)."""

    diversity_penalty: float = 1.0
    """What a group of beams pays for a token that an earlier group has chosen; used with `num_beam_groups`."""

    penalty_alpha: float = 0.0
    """Above 0: contrastive search among `top_k` candidates (Su et al., 2022, arXiv:2202.06417)."""

    seed: int = 0
    """Seed of the sampling; the run's own random state is left as it is."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_beam_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"generation: {name} must be at least 1 (got {getattr(self, name)})")
        for name in ("temperature", "top_k", "diversity_penalty"):
            if getattr(self, name) < 0:
                raise UserError(f"generation: {name} must be at least 0 (got {getattr(self, name)})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generation: top_p must be above 0 and at most 1 (got {self.top_p})")
        if not 0 <= self.penalty_alpha <= 1:
            raise UserError(f"generation: penalty_alpha must be in 0..1 (got {self.penalty_alpha})")
        if self.repetition_penalty <= 0:
            raise UserError(f"generation: repetition_penalty must be above 0 (got {self.repetition_penalty})")
        self._check_together()

    def _check_together(self) -> None:
        mode = self.mode
        if mode in ("contrastive", "diverse_beam") and (self.temperature > 0 or self.repetition_penalty != 1):
            raise UserError(f"generation: {mode} goes neither with a temperature nor with a repetition_penalty")
        if mode == "contrastive" and (self.top_k < 2 or self.num_beams > 1 or self.num_beam_groups > 1):
            raise UserError(
                f"generation: penalty_alpha {self.penalty_alpha} is contrastive search, which needs top_k of at least "
                f"2 (got {self.top_k}) and no beams (got {self.num_beams} in {self.num_beam_groups} groups)"
            )
        if self.num_beams % self.num_beam_groups:
            raise UserError(
                f"generation: num_beam_groups ({self.num_beam_groups}) must divide num_beams ({self.num_beams})"
            )

    @property
    def mode(self) -> DecodingMode:
        """The decoding that the values describe, as in transformers."""
        if self.penalty_alpha > 0:
            return "contrastive"
        if self.num_beam_groups > 1:
            return "diverse_beam"
        if self.num_beams > 1:
            return "beam_sampling" if self.temperature > 0 else "beam"
        return "sampling" if self.temperature > 0 else "greedy"

    def most_answers(self) -> int | None:
        """Return how many different answers a prompt can have; `None` for any number."""
        return {"greedy": 1, "contrastive": 1, "sampling": None}.get(self.mode, self.num_beams)


class Generated(NamedTuple):
    """One answer, as tokens."""

    token_ids: list[int]
    """Without the stop token."""

    stopped: bool
    """Whether the model ended the answer itself; else `max_new_tokens` did."""


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
        model: The model; its mode and its attention implementation are restored afterwards. Where processes share its
            weights, all of them call this, one that has no prompts too.
        tokenizer: Its tokenizer.
        prompts: Rendered generation prompts, special tokens included.
        stop_token_id: The token that ends an answer.
        config: How to generate.

    Returns:
        The answers without the stop token.
    """
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids if prompts else []
    pad = stop_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = generate_ids(model, ids, stop_token_ids=[stop_token_id], pad_token_id=pad, config=config)
    return [decode(tokenizer, answer.token_ids) for [answer] in answers]


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    """Return the text of an answer, without special tokens and the white space around it."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    config: GenerationConfig,
    num_return_sequences: int = 1,
    streamer: BaseStreamer | None = None,
) -> list[list[Generated]]:
    """Generate answers to prompts in tokens, all in one batch.

    Args:
        model: The model; its mode and its attention implementation are restored afterwards. Where processes share its
            weights, all of them call this, each with its own prompts or none.
        prompts: Token ids of each prompt, none empty.
        stop_token_ids: The tokens that end an answer.
        pad_token_id: Filler.
        config: How to generate; no default of the checkpoint has a part in it.
        num_return_sequences: Answers to each prompt, best first.
        streamer: Gets the tokens as they come; one prompt, no beams, no contrastive search.

    Returns:
        The answers to each prompt.

    Raises:
        UserError: If the mode has not that many answers to a prompt.
    """
    most = config.most_answers()
    if most is not None and num_return_sequences > most:
        raise UserError(
            f"generation: num_return_sequences: {config.mode} has {most} answer{'s' if most > 1 else ''} to a prompt "
            f"(got {num_return_sequences})"
        )
    with _serving(model), in_step(base_model(model)):
        out = (
            _continue(model, prompts, config, stop_token_ids, pad_token_id, num_return_sequences, streamer)
            if prompts
            else []
        )
    stops = set(stop_token_ids)
    answers = [_cut(row, stops) for row in out]
    return [answers[i : i + num_return_sequences] for i in range(0, len(answers), num_return_sequences)]


def _continue(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    num_return_sequences: int,
    streamer: BaseStreamer | None,
) -> list[list[int]]:
    """Return the answers as they come out of the model: padded on the right, stop tokens included."""
    device = computing_device(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        if config.mode in ("contrastive", "diverse_beam"):
            found = _search(model, ids, mask, config, stop_token_ids, pad_token_id)
            out = found[:, :num_return_sequences].flatten(0, 1)
        else:
            out = model.generate(  # type: ignore[operator]  # PeftModel forwards to its base
                input_ids=ids,
                attention_mask=mask,
                eos_token_id=list(stop_token_ids),
                pad_token_id=pad_token_id,
                num_return_sequences=num_return_sequences,
                streamer=streamer,
                synced_gpus=False,  # `in_step` sees to it
                **_options(config),
            )[:, width:]
    rows: list[list[int]] = out.tolist()
    return rows


def _search(
    model: PreTrainedModel | PeftModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
) -> torch.Tensor:
    """Return the answers of the searches that transformers has not, (B, answers, tokens)."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"model.generation: transformers' own searches put the adapter's virtual tokens before the text, and "
            f"{config.mode} is none of them; sample, or take num_beams without groups"
        )
    ends: Any = {
        "max_new_tokens": config.max_new_tokens,
        "stop_token_ids": stop_token_ids,
        "pad_token_id": pad_token_id,
    }
    if config.mode == "contrastive":
        found = contrastive_search(model, ids, mask, top_k=config.top_k, penalty_alpha=config.penalty_alpha, **ends)
        return found[:, None]
    return diverse_beam_search(
        model,
        ids,
        mask,
        num_beams=config.num_beams,
        num_beam_groups=config.num_beam_groups,
        diversity_penalty=config.diversity_penalty,
        **ends,
    )


def _options(config: GenerationConfig) -> dict[str, Any]:
    """Return transformers' options; those of sampling only where it samples, or it warns of them."""
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    return {
        **(sampling if config.temperature > 0 else {}),
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.temperature > 0,
        "repetition_penalty": config.repetition_penalty,
        "num_beams": config.num_beams,
        "use_cache": True,
    }


def _cut(row: list[int], stops: set[int]) -> Generated:
    end = next((i for i, token in enumerate(row) if token in stops), None)
    return Generated(row if end is None else row[:end], end is not None)


@contextmanager
def _serving(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Evaluation mode, masked attention (packed attention knows no left padding), and no defaults of the checkpoint.

    Nor the routers' loss of a mixture of experts, which transformers cannot sum over cached tokens.
    """
    base = base_model(model)
    config: Any = base.config.get_text_config()
    routers = getattr(config, "output_router_logits", False)
    implementation, defaults = attention_of(base.config), base.generation_config
    base.generation_config = TransformersGenerationConfig()
    if implementation == "packed":
        base.set_attn_implementation("sdpa")
    if routers:
        config.output_router_logits = False
    try:
        with evaluating(model):
            yield
    finally:
        if routers:
            config.output_router_logits = True
        base.generation_config = defaults
        if implementation == "packed":
            base.set_attn_implementation(implementation)
