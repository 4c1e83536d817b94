"""Named templates: a `TurnFormat` with a tokenizer's special tokens, and the same template in Jinja for serving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sft_lightning.data.templates.template import SpecialTokens, supervision
from sft_lightning.data.templates.turn_formats import TURN_FORMATS, TurnFormat
from sft_lightning.errors import UserError, one_of
from sft_lightning.types import LossOn, Message, Segment

_UNWRITABLE = ("tool_calls", "reasoning_content")
"""Parts of a message that named templates cannot write."""


@dataclass(frozen=True)
class NamedTemplate:
    """A `TurnFormat` with a tokenizer's special tokens."""

    name: str
    """The name in `TURN_FORMATS`."""

    format: TurnFormat
    """The strings of the template."""

    tokens: SpecialTokens
    """BOS and EOS of the tokenizer."""

    @cached_property
    def stop(self) -> str:
        """The stop token: the token that ends an answer, as text."""
        return self.format.stop.replace("{eos}", self.tokens.eos)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop token alone."""
        return (self.stop,)

    @cached_property
    def bos(self) -> str:
        """The beginning of every text; may be empty."""
        return self.format.bos.replace("{bos}", self.tokens.bos)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return the training text of a conversation.

        Args:
            messages: The conversation.
            loss_on: Which messages are supervised.

        Raises:
            UserError: If the template cannot write a part of it: a system message, tools, tool calls, tool results.
        """
        system, first = self._system(messages)
        flags = supervision(messages, loss_on)
        trailer, separator = self.format.trailer, self.format.separator
        segments = [Segment(self.bos, False)] if self.bos else []
        if system and not self.format.system_in_user:
            train, weight = (flags[0], messages[0].weight) if first else (loss_on == "all", 1.0)
            segments.append(Segment(system, train, weight))
        num_rounds = 0
        for i in range(first, len(messages)):
            message = messages[i]
            if message.extras or message.tools or message.role not in ("user", "assistant"):
                self._check_writable(message)
            if message.role == "assistant":
                segments.append(Segment(self._answer(message), flags[i], message.weight))
                if trailer:
                    segments.append(Segment(trailer, loss_on == "all"))
                continue
            num_rounds += 1
            text = self._question(message, num_rounds, system if i == first else "")
            segments.append(Segment(separator + text if i > first else text, flags[i], message.weight))
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes the next answer; `messages` end with the user's."""
        return "".join([segment.text for segment in self.render(messages, "assistant")[0]])

    def chat_template(self) -> str:
        """Return the same template in Jinja, for the tokenizer's `chat_template`."""
        return _in_jinja(self.format, self.bos, self.stop)

    def _system(self, messages: Sequence[Message]) -> tuple[str, int]:
        """Return the rendered system block, and the index of the first message after the system message."""
        own, form = messages[0], self.format
        first = 1 if own.role == "system" else 0
        if first:
            self._check_writable(own)
            text: str | None = own.content.strip() if form.strip and not form.system_in_user else own.content
        else:
            text = form.default_system
            if form.default_system_with_context is not None and own.context is not None:
                text = form.default_system_with_context
        if text is None:
            return "", first
        if self._system_parts is None:
            raise UserError(
                f"template {self.name} has no place for a system message; remove it, or use another template"
            )
        before, after = self._system_parts
        return before + text + after, first

    def _question(self, message: Message, num_round: int, system: str) -> str:
        form, content = self.format, message.content
        if form.strip:
            content = content.strip()
        if form.system_in_user:
            content = system + content
        before, after = self._user_parts
        if "{round}" in before:
            before = before.replace("{round}", str(num_round))
        if message.context is None:
            return before + content + after
        content = content.rstrip(form.strip_before_context)
        if self._context_parts is None:
            return f"{before}{content}\n{message.context}{after}"
        before, between, after = self._context_parts
        return before + content + between + message.context + after

    def _answer(self, message: Message) -> str:
        before, after = self._answer_parts
        return before + (message.content.strip() if self.format.strip else message.content) + after

    def _check_writable(self, message: Message) -> None:
        """Refuse a part of a message that the template would silently leave out."""
        found = [key for key in _UNWRITABLE if message.extras.get(key)]
        if message.tools:
            found.append("tools")
        if message.role == "tool":
            found.append("a tool's result")
        if found:
            raise UserError(
                f"data.template: {self.name} has no place for {', '.join(found)}; use chat_template (the tokenizer's "
                "own) or a .jinja file that writes them"
            )
        if message.role == "text":
            raise UserError(f"data.template: {self.name} is for conversations and cannot write the role 'text'")

    # Split once, not for every message; without `str.format`, because contents contain braces.
    @cached_property
    def _user_parts(self) -> tuple[str, str]:
        return _around(self.format.user)

    @cached_property
    def _answer_parts(self) -> tuple[str, str]:
        before, after = _around(self.format.assistant)
        return before, after + self.stop

    @cached_property
    def _system_parts(self) -> tuple[str, str] | None:
        return None if self.format.system is None else _around(self.format.system)

    @cached_property
    def _context_parts(self) -> tuple[str, str, str] | None:
        if self.format.user_with_context is None:
            return None
        before, rest = _around(self.format.user_with_context)
        between, after = rest.split("{context}")
        return before, between, after


