"""Records with a better and a worse answer: the pair, and its better half for supervised fine-tuning.

Layouts, by their keys:

- `prompt` (text, messages, or a transcript that ends with `\\n\\nAssistant:`) and `chosen`, `rejected`;
- `chosen` and `rejected` as whole conversations: lists of messages, or transcripts `\\n\\nHuman: …\\n\\nAssistant: …`
  (Anthropic's HH-RLHF, arXiv:2204.05862);
- Alpaca's `instruction`, `input`, `history` with `chosen` and `rejected`, or with an `output` that lists answers from
  best to worst (LLaMA-Factory's older ranking files): the first two are the pair;
- `question`, `response_j`, `response_k` (stack-exchange-paired), or `question` with `chosen` and `rejected`;
- turns under `context`, `conversations` or `messages`, then `chosen` and `rejected`.

An answer is a text, a message, or a list of messages. `system` may stand beside any of them; empty, it is none.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from sft_lightning.data.formats.conversation_fields import (
    read_instruction,
    read_turn,
    read_turns,
    with_system,
    with_tools,
)
from sft_lightning.data.formats.fields import malformed, read_text
from sft_lightning.data.formats.tool_calls import read_tools
from sft_lightning.types import Message, Record

_ANSWER_KEYS = {"chosen": ("chosen", "response_j"), "rejected": ("rejected", "response_k")}
_RANKS = {"chosen": 0, "rejected": 1}
_CONVERSATION_KEYS = ("context", "conversations", "messages")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def preference(record: Record) -> list[Message]:
    """Return the prompt and the better answer; the worse one need not be there."""
    return _conversation(record, "chosen")


def preference_pair(record: Record) -> tuple[list[Message], list[Message]]:
    """Return the conversation with the better answer, and the one with the worse.

    Neither is checked for the order of its turns; `turn_order.settle` does that.

    Raises:
        Malformed: If the record has no such pair.
    """
    return _conversation(record, "chosen"), _conversation(record, "rejected")


def _conversation(record: Record, which: Literal["chosen", "rejected"]) -> list[Message]:
    key, answer = _answer(record, which)
    turns = _joined(record, key, answer)
    if record.fields.get("system") and record.fields.get("instruction") is None:
        turns = with_system(record, turns, read_text(record, record.fields, "system"))
    return with_tools(turns, read_tools(record))


def _joined(record: Record, key: str, answer: Any) -> list[Message]:
    if isinstance(answer, str):
        return _joined_text(record, key, answer)
    answers = [read_turn(record, key, answer)] if isinstance(answer, dict) else read_turns(record, key, answer)
    turns = _prompt(record)
    if answers[0].role in ("assistant", "tool"):
        if not turns:
            raise malformed(record, f"no prompt: `{key}` begins with an answer, and nothing says to what")
        return [*turns, *answers]
    if not _leads_to(turns, answers):
        raise malformed(record, f"`{key}` is a whole conversation, but does not begin with the record's own prompt")
    return answers


def _joined_text(record: Record, key: str, answer: str) -> list[Message]:
    prompt = record.fields.get("prompt")
    if _SPEAKER.match(answer):
        if isinstance(prompt, str) and not answer.startswith(prompt.rstrip()):
            raise malformed(record, f"`{key}` is a whole transcript, but does not begin with `prompt`")
        return _transcript(answer)
    if isinstance(prompt, str) and _SPEAKER.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return _transcript(f"{prompt.rstrip()} {answer.removeprefix(' ')}")
    turns = _prompt(record)
    if not turns:
        raise malformed(record, f"no prompt: nothing stands before `{key}`, and it does not begin with '\\n\\nHuman:'")
    return [*turns, Message("assistant", answer)]


def _leads_to(prompt: list[Message], conversation: list[Message]) -> bool:
    """Whether a whole conversation begins with the prompt; it may have a system text where the prompt has none."""
    if conversation[0].role == "system" and prompt and prompt[0].role != "system":
        conversation = conversation[1:]
    beginning = conversation[: len(prompt)]
    return [(turn.role, turn.content) for turn in beginning] == [(turn.role, turn.content) for turn in prompt]


def _answer(record: Record, which: Literal["chosen", "rejected"]) -> tuple[str, Any]:
    """Return the key of the better or worse answer, and the answer."""
    for key in _ANSWER_KEYS[which]:
        if record.fields.get(key) is not None:
            return key, record.fields[key]
    ranked = record.fields.get("output")
    if isinstance(ranked, list) and len(ranked) > _RANKS[which]:
        return f"output[{_RANKS[which]}]", ranked[_RANKS[which]]
    return which, read_text(record, record.fields, which)


def _prompt(record: Record) -> list[Message]:
    """Return what both answers answer; nothing where they are whole conversations."""
    fields = record.fields
    prompt = fields.get("prompt")
    if prompt is not None:
        return read_turns(record, "prompt", prompt) if isinstance(prompt, list) else _question(record, "prompt")
    for key in _CONVERSATION_KEYS:
        if isinstance(fields.get(key), list):
            return read_turns(record, key, fields[key])
    if fields.get("instruction") is not None:
        return read_instruction(record)
    return _question(record, "question") if fields.get("question") is not None else []


def _question(record: Record, key: str) -> list[Message]:
    return [Message("user", read_text(record, record.fields, key))]


def _transcript(text: str) -> list[Message]:
    """Return the turns of `\\n\\nHuman: …\\n\\nAssistant: …`, without the space that follows each speaker."""
    _, *pieces = _SPEAKER.split(text)
    return [
        Message("user" if speaker == "Human" else "assistant", content.removeprefix(" "))
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
