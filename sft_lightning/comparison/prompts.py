"""The prompts of a comparison: built in, or read from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lightning.data.formats.fields import read_text
from sft_lightning.data.formats.registry import find_format, to_messages
from sft_lightning.data.sources.files import read_file
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record

_WITH_ROLES = re.compile(r"\s*Human:.*Assistant:\s*", re.DOTALL)
"""A prompt as DeepSpeed-Chat's `prompt_eval.py` has them."""


@dataclass(frozen=True)
class ComparisonPrompt:
    """One prompt, for models with a chat template and for models without."""

    messages: Sequence[Mapping[str, str]]
    """Messages for a chat template, ending with the user's; empty if every model is to continue the plain text."""

    text: str
    """Text that a model without a chat template continues."""

    location: str
    """Source of the prompt: `builtin en 1`, or a file and a line."""

    reference: str | None = None
    """The wanted answer, if the file has one."""

    @property
    def shown(self) -> str:
        """The prompt as reports show it: the last message, or the plain text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else None

    @property
    def is_plain(self) -> bool:
        """Whether every model continues the text, without its chat template."""
        return not self.messages


BUILTIN: Mapping[str, Sequence[str]] = {
    "en": (
        "Describe in a few sentences what a bakery does.",
        "Explain to a six-year-old why it gets dark at night.",
        "Write a short poem about a patient turtle.",
        "In which year did the first person walk on the Moon?",
        "How does a refrigerator keep food cold?",
        "List three reasons to drink enough water.",
    ),
    "zh": (
        "请用几句话介绍一下面包店是做什么的。",
        "向一个六岁的孩子解释为什么晚上天会黑。",
        "写一首关于一只有耐心的乌龟的短诗。",
        "人类第一次在月球上行走是在哪一年？",
        "冰箱是怎样让食物保持低温的？",
        "列出多喝水的三个理由。",
    ),
    "ja": (
        "パン屋が何をするところか、数文で説明してください。",
        "なぜ夜になると暗くなるのか、6歳の子どもに説明してください。",
        "辛抱強い亀についての短い詩を書いてください。",
        "人類が初めて月面を歩いたのは何年ですか？",
        "冷蔵庫はどうやって食べ物を冷やし続けるのですか？",
        "水を十分に飲むべき理由を三つ挙げてください。",
    ),
}
"""The same six prompts in each language."""


def builtin_prompts(language: str, system: str | None = None) -> list[ComparisonPrompt]:
    """Return the built-in prompts.

    A model without a chat template gets `Human: … Assistant:`, as in DeepSpeed-Chat's `prompt_eval.py`. The prompt ends
    with the colon, because many base models generate nothing after a space.

    Args:
        language: A key of `BUILTIN`.
        system: System message of every prompt, if any.
    """
    return [
        _conversation([Message("user", question)], f"builtin {language} {number}", None, system)
        for number, question in enumerate(BUILTIN[language], start=1)
    ]


def read_prompts(path: str, system: str | None = None) -> list[ComparisonPrompt]:
    """Read a file of prompts.

    A `.txt` file has one prompt per line. In all other types of data files, a record has `prompt` and optionally
    `system` and `reference`; or it is in a training format, and its last answer is the reference.

    Args:
        path: The file.
        system: System message of the prompts that have none.

    Raises:
        UserError: If the file does not exist or holds no prompts, or if a record has none of these forms.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--prompts: {path!r} does not exist (looked in {Path.cwd()}); give a file, or builtin")
    if file.suffix == ".txt":
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        prompts = [
            _single_message(line, None, f"{path}, line {number}", system) for number, line in lines if line.strip()
        ]
    else:
        prompts = [_prompt(Record(_as_object(row, where), "prompts", where), system) for where, row in read_file(file)]
    if not prompts:
        raise UserError(f"--prompts: {path!r} holds no prompts")
    return prompts


def _as_object(row: object, location: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: a record must be a JSON object (got {type(row).__name__})")
    return row


def _prompt(record: Record, system: str | None) -> ComparisonPrompt:
    fields = record.fields
    if "prompt" in fields and not {"completion", "chosen"} & fields.keys():
        reference = None if fields.get("reference") is None else read_text(record, fields, "reference")
        own_system = system if fields.get("system") is None else read_text(record, fields, "system")
        return _single_message(read_text(record, fields, "prompt"), reference, record.location, own_system)
    messages = to_messages(record, find_format(None, record), answered=False)
    last = messages[-1]
    reference = last.content if last.role == "assistant" or (last.role == "text" and len(messages) > 1) else None
    asked = messages[:-1] if reference is not None else messages
    if asked[0].role == "text":
        return ComparisonPrompt([], "".join(message.content for message in asked), record.location, reference)
    return _conversation(asked, record.location, reference, system)


def _conversation(
    asked: Sequence[Message], location: str, reference: str | None, system: str | None
) -> ComparisonPrompt:
    contents = [(message.role, "\n".join(filter(None, (message.content, message.context)))) for message in asked]
    if system is not None and contents[0][0] != "system":
        contents.insert(0, ("system", system))
    return ComparisonPrompt(
        [{"role": role, "content": content} for role, content in contents], _plain_text(contents), location, reference
    )


def _single_message(text: str, reference: str | None, location: str, system: str | None) -> ComparisonPrompt:
    """Return a prompt of one user message; a model without a chat template continues the text unchanged.

    A text that already has its roles (`Human: … Assistant:`) is continued unchanged by every model.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    before = "" if system is None else f"{system}\n"
    if _WITH_ROLES.fullmatch(text):
        return ComparisonPrompt([], before + text, location, reference)
    return ComparisonPrompt([*messages, {"role": "user", "content": text}], before + text, location, reference)


def _plain_text(messages: Sequence[tuple[str, str]]) -> str:
    """Return a conversation as text for a model without a chat template."""
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return " ".join(names.get(role, "") + content for role, content in messages) + " Assistant:"
