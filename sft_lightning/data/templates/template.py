"""What a template is: it turns messages into text segments, each supervised or not.

Conversations have two kinds of templates: *named* templates (`named`), written down as data in `turn_formats`, and
*Jinja* templates (`jinja`), the tokenizer's own `chat_template` or a user's `.jinja` file. Both render exactly what is
served: a named template exports itself as a chat template, and a Jinja template renders the generation prompt of
every answer, so that the supervised part is what the model must write after that prompt, up to and including the stop
token. Plain documents have a template of their own, `DocumentTemplate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sft_lightning.types import LossOn, Message, Segment


class SpecialTokens(NamedTuple):
    """The tokenizer's special tokens that templates use, as text."""

    bos: str
    """Beginning of sequence; empty if the tokenizer does not put one before a text."""

    eos: str
    """End of sequence; empty if the tokenizer has none."""


class Template(Protocol):
    """Renders conversations for training and for serving."""

    @property
    def name(self) -> str:
        """The name in messages: that of `data.template`."""

    @property
    def stop(self) -> str:
        """The stop token: the token that ends an answer, as text."""

    @property
    def stops(self) -> tuple[str, ...]:
        """All tokens that may end an answer, `stop` first: some templates end a tool call with another token."""

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return the training texts of a conversation: one, unless the template rewrites earlier messages.

        Args:
            messages: The conversation.
            loss_on: Which messages are supervised.
        """

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which the model writes the next answer; `messages` end with the user's."""


@dataclass(frozen=True)
class DocumentTemplate:
    """Plain text between the tokenizer's BOS and EOS: `text`, `prompt_completion`, `segments`, and pretraining."""

    tokens: SpecialTokens
    """BOS and EOS of the tokenizer."""

    name: str = "text"
    """The name in messages."""

    @property
    def stop(self) -> str:
        """The tokenizer's EOS."""
        return self.tokens.eos

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokenizer's EOS alone."""
        return (self.stop,)

    def render(self, messages: Sequence[Message], loss_on: LossOn) -> list[list[Segment]]:
        """Return BOS, the contents one after the other, and EOS.

        Args:
            messages: The pieces of the document.
            loss_on: Which pieces are supervised.
        """
        segments = [Segment(self.tokens.bos, False)] if self.tokens.bos else []
        for message, train in zip(messages, supervision(messages, loss_on), strict=True):
            segments.append(Segment(message.content, train, message.weight))
        segments[-1] = segments[-1]._replace(text=segments[-1].text + self.tokens.eos)
        return [segments]

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """Return BOS and the contents, for the model to continue."""
        return self.tokens.bos + "".join(message.content for message in messages)


def supervision(messages: Sequence[Message], loss_on: LossOn) -> list[bool]:
    """Return for each message whether it is supervised: its own `train` if set, else what `loss_on` says of its role.

    Args:
        messages: The conversation, or the pieces of a document. The last piece is supervised with every `loss_on`.
        loss_on: Which messages are supervised.
    """
    chosen = [loss_on == "all" or message.role == "assistant" for message in messages]
    if loss_on == "last_turn" and any(chosen):
        last = len(chosen) - 1 - chosen[::-1].index(True)
        chosen = [i == last for i in range(len(chosen))]
    if not any(chosen) and messages[-1].role == "text":
        chosen[-1] = True  # a document, or the completion after its prompt
    return [flag if message.train is None else message.train for flag, message in zip(chosen, messages, strict=True)]
