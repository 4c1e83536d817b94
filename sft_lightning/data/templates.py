"""Messages → text segments, each supervised or not.

Two kinds: *named* templates, written down here as data, and *Jinja* templates (the tokenizer's own `chat_template`
or a user's `.jinja` file). Both render exactly what is served: a named template exports itself as a chat template, and
a Jinja template is asked for the generation prompt of every turn, so that the supervised part is what the model has to
write after that prompt, up to and including the stop token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sft_lightning.data.turn_formats import TURN_FORMATS, TurnFormat
from sft_lightning.errors import UserError, one_of
from sft_lightning.types import LossOn, Message, Segment


class SpecialTokens(NamedTuple):
    """The tokenizer's tokens that templates speak of, as text."""

    bos: str
    """Beginning of sequence; empty if the tokenizer puts none before a text."""

    eos: str
    """End of sequence."""


class Template(Protocol):
    """Renders conversations for training and for serving."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> str:
        """The token that ends an answer, as text."""

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return the training texts of a conversation: one, unless the template rewrites earlier turns."""

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes the next answer; `messages` end with the user's turn."""


def supervision(messages: Sequence[Message], loss_on: LossOn) -> list[bool]:
    """Return for each message whether it is supervised: its own `train`, else what `loss_on` says of its role."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    documents = [i for i, message in enumerate(messages) if message.role == "text"]
    chosen = {"all": range(len(messages)), "assistant": answers, "last_turn": answers[-1:]}[loss_on] or documents
    return [(i in chosen) if message.train is None else message.train for i, message in enumerate(messages)]


@dataclass(frozen=True)
class NamedTemplate:
    """A `TurnFormat` bound to a tokenizer's special tokens."""

    name: str
    format: TurnFormat
    tokens: SpecialTokens

    @property
    def stop(self) -> str:
        return self.format.stop.replace("{eos}", self.tokens.eos)

    @property
    def _bos(self) -> str:
        return self.format.bos.replace("{bos}", self.tokens.bos)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Render a conversation as one training text.

        Raises:
            UserError: If it has a system message and the template has no place for one.
        """
        system, turns = self._system(messages)
        flags = supervision(messages, loss_on)
        own_system, supervised = flags[: len(messages) - len(turns)], flags[len(messages) - len(turns) :]
        segments = [Segment(self._bos, False)] if self._bos else []
        if system and not self.format.system_in_user:
            train, weight = (own_system[0], messages[0].weight) if own_system else (loss_on == "all", 1.0)
            segments.append(Segment(system, train, weight))
        for i, (message, train) in enumerate(zip(turns, supervised, strict=True)):
            if message.role == "assistant":
                text, trailer = self._answer(message), self.format.trailer
            else:
                text, trailer = self._question(message, system if i == 0 else ""), ""
            separator = self.format.separator if i > 0 and message.role == "user" else ""
            segments.append(Segment(separator + text, train, message.weight))
            if trailer:
                segments.append(Segment(trailer, loss_on == "all"))
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        return "".join(segment.text for segment in self.render(messages, "assistant")[0])

    def chat_template(self) -> str:
        """Return the same template in Jinja, as a tokenizer's `chat_template`: what is served is what was trained."""
        form = self.format
        trim = " | trim" if form.strip else ""
        default = "none" if form.default_system is None else json.dumps(form.default_system)
        block = "''" if form.system is None else " + ".join(_around(form.system, "system"))
        before_system, after_system = (
            ("", "{{- system_block -}}") if not form.system_in_user else ("system_block + ", "")
        )
        question = _around(form.user, f"({before_system}(message['content']{trim}))")
        answer = [*_around(form.assistant, f"message['content']{trim}"), json.dumps(self.stop + form.trailer)]
        return (
            f"{{{{- {json.dumps(self._bos)} -}}}}"
            f"{{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else {default} -%}}"
            f"{{%- set system_block = {block} if system is not none else '' -%}}"
            f"{after_system}"
            "{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{{%- if loop.index0 > first -%}}{{%- set system_block = '' -%}}"
            f"{{{{- {json.dumps(form.separator)} -}}}}{{%- endif -%}}"
            f"{{{{- {' + '.join(question)} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{- {' + '.join(answer)} -}}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
        )

    def _system(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        """Return the rendered system block, and the turns after it."""
        has_own = messages[0].role == "system"
        turns = messages[1:] if has_own else messages
        text = messages[0].content if has_own else self.format.default_system
        if not has_own and turns and turns[0].context is not None:
            text = self.format.default_system_with_context or text
        if text is None:
            return "", turns
        if self.format.system is None:
            raise UserError(
                f"template {self.name} has no place for a system message; remove it, or use another template"
            )
        return _fill(self.format.system, text), turns

    def _question(self, message: Message, system: str) -> str:
        content = message.content.strip() if self.format.strip else message.content
        before_content = system if self.format.system_in_user else ""
        if message.context is None:
            return _fill(self.format.user, before_content + content)
        content = before_content + content.rstrip(self.format.strip_before_context)
        if self.format.user_with_context is None:
            return _fill(self.format.user, f"{content}\n{message.context}")
        before, after = self.format.user_with_context.split("{context}")
        return _fill(before, content) + message.context + after

    def _answer(self, message: Message) -> str:
        content = message.content.strip() if self.format.strip else message.content
        return _fill(self.format.assistant, content) + self.stop


@dataclass(frozen=True)
class JinjaTemplate:
    """The tokenizer's own `chat_template`, or a user's `.jinja` file.

    No `{% generation %}` tags are needed. For every supervised answer, the template itself is asked for the generation
    prompt before it and for the conversation up to it; the difference is what the model has to write.
    """

    name: str
    apply: Callable[[list[dict[str, str]], bool], str]
    """(messages, add_generation_prompt) → text."""

    stop: str
    """The token that ends an answer."""

    trailer: str
    """What the template writes after the stop token of every answer, such as a line feed; never supervised."""

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Render a conversation; a turn that later turns rewrite becomes a training text of its own.

        Raises:
            UserError: If the template refuses the conversation, or its generation prompt does not lead to its answers.
        """
        dicts = _as_dicts(messages)
        whole = self.apply(dicts, False)
        if loss_on == "all":
            if any(message.train is not None or message.weight != 1.0 for message in messages):
                raise UserError(
                    f"`train` and `weight` of a message do not go with loss_on: all and template {self.name}"
                )
            return [[Segment(whole, True)]]
        supervised = supervision(messages, loss_on)
        segments: list[Segment] = []
        rewritten: list[list[Segment]] = []
        position = 0
        for i, message in enumerate(messages):
            if not supervised[i]:
                continue
            if message.role != "assistant":
                raise UserError(f"`train: true` on a {message.role} turn needs a named template, not {self.name}")
            prompt, answer = self._answer(dicts, i)
            if whole.startswith(prompt + answer):
                segments.append(Segment(whole[position : len(prompt)], False))
                segments.append(Segment(answer, True, message.weight))
                position = len(prompt) + len(answer)
            else:
                rewritten.append([Segment(prompt, False), Segment(answer, True, message.weight)])
        if segments:
            rewritten.append([*segments, Segment(whole[position:], False)])
        return rewritten or [[Segment(whole, False)]]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        return self.apply(_as_dicts(messages), True)

    def _answer(self, dicts: list[dict[str, str]], turn: int) -> tuple[str, str]:
        """Return (generation prompt, answer with its stop token) of the assistant turn at index `turn`."""
        prompt = self.apply(dicts[:turn], True)
        up_to = self.apply(dicts[: turn + 1], False)
        if not up_to.startswith(prompt):
            raise UserError(
                f"template {self.name}: the generation prompt of turn {turn} ({prompt[-40:]!r}) is not how the "
                "template renders the turn itself, so the model would be served something else; fix the template"
            )
        answer = up_to[len(prompt) :]
        if not answer.endswith(self.stop + self.trailer):
            raise UserError(
                f"template {self.name}: the answer of turn {turn} does not end with {self.stop + self.trailer!r} "
                f"but with {answer[-20:]!r}"
            )
        return prompt, answer[: len(answer) - len(self.trailer)]


@dataclass(frozen=True)
class DocumentTemplate:
    """Plain text between the tokenizer's BOS and EOS: `text`, `prompt_completion`, `segments`, and pretraining."""

    tokens: SpecialTokens
    name: str = "text"

    @property
    def stop(self) -> str:
        return self.tokens.eos

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        segments = [Segment(self.tokens.bos, False)] if self.tokens.bos else []
        for message, train in zip(messages, supervision(messages, loss_on), strict=True):
            segments.append(Segment(message.content, train, message.weight))
        segments[-1] = segments[-1]._replace(text=segments[-1].text + self.tokens.eos)
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        return self.tokens.bos + "".join(message.content for message in messages)


def named_template(name: str, tokens: SpecialTokens) -> NamedTemplate:
    """Return the named template.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in TURN_FORMATS:
        raise one_of("data.template", name, [*TURN_FORMATS, "chat_template", "<file>.jinja"])
    return NamedTemplate(name, TURN_FORMATS[name], tokens)


def jinja_template(
    name: str, apply: Callable[[list[dict[str, str]], bool], str], special_tokens: Iterable[str]
) -> JinjaTemplate:
    """Return a Jinja template after asking it, on a probe, how it ends an answer.

    Args:
        name: How messages call it.
        apply: (messages, add_generation_prompt) → text.
        special_tokens: The tokenizer's special tokens, as text; the stop token is one of them.

    Raises:
        UserError: If no special token follows the answer: nothing would teach the model to stop.
    """
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    after = apply([question, answer], False).rpartition("answer")[2]
    for token in sorted(special_tokens, key=len, reverse=True):
        if token and after.lstrip().startswith(token):
            trailer = after.lstrip()[len(token) :]
            return JinjaTemplate(name, apply, token, trailer)
    raise UserError(
        f"data.template: {name} writes {after!r} after an answer, which does not begin with a special token of the "
        "tokenizer, so the model could not learn to stop; use a template that ends answers with one"
    )


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": _with_context(message)} for message in messages]


def _with_context(message: Message) -> str:
    return message.content if message.context is None else f"{message.content}\n{message.context}"


def _around(text: str, expression: str) -> list[str]:
    """Return `text` with `{content}` as Jinja: the expression between two string literals."""
    before, after = text.split("{content}")
    return [json.dumps(before), expression, json.dumps(after)]


def _fill(text: str, content: str) -> str:
    # Not `str.format`: contents hold braces.
    before, after = text.split("{content}")
    return before + content + after
