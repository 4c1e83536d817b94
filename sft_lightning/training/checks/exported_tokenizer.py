"""The tokenizer of an exported folder, loaded again: it renders and tokenizes a conversation as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_lightning.checks import Check
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.templates.jinja import JinjaTemplate
from sft_lightning.data.templates.template import DocumentTemplate, Template
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.errors import UserError
from sft_lightning.models.export.stopping import generation_config_in, stop_tokens
from sft_lightning.types import Message

_NAME = "exported tokenizer"
_QUESTION = Message("user", "What is 12 × 3, in one word?")
PROBES: tuple[Sequence[Message], ...] = (
    (_QUESTION,),
    (_QUESTION, Message("assistant", "Thirty-six."), Message("user", "Naïve façade?\nAnd 日本?")),
)
"""Conversations up to an answer."""


def check_tokenizer(folder: Path, data: SFTDataModule, *, trust_remote_code: bool = False) -> Check:
    """Load the tokenizer of an exported folder, and compare its tokens of a few prompts with those of training.

    Args:
        folder: The exported folder.
        data: The data of the run, whose template and tokenizer made the training examples.
        trust_remote_code: Run code that comes with the tokenizer.
    """
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stops = stop_tokens(generation_config_in(folder))
    if data.stop_token_id not in stops:
        stop = data.tokenizer.convert_ids_to_tokens(data.stop_token_id)
        return Check(
            _NAME, False, f"{folder}: generation_config.json does not end answers at {stop!r} (eos_token_id {stops})"
        )
    compared = 0
    for messages in PROBES:
        trained = trained_prompt(data, messages)
        if trained is None:
            continue
        served = _served_prompt(loaded, data.template, messages)
        if served != trained:
            figure = _difference(data, served, trained)
            return Check(_NAME, False, f"{folder}: a prompt is served as other tokens than in training: {figure}")
        compared += 1
    if not compared:
        return Check(_NAME, None, "the template refuses every probe, or writes the current date")
    figure = f"{compared} prompts of {folder.name}/ have the tokens of training; answers end at token"
    return Check(_NAME, True, f"{figure} {data.stop_token_id}")


def trained_prompt(data: SFTDataModule, messages: Sequence[Message]) -> list[int] | None:
    """Return the token ids of a prompt as training makes them; `None` if the template has no one text for it.

    Args:
        data: The data of the run.
        messages: A conversation up to an answer.
    """
    if "strftime_now" in str(data.tokenizer.chat_template):
        return None
    try:
        text = data.template.generation_prompt(messages)
    except UserError:
        return None
    ids: list[int] = TextEncoder(data.tokenizer).encode([text]).ids.tolist()
    return ids


def _served_prompt(loaded: PreTrainedTokenizerBase, template: Template, messages: Sequence[Message]) -> list[int]:
    """Return the token ids that the loaded tokenizer makes, as its users do; empty if it renders nothing."""
    if isinstance(template, DocumentTemplate):
        text = template.generation_prompt(messages)
        plain: list[int] = loaded(text, add_special_tokens=False).input_ids
        return plain
    chat: list[dict[str, Any]] = [{"role": each.role, "content": each.content} for each in messages]
    if isinstance(template, JinjaTemplate):
        chat = template.chat(messages)
    try:
        encoded: Any = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    except (TemplateError, ValueError):
        return []  # without a chat template
    return list(encoded["input_ids"])


def _difference(data: SFTDataModule, served: Sequence[int], trained: Sequence[int]) -> str:
    pairs = enumerate(zip(served, trained, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(served), len(trained)))
    texts = [data.tokenizer.decode(list(ids[first : first + 8])) for ids in (served, trained)]
    return f"{len(served)} tokens, {len(trained)} in training; from token {first}, {texts[0]!r} for {texts[1]!r}"
