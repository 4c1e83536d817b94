"""The order in which messages may come, and what is repaired, and counted, where they come in another.

An assistant message is empty if it has no text, no tool calls and no reasoning.

| what | what happens | counted as |
|---|---|---|
| messages before the first user message, except the system message | left out | repair `leading_answer` |
| user messages at the end | left out unless `train: true`; kept in questions to predict on | repair `trailing_user` |
| an empty user message | kept | repair `empty_turn` |
| an empty assistant message | kept as context, unsupervised unless `train: true` | repair `empty_turn` |
| two user messages, or two assistant messages, in a row | refused | `consecutive_turns` |
| a system message that is not the first message | refused | `misplaced_system` |
| a tool message that follows neither an assistant message nor a tool message | refused | `misplaced_tool` |
| no user message | refused | `no_question` |
| nothing to learn: no assistant message, or only empty ones | refused | `no_answer` |

A user message may follow a tool message. A refused record raises `Malformed`; `data.malformed` decides what follows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sft_lightning.data.formats.fields import malformed
from sft_lightning.types import Message, Record, Role


def repair_order(
    record: Record, messages: list[Message], *, answered: bool = True, repairs: Counter[str] | None = None
) -> list[Message]:
    """Return the messages in a valid order; documents (role `text`) are returned as they are.

    Args:
        record: The record, for messages.
        messages: The record's messages.
        answered: Whether there must be an answer to learn from; a question to predict on needs none.
        repairs: Counts the repaired messages by code, for records that are not refused.

    Raises:
        Malformed: For what the module's table says is refused, with the reason.
    """
    if _is_valid(messages) or (messages and all(message.role == "text" for message in messages)):
        return messages
    if any(message.role == "text" for message in messages):
        raise malformed(record, "a record must hold either documents or messages of a conversation, not both")
    kept = _from_first_question(record, messages)
    num_leading = len(messages) - len(kept)
    _check_order(record, kept, num_leading)
    num_checked = len(kept)
    while answered and kept and kept[-1].role == "user" and kept[-1].train is not True:
        kept = kept[:-1]
    num_trailing = num_checked - len(kept)
    empty = [i for i, message in enumerate(kept) if message.role in ("user", "assistant") and is_empty(message)]
    if answered and not any(_is_learned(message, i in empty) for i, message in enumerate(kept)):
        raise malformed(record, _nothing_to_learn(kept), "no_answer")
    for i in empty:
        if kept[i].role == "assistant" and kept[i].train is None:
            kept[i] = replace(kept[i], train=False)
    if repairs is not None:
        counts = {"leading_answer": num_leading, "trailing_user": num_trailing, "empty_turn": len(empty)}
        repairs.update({code: count for code, count in counts.items() if count})
    return kept


_ALTERNATING: tuple[Role, Role] = ("user", "assistant")


def _is_valid(messages: list[Message]) -> bool:
    """Whether nothing needs to be repaired or refused: true of most records, and fast to find out."""
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) == first or (len(messages) - first) % 2:
        return False
    for number in range(first, len(messages)):
        message = messages[number]
        if message.role != _ALTERNATING[(number - first) % 2] or not message.content or message.content.isspace():
            return False
    return True


def is_empty(message: Message) -> bool:
    """Whether the message has neither text other than white space, nor tool calls, nor reasoning."""
    return not (
        message.content.strip()
        or message.context
        or message.extras.get("tool_calls")
        or message.extras.get("reasoning_content")
    )


def _is_learned(message: Message, empty: bool) -> bool:
    # An answer with `train: false` is the user's choice, not a malformed record: it is counted after tokenization.
    return message.train is True or (message.role == "assistant" and not empty)


def _nothing_to_learn(messages: list[Message]) -> str:
    if any(message.role == "assistant" for message in messages):
        return "every assistant message is empty, so there is nothing to learn"
    return "no assistant message follows the user's, so there is nothing to learn"


def _from_first_question(record: Record, messages: list[Message]) -> list[Message]:
    """Leave out what comes before the first user message, except the system message; the tools move to the first."""
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise malformed(record, "no user message, so there is no question to answer", "no_question")
    kept = [message for message in messages[:first] if message.role == "system"] + messages[first:]
    if messages[0].tools and not kept[0].tools:
        kept[0] = replace(kept[0], tools=messages[0].tools)
    return kept


def _check_order(record: Record, messages: list[Message], num_left_out: int) -> None:
    previous: Role | None = None
    for number, message in enumerate(messages, start=num_left_out):
        role = message.role
        if role == "system" and previous is not None:
            problem = f"message {number} is a system message, which must be the first message"
            raise malformed(record, problem, "misplaced_system")
        if role == "tool" and previous not in ("assistant", "tool"):
            problem = f"message {number} is a tool's result, but message {number - 1} is not the assistant's tool call"
            raise malformed(record, problem, "misplaced_tool")
        if role == previous and role in ("user", "assistant"):
            problem = f"messages {number - 1} and {number} are both from the {role}; join them"
            raise malformed(record, problem, "consecutive_turns")
        previous = role
