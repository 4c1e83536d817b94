"""Binds a template to a tokenizer, and checks that the two fit together before any example is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.bounded import BoundedTemplate
from sft_lightning.data.templates.jinja import JinjaTemplate, jinja_template
from sft_lightning.data.templates.named import NamedTemplate, named_template
from sft_lightning.data.templates.template import SpecialTokens, Template
from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import ApplyTemplate, Chat, adds_bos
from sft_lightning.types import Message

logger = logging.getLogger(__name__)

_QUESTION = [Message("user", "question")]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
    """Return the tokenizer's BOS, if the tokenizer puts one before a text, and its EOS."""
    return SpecialTokens(str(tokenizer.bos_token) if adds_bos(tokenizer) else "", str(tokenizer.eos_token or ""))


def bind_template(setting: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """Return the template of `data.template`, and set it as the tokenizer's chat template.

    So the tokenizer that is saved with the model serves the template that was trained.

    Args:
        setting: A named template, `chat_template`, or the path of a `.jinja` file.
        tokenizer: The tokenizer; its `chat_template` is set.

    Raises:
        UserError: If the template does not exist or cannot be read, or its stop token is not one token of the
            tokenizer.
    """
    template: Template
    if setting == "chat_template" or setting.endswith(".jinja"):
        if setting != "chat_template":
            tokenizer.chat_template = _read_template(setting)
        if not tokenizer.chat_template:
            raise UserError("data.template: the tokenizer has no chat_template; name a template such as vicuna_v1.1")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        template = jinja_template(setting, _applier(setting, tokenizer), tokenizer.get_added_vocab(), special)
        if "strftime_now" in str(tokenizer.chat_template):
            logger.warning(
                "data.template: %s writes the current date into every conversation; all examples get today's date",
                setting,
            )
    else:
        template = named_template(setting, special_tokens(tokenizer))
        tokenizer.chat_template = template.chat_template()
    stop_token_id(template, tokenizer)
    if adds_bos(tokenizer) and not template.generation_prompt(_QUESTION).startswith(str(tokenizer.bos_token)):
        logger.warning(
            "data.template: %s leaves out %s, which this tokenizer adds before other texts; training and serving both "
            "do without it",
            setting,
            tokenizer.bos_token,
        )
    return template


def stop_token_id(template: Template, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the stop token, which ends an answer.

    Args:
        template: The template.
        tokenizer: The tokenizer.

    Raises:
        UserError: If the stop token is not exactly one token of the tokenizer.
    """
    if not template.stop:
        raise UserError(
            f"data.template: {template.name} ends answers with the tokenizer's EOS, but the tokenizer has none; set "
            "`eos_token` in its tokenizer_config.json"
        )
    ids: list[int] = tokenizer(template.stop, add_special_tokens=False).input_ids
    if len(ids) != 1 or tokenizer.decode(ids) != template.stop:
        own = ", ".join(name for name, form in TURN_FORMATS.items() if form.stop == "{eos}")
        raise UserError(
            f"data.template: {template.name} ends answers with {template.stop!r}, which this tokenizer splits into "
            f"{len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)}), so the model could not learn to stop; set "
            f"model.add_special_tokens: [{template.stop!r}] (an adapter trains its embedding with "
            "model.adapter.trainable_token_indices: added), use chat_template, or a template that ends answers with "
            f"the tokenizer's EOS {tokenizer.eos_token!r}: {own}"
        )
    return ids[0]


def check_serving(template: Template, tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> None:
    """Check that `apply_chat_template` serves a conversation as the prompt that was trained.

    Args:
        template: The run's template.
        tokenizer: The tokenizer, with that template as its chat template.
        messages: A conversation up to the message to answer.

    Raises:
        RuntimeError: If `apply_chat_template` makes another prompt: a named template and its Jinja export, or this
            package's way and transformers' way to render Jinja, differ.
    """
    trained = template.generation_prompt(messages)
    tools: list[Any] = []
    if isinstance(template, JinjaTemplate):
        chat, tools = template.chat(messages), [dict(tool) for tool in messages[0].tools]
    elif isinstance(template, NamedTemplate) and all(message.context is None for message in messages):
        chat = [{"role": message.role, "content": message.content} for message in messages]
    else:
        return  # documents are not served as chats, and chat messages cannot hold Alpaca's `input`
    served = tokenizer.apply_chat_template(chat, tools=tools or None, tokenize=False, add_generation_prompt=True)
    if served != trained and "strftime_now" not in str(tokenizer.chat_template):
        raise RuntimeError(f"template {template.name}: trained on {trained!r}, but its chat template serves {served!r}")


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"data.template: cannot read {path!r}: {reason}") from error


def _applier(name: str, tokenizer: PreTrainedTokenizerFast) -> ApplyTemplate:
    """Return the tokenizer's chat template as a function.

    It renders as `apply_chat_template` does (with transformers' `ImmutableSandboxedEnvironment`, compiled once), but
    without the copies that take longer than the rendering; `check_serving` compares the two. The clock is stopped, so
    that a prompt and its conversation have the same date.
    """
    now = datetime.now()
    names: dict[str, Any] = {**tokenizer.special_tokens_map, "documents": None}
    names["strftime_now"] = lambda form: now.strftime(form)
    compiled: dict[bool, BoundedTemplate] = {}

    def apply(chat: Chat, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]]) -> str:
        has_tools = bool(tools)
        if has_tools not in compiled:
            compiled[has_tools] = _compile(name, tokenizer, tools)
        given = list(tools) if has_tools else None
        try:
            return compiled[has_tools].render(
                messages=chat, tools=given, add_generation_prompt=add_generation_prompt, **names
            )
        except TemplateError as error:
            raise UserError(f"data.template: {name} refuses a conversation: {error}") from error
        except Exception as error:  # whatever the code of a template raises
            raise UserError(
                f"data.template: {name} fails on a conversation: {type(error).__name__}: {error}"
            ) from error

    return apply


def _compile(name: str, tokenizer: PreTrainedTokenizerFast, tools: Sequence[Mapping[str, Any]]) -> BoundedTemplate:
    """Compile the chat template; a tokenizer may have another one for conversations with tools."""
    try:
        return BoundedTemplate(tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None))
    except TemplateSyntaxError as error:
        raise UserError(f"data.template: {name}, line {error.lineno} of the template: {error.message}") from error
    except ValueError as error:
        raise UserError(f"data.template: {name}: {error}") from error
