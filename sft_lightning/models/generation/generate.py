"""Generate answers to a batch of left-padded prompts; all commands and callbacks use this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig as TransformersGenerationConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from sft_lightning.compat.transformers import attention_of
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.contrastive import contrastive_search
from sft_lightning.models.generation.diverse_beam import diverse_beam_search
from sft_lightning.models.generation.lockstep import lockstep
from sft_lightning.models.inspection import base_model, computing_device, evaluating, has_virtual_tokens


class GeneratedAnswer(NamedTuple):
    """One answer, as tokens."""

    token_ids: list[int]
    """The tokens, without the stop token."""

    stopped: bool
    """Whether the model ended the answer with a stop token; otherwise `max_new_tokens` did."""


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
        model: The model; its mode and its attention implementation are restored afterwards. If its weights are sharded,
            all processes must call this, also those without prompts.
        tokenizer: The model's tokenizer.
        prompts: Rendered generation prompts, special tokens included.
        stop_token_id: The token that ends an answer.
        config: How to generate.

    Returns:
        The answers, without the stop token.
    """
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids if prompts else []
    pad = stop_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = generate_ids(model, ids, stop_token_ids=[stop_token_id], pad_token_id=pad, config=config)
    return [decode_answer(tokenizer, answer.token_ids) for [answer] in answers]


def decode_answer(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    """Return the text of an answer, without special tokens and surrounding white space.

    Args:
        tokenizer: The model's tokenizer.
        token_ids: Tokens of the answer.
    """
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
) -> list[list[GeneratedAnswer]]:
    """Generate answers to prompts given as tokens, all in one batch.

    Args:
        model: The model; its mode and its attention implementation are restored afterwards. If its weights are sharded,
            all processes must call this, each with its own prompts or none.
        prompts: Token ids of each prompt, none empty.
        stop_token_ids: The tokens that end an answer.
        pad_token_id: Token that fills rows up.
        config: How to generate; the checkpoint's own defaults are not used.
        num_return_sequences: Answers per prompt, best first.
        streamer: Receives the tokens as they are generated; only for one prompt, without beams or contrastive search.

    Returns:
        The answers to each prompt.

    Raises:
        UserError: If the decoding mode cannot return that many answers.
    """
    most = config.max_answers()
    if most is not None and num_return_sequences > most:
        raise UserError(
            f"generation.num_return_sequences: must be at most {most} with {config.mode} decoding (got "
            f"{num_return_sequences})"
        )
    with _generation_mode(model), lockstep(base_model(model)):
        out = (
            _continue(model, prompts, config, stop_token_ids, pad_token_id, num_return_sequences, streamer)
            if prompts
            else []
        )
    stops = set(stop_token_ids)
    answers = [_end_at_stop(row, stops) for row in out]
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
    """Return the generated tokens, padded on the right, stop tokens included."""
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
                synced_gpus=False,  # `lockstep` keeps the processes together
                **_transformers_options(config),
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
    """Return the answers of the searches that transformers does not have, (B, answers, tokens)."""
    if has_virtual_tokens(model):
        raise UserError(
            f"model.generation: {config.mode} search does not support prompt-learning adapters; sample, or use "
            "num_beams without groups"
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


def _transformers_options(config: GenerationConfig) -> dict[str, Any]:
    """Return transformers' options; those of sampling only if it samples, because transformers warns otherwise."""
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    return {
        **(sampling if config.temperature > 0 else {}),
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.temperature > 0,
        "repetition_penalty": config.repetition_penalty,
        "num_beams": config.num_beams,
        "use_cache": True,
    }


def _end_at_stop(row: list[int], stops: set[int]) -> GeneratedAnswer:
    end = next((i for i, token in enumerate(row) if token in stops), None)
    return GeneratedAnswer(row if end is None else row[:end], end is not None)


@contextmanager
def _generation_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Prepare a model for generation, and restore it afterwards.

    Evaluation mode; SDPA instead of packed attention, which does not support left padding; without the checkpoint's
    generation defaults; and without the routers' loss, which transformers cannot compute over cached tokens.
    """
    base = base_model(model)
    config: Any = base.config.get_text_config()
    routers = getattr(config, "output_router_logits", False)
    implementation, defaults = attention_of(base.config), base.generation_config
    base.generation_config = TransformersGenerationConfig()
    if implementation == "packed":
        _use_masked_attention(base)
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


def _use_masked_attention(model: PreTrainedModel) -> None:
    """Choose SDPA, or eager attention for families without it in transformers, such as Gemma 2 and GPT-OSS."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
