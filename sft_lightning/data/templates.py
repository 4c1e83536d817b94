"""Messages → text segments, each supervised or not.

Two kinds: *named* templates, written down here as data, and *Jinja* templates (the tokenizer's own `chat_template`
or a user's `.jinja` file). Both render exactly what is served: a named template exports itself as a chat template, and
a Jinja template is asked for the generation prompt of every turn, so that the supervised part is what the model has to
write after that prompt, up to and including the stop token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


@dataclass(frozen=True, kw_only=True)
class TurnFormat:
    """A named template as data. `{content}` stands for the message, `{context}` for Alpaca's `input`."""

    system: str
    user: str
    assistant: str
    """The answer as written after the user's turn, without the stop token."""

    stop: str
    """The stop token; `{eos}` for the tokenizer's own."""

    default_system: str | None = None
    """System text of a conversation that brings none; `None`: no system block at all."""

    default_system_with_context: str | None = None
    user_with_context: str | None = None
    """The user's turn with a `context`; without one, the context follows the content on a line of its own."""

    separator: str = ""
    """Between a stop token and the next user turn."""


TURN_FORMATS: Mapping[str, TurnFormat] = {
    # FastChat `vicuna_v1.1` (fastchat/conversation.py, ADD_COLON_TWO): no space between `</s>` and the next `USER:`.
    "vicuna_v1.1": TurnFormat(
        system="{content} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
        user="USER: {content} ASSISTANT:",
        assistant=" {content}",
        stop="</s>",
    ),
    # Stanford Alpaca (train.py PROMPT_DICT): nothing between `### Response:` and the answer.
    "alpaca": TurnFormat(
        system="{content}\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.",
        default_system_with_context="Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.",
        user="### Instruction:\n{content}\n\n### Response:",
        user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n### Response:",
        assistant="{content}",
        stop="{eos}",
        separator="\n\n",
    ),
}


@dataclass(frozen=True)
class NamedTemplate:
    """A `TurnFormat` bound to a tokenizer's special tokens."""

    name: str
    format: TurnFormat
    tokens: SpecialTokens

    @property
    def stop(self) -> str:
        return self.format.stop.replace("{eos}", self.tokens.eos)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Render a conversation as one training text.

        Raises:
            UserError: If the conversation does not start with a question.
        """
        supervised = supervision(messages, loss_on)
        segments = [Segment(self.tokens.bos, False)] if self.tokens.bos else []
        if messages[0].role != "system":
            segments += self._default_system(messages[0], loss_on)
        for i, (message, train) in enumerate(zip(messages, supervised, strict=True)):
            separator = self.format.separator if i > 0 and messages[i - 1].role == "assistant" else ""
            segments.append(Segment(separator + self._turn(message), train, message.weight))
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        return "".join(segment.text for segment in self.render(messages, "assistant")[0])

    def chat_template(self) -> str:
        """Return the same template in Jinja, as a tokenizer's `chat_template`: what is served is what was trained."""
        system, user = (
            [json.dumps(part) for part in text.split("{content}")] for text in (self.format.system, self.format.user)
        )
        before, after = self.format.assistant.split("{content}")
        prefix, stop = json.dumps(before), json.dumps(after + self.stop)
        default = "none" if self.format.default_system is None else json.dumps(self.format.default_system)
        return (
            f"{{{{- {json.dumps(self.tokens.bos)} -}}}}"
            f"{{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else {default} -%}}"
            f"{{%- if system is not none -%}}{{{{- {system[0]} + system + {system[1]} -}}}}{{%- endif -%}}"
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'user' -%}"
            "{%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}"
            f"{{{{- {json.dumps(self.format.separator)} -}}}}"
            "{%- endif -%}"
            f"{{{{- {user[0]} + message['content'] + {user[1]} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{- {prefix} + message['content'] + {stop} -}}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
        )

    def _default_system(self, first: Message, loss_on: LossOn) -> list[Segment]:
        text = self.format.default_system
        if first.context is not None:
            text = self.format.default_system_with_context or text
        return [] if text is None else [Segment(_fill(self.format.system, text), loss_on == "all")]

    def _turn(self, message: Message) -> str:
        if message.role == "system":
            return _fill(self.format.system, message.content)
        if message.role == "assistant":
            return _fill(self.format.assistant, message.content) + self.stop
        if message.context is not None and self.format.user_with_context is not None:
            before, after = self.format.user_with_context.split("{context}")
            return _fill(before, message.content) + message.context + after
        return _fill(self.format.user, _with_context(message))


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


def _fill(text: str, content: str) -> str:
    # Not `str.format`: contents hold braces.
    before, after = text.split("{content}")
    return before + content + after
