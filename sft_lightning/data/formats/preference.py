"""Records with a better and a worse answer → the pair, or the better answer for supervised fine-tuning.

Layouts, by their keys:

- `prompt` (text, messages, or a transcript that ends with `\\n\\nAssistant:`) and `chosen`, `rejected`;
- `chosen` and `rejected` as whole conversations: lists of messages, or transcripts `\\n\\nHuman: …\\n\\nAssistant: …`
  (Anthropic's HH-RLHF, arXiv:2204.05862);
- Alpaca's `instruction`, `input`, `history` with `chosen` and `rejected`, or with an `output` that lists answers from
  best to worst (LLaMA-Factory's older ranking files): the first two are the pair;
- `question`, `response_j`, `response_k` (stack-exchange-paired), or `question` with `chosen` and `rejected`;
- messages under `context`, `conversations` or `messages`, with `chosen` and `rejected`.

An answer is a text, a message, or a list of messages. Every layout may have a `system`; an empty one counts as missing.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from sft_lightning.data.formats.conversation_fields import (
    read_instruction,
    read_message,
    read_messages,
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
    """Return the prompt and the better answer; the record may lack the worse one."""
    return _conversation(record, "chosen")


def preference_pair(record: Record) -> tuple[list[Message], list[Message]]:
    """Return the conversation with the better answer and the one with the worse answer.

    The order of the messages is not checked here; `message_order.repair_order` does that.

    Raises:
        Malformed: If the record has no such pair.
    """
    return _conversation(record, "chosen"), _conversation(record, "rejected")


def _conversation(record: Record, which: Literal["chosen", "rejected"]) -> list[Message]:
    key, answer = _answer(record, which)
    messages = _joined(record, key, answer)
    if record.fields.get("system") and record.fields.get("instruction") is None:
        messages = with_system(record, messages, read_text(record, record.fields, "system"))
    return with_tools(messages, read_tools(record))


def _joined(record: Record, key: str, answer: Any) -> list[Message]:
    if isinstance(answer, str):
        return _joined_text(record, key, answer)
    answers = [read_message(record, key, answer)] if isinstance(answer, dict) else read_messages(record, key, answer)
    prompt = _prompt(record)
    if answers[0].role in ("assistant", "tool"):
        if not prompt:
            raise malformed(record, f"no prompt: `{key}` begins with an answer, and the record has no question")
        return [*prompt, *answers]
    if not _leads_to(prompt, answers):
        raise malformed(record, f"`{key}` is a whole conversation, but does not begin with the record's prompt")
    return answers


def _joined_text(record: Record, key: str, answer: str) -> list[Message]:
    prompt = record.fields.get("prompt")
    if _SPEAKER.match(answer):
        if isinstance(prompt, str) and not answer.startswith(prompt.rstrip()):
            raise malformed(record, f"`{key}` is a whole transcript, but does not begin with `prompt`")
        return _transcript(answer)
    if isinstance(prompt, str) and _SPEAKER.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return _transcript(f"{prompt.rstrip()} {answer.removeprefix(' ')}")
    messages = _prompt(record)
    if not messages:
        raise malformed(
            record, f"no prompt: the record has no question, and `{key}` does not begin with '\\n\\nHuman:'"
        )
    return [*messages, Message("assistant", answer)]


def _leads_to(prompt: list[Message], conversation: list[Message]) -> bool:
    """Whether a whole conversation begins with the prompt; only the conversation may have a system text."""
    if conversation[0].role == "system" and prompt and prompt[0].role != "system":
        conversation = conversation[1:]
    beginning = conversation[: len(prompt)]
    return [(each.role, each.content) for each in beginning] == [(each.role, each.content) for each in prompt]


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
    """Return the messages before both answers; none if the answers are whole conversations."""
    fields = record.fields
    prompt = fields.get("prompt")
    if prompt is not None:
        return read_messages(record, "prompt", prompt) if isinstance(prompt, list) else _question(record, "prompt")
    for key in _CONVERSATION_KEYS:
        if isinstance(fields.get(key), list):
            return read_messages(record, key, fields[key])
    if fields.get("instruction") is not None:
        return read_instruction(record)
    return _question(record, "question") if fields.get("question") is not None else []


def _question(record: Record, key: str) -> list[Message]:
    return [Message("user", read_text(record, record.fields, key))]


def _transcript(text: str) -> list[Message]:
    """Return the messages of `\\n\\nHuman: …\\n\\nAssistant: …`, without the space after each speaker."""
    _, *pieces = _SPEAKER.split(text)
    return [
        Message("user" if speaker == "Human" else "assistant", content.removeprefix(" "))
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
