"""In which order turns may come, and the repairs that are made, counted, where they come otherwise.

An assistant turn is empty without text, tool calls and reasoning.

| what | policy | counted as |
|---|---|---|
| turns before the first user turn, but the system's | left out | repair `leading_answer` |
| user turns at the end | left out unless `train: true`; kept in questions to predict on | repair `trailing_user` |
| an empty user turn | kept | repair `empty_turn` |
| an empty assistant turn | kept as context, unsupervised unless `train: true` | repair `empty_turn` |
| two user turns, or two assistant turns, in a row | refused | `consecutive_turns` |
| a system turn that is not the first | refused | `misplaced_system` |
| a tool turn that follows neither an assistant turn nor a tool turn | refused | `misplaced_tool` |
| no user turn at all | refused | `no_question` |
| nothing to learn: no assistant turn, or only empty ones | refused | `no_answer` |

A user turn may follow a tool turn. What is refused raises `Malformed`; `data.malformed` says what becomes of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sft_lightning.data.formats.fields import malformed
from sft_lightning.types import Message, Record, Role

_WHOSE: dict[Role, str] = {"user": "the user's", "assistant": "the assistant's"}


def settle(
    record: Record, turns: list[Message], *, answered: bool = True, repairs: Counter[str] | None = None
) -> list[Message]:
    """Repair what may be repaired and refuse the rest; documents (role `text`) pass as they are.

    Args:
        record: The row, for messages.
        turns: Its turns as they stand.
        answered: Whether there must be an answer to learn from; a question to predict on need not have one.
        repairs: Counts each repaired turn by its code, for records that are not refused.

    Raises:
        Malformed: With the reason, for what the module's table refuses.
    """
    if _is_in_order(turns) or (turns and all(turn.role == "text" for turn in turns)):
        return turns
    if any(turn.role == "text" for turn in turns):
        raise malformed(record, "a document and turns of a conversation do not go together in one record")
    kept = _from_first_question(record, turns)
    num_leading = len(turns) - len(kept)
    _check_order(record, kept, num_leading)
    num_settled = len(kept)
    while answered and kept and kept[-1].role == "user" and kept[-1].train is not True:
        kept = kept[:-1]
    num_trailing = num_settled - len(kept)
    empty = [i for i, turn in enumerate(kept) if turn.role in ("user", "assistant") and is_empty(turn)]
    if answered and not any(_teaches(turn, i in empty) for i, turn in enumerate(kept)):
        raise malformed(record, _nothing_to_learn(kept), "no_answer")
    for i in empty:
        if kept[i].role == "assistant" and kept[i].train is None:
            kept[i] = replace(kept[i], train=False)
    if repairs is not None:
        counts = {"leading_answer": num_leading, "trailing_user": num_trailing, "empty_turn": len(empty)}
        repairs.update({code: count for code, count in counts.items() if count})
    return kept


_ALTERNATING: tuple[Role, Role] = ("user", "assistant")


def _is_in_order(turns: list[Message]) -> bool:
    """Whether there is nothing to repair or refuse; most records are so, and this is quick to see."""
    first = 1 if turns and turns[0].role == "system" else 0
    if len(turns) == first or (len(turns) - first) % 2:
        return False
    for number in range(first, len(turns)):
        turn = turns[number]
        if turn.role != _ALTERNATING[(number - first) % 2] or not turn.content or turn.content.isspace():
            return False
    return True


def is_empty(turn: Message) -> bool:
    """Whether the turn holds nothing but white space: no text, tool call or reasoning."""
    return not (
        turn.content.strip() or turn.context or turn.extras.get("tool_calls") or turn.extras.get("reasoning_content")
    )


def _teaches(turn: Message, empty: bool) -> bool:
    # A turn that says `train: false` itself is the user's will, not a broken record: it is counted after tokenization.
    return turn.train is True or (turn.role == "assistant" and not empty)


def _nothing_to_learn(turns: list[Message]) -> str:
    if any(turn.role == "assistant" for turn in turns):
        return "every assistant turn is empty, so there is nothing to learn"
    return "no assistant turn after a question, so nothing to learn"


def _from_first_question(record: Record, turns: list[Message]) -> list[Message]:
    """Leave out what comes before the first user turn, but the system's; the tools stay with what is then first."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise malformed(record, "no user turn, so there is nothing that an answer could answer", "no_question")
    kept = [turn for turn in turns[:first] if turn.role == "system"] + turns[first:]
    if turns[0].tools and not kept[0].tools:
        kept[0] = replace(kept[0], tools=turns[0].tools)
    return kept


def _check_order(record: Record, turns: list[Message], num_left_out: int) -> None:
    previous: Role | None = None
    for number, turn in enumerate(turns, start=num_left_out):
        if turn.role == "system" and previous is not None:
            said = f"turn {number} is a system turn; it must be the first"
            raise malformed(record, said, "misplaced_system")
        if turn.role == "tool" and previous not in ("assistant", "tool"):
            said = f"turn {number} is what a tool answers, but turn {number - 1} is not the assistant's call of it"
            raise malformed(record, said, "misplaced_tool")
        if turn.role == previous and turn.role in _WHOSE:
            said = f"turns {number - 1} and {number} are both {_WHOSE[turn.role]}; join them"
            raise malformed(record, said, "consecutive_turns")
        previous = turn.role