def named_template(name: str, tokens: SpecialTokens) -> NamedTemplate:
    """Return a named template.

    Args:
        name: A key of `TURN_FORMATS`.
        tokens: BOS and EOS of the tokenizer.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in TURN_FORMATS:
        raise one_of("data.template", name, [*TURN_FORMATS, "chat_template", "<file>.jinja"])
    return NamedTemplate(name, TURN_FORMATS[name], tokens)


def _in_jinja(form: TurnFormat, bos: str, stop: str) -> str:
    trim = " | trim" if form.strip else ""
    trim_system = "" if form.system_in_user else trim
    own = f"(messages[0]['content']{trim_system})"
    default = "none" if form.default_system is None else json.dumps(form.default_system)
    block = "''" if form.system is None else _expression(form.system, "system")
    write_system = "" if form.system_in_user else "{{- system_block -}}"
    before_content = "system_block + " if form.system_in_user else ""
    question = _expression(form.user, f"({before_content}(message['content']{trim}))")
    answer = _expression(form.assistant, f"(message['content']{trim})") + " + " + json.dumps(stop + form.trailer)
    return (
        f"{{{{- {json.dumps(bos)} -}}}}"
        f"{{%- set system = {own} if messages[0]['role'] == 'system' else {default} -%}}"
        f"{_refusal_of_system(form)}"
        f"{{%- set system_block = {block} if system is not none else '' -%}}"
        f"{write_system}"
        "{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- if loop.index0 > first -%}}{{%- set system_block = '' -%}}"
        f"{{{{- {json.dumps(form.separator)} -}}}}{{%- endif -%}}"
        f"{{{{- {question} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {answer} -}}}}"
        "{%- elif message['role'] != 'system' -%}"
        "{{- raise_exception('no place for a message of role ' ~ message['role']) -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )


def _refusal_of_system(form: TurnFormat) -> str:
    """Return the Jinja statement that refuses a system text where the template has no place for one."""
    if form.system is not None:
        return ""
    return "{%- if system is not none -%}{{- raise_exception('no place for a system message') -}}{%- endif -%}"


_ROUND = "(messages[:loop.index] | selectattr('role', 'equalto', 'user') | list | length | string)"
"""The number of a user message, from 1."""


def _expression(text: str, content: str) -> str:
    """Return `text` as a Jinja expression, with `content` in the place of `{content}`."""
    before, after = _around(text)
    literal = f" + {_ROUND} + ".join(json.dumps(part) for part in before.split("{round}"))
    return f"{literal} + {content} + {json.dumps(after)}"


def _around(text: str) -> tuple[str, str]:
    """Return the text before and after `{content}`."""
    before, after = text.split("{content}")
    return before, after
