"""Messages → text segments, each supervised or not.

Two kinds: *named* templates, written down as data (`turn_formats`), and *Jinja* templates (the tokenizer's own
`chat_template` or a user's `.jinja` file). Both render exactly what is served: a named template exports itself as a
chat template, and a Jinja template is asked for the generation prompt of every turn, so that the supervised part is
what the model has to write after that prompt, up to and including the stop token. Plain documents have neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sft_lightning.data.templates.jinja import JinjaTemplate, jinja_template
from sft_lightning.data.templates.named import NamedTemplate, SpecialTokens, named_template
from sft_lightning.data.templates.supervision import supervision
from sft_lightning.types import LossOn, Message, Segment

__all__ = [
    "DocumentTemplate",
    "JinjaTemplate",
    "NamedTemplate",
    "SpecialTokens",
    "Template",
    "jinja_template",
    "named_template",
    "supervision",
]


class Template(Protocol):
    """Renders conversations for training and for serving."""

    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> str:
        """The token that ends an answer, as text."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Every token that may end an answer, `stop` first: some templates end a call of a tool with another one."""

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return the training texts of a conversation: one, unless the template rewrites earlier turns."""

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes the next answer; `messages` end with the user's turn."""


@dataclass(frozen=True)
class DocumentTemplate:
    """Plain text between the tokenizer's BOS and EOS: `text`, `prompt_completion`, `segments`, and pretraining."""

    tokens: SpecialTokens
    name: str = "text"

    @property
    def stop(self) -> str:
        return self.tokens.eos

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        segments = [Segment(self.tokens.bos, False)] if self.tokens.bos else []
        for message, train in zip(messages, supervision(messages, loss_on), strict=True):
            segments.append(Segment(message.content, train, message.weight))
        segments[-1] = segments[-1]._replace(text=segments[-1].text + self.tokens.eos)
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        return self.tokens.bos + "".join(message.content for message in messages)
