"""Jinja templates: the tokenizer's own `chat_template`, or a user's `.jinja` file.

No `{% generation %}` tags are needed. For every supervised answer, the template renders the generation prompt before
the answer and the conversation up to and including it; the difference is what the model must write. This is correct
whatever a template does with tools, thoughts and earlier messages. n answers cost 2n renderings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_lightning.data.templates.template import supervision
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import ApplyTemplate, Chat, answer_ending, content_parts
from sft_lightning.types import LossOn, Message, Segment

_THOUGHT_TAG = re.compile("</?think>")


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template in Jinja."""

    name: str
    """The name in messages: that of `data.template`."""

    apply: ApplyTemplate
    """Renders a conversation: (messages, add_generation_prompt, tools) → text."""

    stop: str
    """The stop token: the token that ends an answer, as text."""

    trailer: str
    """Text that the template writes after the stop token of every answer, such as a line feed; never supervised."""

    call_stops: tuple[str, ...] = ()
    """Other tokens that may end a message with tool calls, such as Llama 3.1's `<|eom_id|>`."""

    typed_parts: bool = False
    """Whether the template reads contents as lists of typed parts only, as some multimodal ones do."""

    @property
    def stops(self) -> tuple[str, ...]:
        """All tokens that may end an answer, `stop` first."""
        return (self.stop, *self.call_stops)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return the training texts of a conversation.

        An answer that the template rewrites once other messages follow gets a training text of its own.

        Args:
            messages: The conversation.
            loss_on: Which messages are supervised.

        Raises:
            UserError: If the template refuses the conversation or leaves out a part of it, or if its generation prompt
                is not the beginning of its answers.
        """
        chat, tools = self.chat(messages), messages[0].tools
        whole = self.apply(chat, False, tools)
        if tools and whole == self.apply(chat, False, ()):
            raise self._leaves_out("the tools")
        if loss_on == "all":
            return [self._all_of(messages, whole)]
        segments: list[Segment] = []
        rewritten: list[list[Segment]] = []
        position = 0
        for i, (message, supervised) in enumerate(zip(messages, supervision(messages, loss_on), strict=True)):
            if not supervised:
                self._check_shown(i, message, whole, thoughts=False)
                continue
            if message.role != "assistant":
                raise self._untrainable(message)
            prompt = self.apply(chat[:i], True, tools)
            up_to = whole if i == len(chat) - 1 else self.apply(chat[: i + 1], False, tools)
            answer = self._answer(i, message, prompt, up_to)
            self._check_shown(i, message, answer, thoughts=True)
            supervised_part = Segment(answer, True, message.weight)
            if len(prompt) >= position and whole.startswith(prompt) and whole.startswith(answer, len(prompt)):
                segments += [Segment(whole[position : len(prompt)], False), supervised_part]
                position = len(prompt) + len(answer)
            else:
                rewritten.append([Segment(prompt, False), supervised_part])
        if segments:
            rewritten.append([*segments, Segment(whole[position:], False)])
        return rewritten or [[Segment(whole, False)]]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes the next answer; `messages` end with the user's."""
        return self.apply(self.chat(messages), True, messages[0].tools)

    def chat(self, messages: Sequence[Message]) -> Chat:
        """Return the messages as the template reads them."""
        return [self._as_dict(message) for message in messages]

    def _as_dict(self, message: Message) -> dict[str, Any]:
        content = content_parts(_content(message), typed=self.typed_parts)
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.extras:
            turn |= {key: value for key, value in message.extras.items() if value is not None}
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]  # the key that gpt-oss's template reads
        return turn

    def _all_of(self, messages: Sequence[Message], whole: str) -> list[Segment]:
        if any(message.train is not None or message.weight != 1.0 for message in messages):
            raise UserError(
                f"data.loss_on: all does not support `train` and `weight` of messages with the template {self.name}; "
                "remove them from the records, or set data.loss_on: assistant"
            )
        for i, message in enumerate(messages):
            self._check_shown(i, message, whole, thoughts=False)
        return [Segment(whole, True)]

    def _answer(self, index: int, message: Message, prompt: str, up_to: str) -> str:
        """Return what the model must write after `prompt`, up to and including the stop token."""
        if not up_to.startswith(prompt):
            raise UserError(
                f"template {self.name}: the generation prompt of message {index} ({prompt[-40:]!r}) is not the "
                "beginning of the message as the template renders it, so training and serving would differ; fix the "
                "template"
            )
        ending = self.stop + self.trailer
        if up_to.endswith(ending) and len(up_to) >= len(prompt) + len(ending):
            return up_to[len(prompt) : len(up_to) - len(self.trailer)]
        answer = up_to[len(prompt) :].rstrip()
        if message.extras.get("tool_calls") and answer.endswith(self.stops):
            return answer
        raise UserError(
            f"template {self.name}: the answer in message {index} does not end with {ending!r} but with "
            f"{up_to[len(prompt) :][-20:]!r}; fix the template"
        )

    def _check_shown(self, index: int, message: Message, text: str, *, thoughts: bool) -> None:
        """Refuse a template that leaves out a part of a message, which would silently train something else.

        Args:
            index: The message's index.
            message: The message.
            text: The text that must contain it: the conversation, or the answer itself if it is supervised.
            thoughts: Whether the text must contain its thoughts; templates leave out those of earlier messages.
        """
        content = _content(message)
        pieces = [content]
        if "</think>" in content:
            pieces = _THOUGHT_TAG.split(content) if thoughts else [content.rpartition("</think>")[2]]
        if any(not _shown(piece, text) for piece in pieces):
            raise self._leaves_out(f"{content[:60]!r}, the content of message {index} ({message.role})")
        if not message.extras:
            return
        if thoughts and not _shown(message.extras.get("reasoning_content") or "", text):
            raise self._leaves_out(f"`reasoning_content` of message {index}")
        for call in message.extras.get("tool_calls") or ():
            if not _shown(call["function"]["name"], text):
                raise self._leaves_out(f"the call of {call['function']['name']!r} in message {index}")

    def _leaves_out(self, what: str) -> UserError:
        return UserError(
            f"data.template: {self.name} leaves out {what}; use a template that writes it (a .jinja file), or remove "
            "it from the data"
        )

    def _untrainable(self, message: Message) -> UserError:
        if message.role == "tool":
            return UserError(
                "`train: true` on a tool message: the model does not write the results of tools; remove it"
            )
        return UserError(f"`train: true` on a {message.role} message requires a named template (got {self.name})")


def jinja_template(
    name: str, apply: ApplyTemplate, added_tokens: Iterable[str], call_stops: Iterable[str] = ()
) -> JinjaTemplate:
    """Return a Jinja template; it renders a short conversation to see how it reads contents and ends an answer.

    Args:
        name: The name in messages.
        apply: Renders a conversation: (messages, add_generation_prompt, tools) → text.
        added_tokens: The tokenizer's added tokens, as text; the stop token must be one of them.
        call_stops: The added tokens that may end a message with tool calls.

    Raises:
        UserError: If the template leaves out the contents, or if no added token follows the answer.
    """
    ending = answer_ending(name, apply, added_tokens)
    others = tuple(stop for stop in call_stops if stop != ending.stop)
    return JinjaTemplate(name, apply, ending.stop, ending.trailer, others, ending.typed_parts)


def _content(message: Message) -> str:
    return message.content if message.context is None else f"{message.content}\n{message.context}"


def _shown(piece: str, text: str) -> bool:
    """Whether a text contains a piece, without the white space around it, as it is or as JSON writes it."""
    piece = piece.strip()
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text
