"""A template bound to a tokenizer: what both must agree on before a single example is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates import (
    NamedTemplate,
    SpecialTokens,
    Template,
    jinja_template,
    named_template,
)
from sft_lightning.data.tokenization import Encode, Encoding
from sft_lightning.errors import UserError
from sft_lightning.models.loading import adds_bos
from sft_lightning.types import Message


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """Return the tokenizer's BOS, if it puts one before a text by itself, and its EOS."""
    return SpecialTokens(bos=str(tokenizer.bos_token) if adds_bos(tokenizer) else "", eos=str(tokenizer.eos_token))


def bind_template(setting: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return the template of `data.template`, and make it the tokenizer's own: what is saved is what was trained.

    Args:
        setting: A named template, `chat_template`, or the path of a `.jinja` file.
        tokenizer: Gets the template as its `chat_template`.

    Raises:
        UserError: If there is no such template, or its stop token is not one token of the tokenizer.
    """
    template: Template
    if setting == "chat_template" or setting.endswith(".jinja"):
        if setting != "chat_template":
            tokenizer.chat_template = _read_template(setting)
        if not tokenizer.chat_template:
            raise UserError("data.template: the tokenizer has no chat_template; name a template, such as vicuna_v1.1")
        template = jinja_template(setting, _applier(setting, tokenizer), tokenizer.get_added_vocab())
    else:
        template = named_template(setting, special_tokens(tokenizer))
        tokenizer.chat_template = template.chat_template()
    stop_token_id(template, tokenizer)
    return template


def stop_token_id(template: Template, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends an answer.

    Raises:
        UserError: If it is not exactly one token.
    """
    ids: list[int] = tokenizer(template.stop, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.decode(ids) != template.stop:
        raise UserError(
            f"data.template: {template.name} ends answers with {template.stop!r}, which this tokenizer splits into "
            f"{len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)}), so the model could not learn to stop; "
            "choose a template that ends with one of the tokenizer's special tokens, such as alpaca or chat_template"
        )
    return ids[0]


def check_serving(template: Template, tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> None:
    """Prove on a conversation that the exported chat template makes the prompt that training taught, token for token.

    Raises:
        RuntimeError: If it does not; a named template and its Jinja export have drifted apart.
    """
    if not isinstance(template, NamedTemplate) or any(message.context is not None for message in messages):
        return  # a Jinja template is the chat template; Alpaca's `input` has no place in chat messages
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    served = tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    trained = template.generation_prompt(messages)
    if served != trained:
        raise RuntimeError(f"template {template.name}: trained on {trained!r}, but its chat template serves {served!r}")


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """Return the tokenizer as a plain function on texts."""

    def encode(texts: list[str]) -> list[Encoding]:
        out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            Encoding(np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in zip(out["input_ids"], out["offset_mapping"], strict=True)
        ]

    return encode


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"data.template: cannot read {path!r}: {error.strerror}") from error


def _applier(name: str, tokenizer: PreTrainedTokenizerFast):  # type: ignore[no-untyped-def]
    def apply(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            raise UserError(f"data.template: {name} refuses a conversation: {error.message}") from error

    return apply
