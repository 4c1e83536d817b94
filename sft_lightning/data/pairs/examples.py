"""Records with a chosen and a rejected answer → two examples each, the chosen one first.

The messages that both conversations have in common are the prompt, which has no loss. A pair is kept or dropped as a
whole, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from sft_lightning.data.formats.deepspeed_chat import DATASETS
from sft_lightning.data.formats.fields import Malformed, malformed, read_weight
from sft_lightning.data.formats.message_order import repair_order
from sft_lightning.data.formats.preference import preference_pair
from sft_lightning.data.formats.registry import find_format
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message, Record, Segment

PairHistory = Literal["own", "chosen"]
"""The messages before a rejected answer: its `own`, or those of the `chosen` conversation, as in Firefly."""


class Pair(NamedTuple):
    """Two conversations with the same prompt; `train` of each message says whether it is supervised."""

    chosen: list[Message]
    """The conversation with the better answer."""

    rejected: list[Message]
    """The conversation with the worse answer."""


def make_pair(
    record: Record, *, history: PairHistory = "own", loss_on: LossOn = "assistant", repairs: Counter[str] | None = None
) -> Pair:
    """Return the two conversations of a record, with their answers supervised.

    Args:
        record: The record.
        history: The messages before the rejected answer.
        loss_on: `assistant`: every answer from the first message that differs; `last_turn`: the last answer.
        repairs: Counts what was repaired; see `message_order.repair_order`.

    Raises:
        Malformed: If the record has no pair, its messages are out of order, or its answers have different prompts or
            are the same.
    """
    chosen, rejected = (repair_order(record, turns, repairs=repairs) for turns in preference_pair(record))
    if history == "chosen":
        # Firefly (component/dataset.py): every turn but the last is taken from `chosen`.
        rejected = [*chosen[:-1], rejected[-1]]
    parting = _first_difference(chosen, rejected)
    if parting == len(chosen) == len(rejected):
        raise Malformed(f"{record.location}: both answers are the same, so neither is preferred", "same_answers")
    firsts = {turns[parting].role for turns in (chosen, rejected) if parting < len(turns)}
    if firsts != {"assistant"} or parting in (len(chosen), len(rejected)):
        raise malformed(
            record,
            f"the conversations first differ at message {parting}, which is not an answer, so their answers have "
            "different prompts",
            "different_prompts",
            remedy="set data.pair_history: chosen to put both answers after the chosen one's messages",
        )
    weight = read_weight(record, record.fields)
    return Pair(*(_supervise(turns, parting, weight, loss_on) for turns in (chosen, rejected)))


def _first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the first message in which two conversations differ."""
    same = [_content(one) == _content(other) for one, other in zip(chosen, rejected, strict=False)]
    return same.index(False) if False in same else len(same)


def _content(turn: Message) -> tuple[object, ...]:
    return turn.role, turn.content, turn.context, dict(turn.extras)


def _supervise(turns: Sequence[Message], first: int, weight: float, loss_on: LossOn) -> list[Message]:
    """Supervise the answers from a message on, except those whose `train` is false."""
    answers = [i for i in range(first, len(turns)) if turns[i].role == "assistant"]
    if loss_on == "last_turn":
        answers = answers[-1:]
    return [
        replace(turn, train=i in answers and turn.train is not False, weight=weight * turn.weight)
        for i, turn in enumerate(turns)
    ]


@dataclass(frozen=True, kw_only=True)
class PairBuilder(ExampleBuilder):
    """Makes two examples from each record, the chosen one first."""

    history: PairHistory = "own"
    """The messages before the rejected answer."""

    def format_of(self, record: Record, configured: str | None, path: str = "") -> str:
        """Return the format of a source, which must be `preference`.

        Args:
            record: A record of the source.
            configured: `format` in the YAML.
            path: `path` in the YAML.

        Raises:
            UserError: If it is another format.
        """
        name = find_format(configured, record, path)
        if configured is None and name in DATASETS and "rejected" in record.fields:
            return "preference"  # it has the keys of `preference`; the format of the dataset has no template
        if name != "preference":
            raise UserError(
                f"data.sources.{record.source}.format: {name!r} has no pairs of answers, which task: dpo "
                "needs; use data with `chosen` and `rejected` (format: preference), or task: sft"
            )
        return name

    def messages_of(
        self, record: Record, format_name: str, repairs: Counter[str] | None = None
    ) -> dict[str, Sequence[Message]]:
        """Return the `chosen` and the `rejected` conversation of a record.

        Args:
            record: The record.
            format_name: The source's format; always `preference`.
            repairs: Counts what was repaired in the record.

        Raises:
            Malformed: If the record has no pair.
        """
        return dict(make_pair(record, history=self.history, loss_on=self.loss_on, repairs=repairs)._asdict())

    def render(self, record: Record, messages: Sequence[Message]) -> list[list[Segment]]:
        """Render one conversation of a pair, which must be one example.

        Args:
            record: The record that it comes from, for messages.
            messages: The conversation.

        Raises:
            Malformed: If the template renders it as several examples.
            UserError: If the template refuses the conversation.
        """
        rendered = super().render(record, messages)
        if len(rendered) > 1:
            raise malformed(
                record,
                f"template {self.template.name} renders this conversation as {len(rendered)} examples, but task: dpo "
                "compares one example with one other",
                "rewritten_pair",
                remedy="set data.loss_on: last_turn",
            )
        return rendered
