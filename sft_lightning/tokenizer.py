"""The tokenizer: loading it, adding tokens, whether it writes a BOS, and how its chat template ends an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_lightning.errors import UserError, clear_load_errors

Chat = list[dict[str, Any]]
"""Messages as chat templates read them: `role`, `content`, and whatever else `Message.extras` holds."""

ApplyTemplate = Callable[[Chat, bool, Sequence[Mapping[str, Any]]], str]
"""(messages, add_generation_prompt, tools) → text."""


def load_tokenizer(
    name_or_path: str | None,
    *,
    trust_remote_code: bool = False,
    tokens: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Load a tokenizer.

    A tokenizer without a pad token stays without one: padding has no loss and is not attended to.

    Args:
        name_or_path: Folder or Hub id.
        trust_remote_code: Run code that comes with the tokenizer.
        tokens: Tokens to add where the tokenizer lacks them.
        special_tokens: The same, as special tokens: decoded answers leave them out.

    Raises:
        UserError: If `name_or_path` is missing or cannot be loaded, if the tokenizer gives no character offsets or has
            no EOS token, or if a token to add is empty or named twice.
    """
    if name_or_path is None:
        raise UserError(
            "model.model_name_or_path: required; name a model's folder or Hub id (with model.from_config, name a "
            "tokenizer's in model.tokenizer_name_or_path)"
        )
    key = "model.tokenizer_name_or_path (or model_name_or_path)"
    with clear_load_errors(key, "tokenizer", name_or_path, ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"model.tokenizer_name_or_path: the tokenizer of {name_or_path!r} ({type(tokenizer).__name__}) gives no "
            "character offsets, which exact loss masks need; convert it to a tokenizer.json"
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"model.tokenizer_name_or_path: the tokenizer of {name_or_path!r} has no eos_token; set one in its "
            "tokenizer_config.json"
        )
    add_tokens(tokenizer, tokens, special_tokens)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains the files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], special_tokens: Sequence[str]) -> None:
    """Add the tokens that the tokenizer does not have yet.

    Args:
        tokenizer: Changed in place.
        tokens: Ordinary tokens.
        special_tokens: Special tokens: decoded answers leave them out.

    Raises:
        UserError: If a token is empty or named twice.
    """
    for key, names in (("add_tokens", tokens), ("add_special_tokens", special_tokens)):
        if any(not name for name in names):
            raise UserError(f"model.{key}: a token must not be empty (got {list(names)})")
    both = [*tokens, *special_tokens]
    twice = sorted({name for name in both if both.count(name) > 1})
    if twice:
        raise UserError(f"model.add_tokens, model.add_special_tokens: named twice: {', '.join(map(repr, twice))}")
    if tokens:
        tokenizer.add_tokens(list(tokens))
    if special_tokens:
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself puts its BOS before a text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


class AnswerEnding(NamedTuple):
    """How a chat template writes contents, and how it ends an answer."""

    stop: str
    """The stop token, as text."""

    trailer: str
    """What the template writes after the stop token of every answer, such as a line feed."""

    typed_parts: bool
    """Whether the template reads contents as lists of typed parts only, as some multimodal ones do."""


def answer_ending(name: str, apply: ApplyTemplate, added_tokens: Iterable[str]) -> AnswerEnding:
    """Render a short conversation with a chat template to see how it ends an answer.

    Args:
        name: The template's name, for messages.
        apply: (messages, add_generation_prompt, tools) → text.
        added_tokens: The tokenizer's added tokens, as text; the stop token must be one of them.

    Raises:
        UserError: If the template leaves out the contents, or if no added token follows the answer: nothing would teach
            the model to stop.
    """
    typed_parts, after = _text_after_answer(name, apply)
    for token in sorted(filter(None, added_tokens), key=len, reverse=True):
        if after.lstrip().startswith(token):
            return AnswerEnding(token, after.lstrip()[len(token) :], typed_parts)
    raise UserError(
        f"data.template: {name} writes {after!r} after an answer, which does not begin with a special token of the "
        "tokenizer, so the model could not learn to stop; use a template that ends answers with one"
    )


def content_parts(text: str, *, typed: bool) -> str | list[dict[str, str]]:
    """Return a message's content as chat templates read it.

    Args:
        text: The content.
        typed: Whether the template reads lists of typed parts only.
    """
    return [{"type": "text", "text": text}] if typed else text


def _text_after_answer(name: str, apply: ApplyTemplate) -> tuple[bool, str]:
    """Return whether the template reads typed parts only, and the text that it writes after an answer."""
    refusal: UserError | None = None
    for typed_parts in (False, True):
        turns = (("user", "question"), ("assistant", "answer"))
        chat: Chat = [{"role": role, "content": content_parts(text, typed=typed_parts)} for role, text in turns]
        try:
            rendered = apply(chat, False, ())
        except UserError as error:
            refusal = refusal or error
            continue
        _, found, after = rendered.rpartition("answer")
        if found:
            return typed_parts, after
    raise refusal or UserError(f"data.template: {name} leaves out the answer of a conversation; use another template")
