"""What the models are asked: built-in prompts, or a file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lightning.data.formats.fields import read_text
from sft_lightning.data.formats.registry import find_format, to_messages
from sft_lightning.data.sources.files import read_file
from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record


@dataclass(frozen=True)
class ComparisonPrompt:
    """One prompt, for models with a chat template and for models without."""

    turns: Sequence[Mapping[str, str]]
    """Messages for a chat template; the last is the user's. Empty for a plain text to go on with."""

    text: str
    """What a model without a chat template goes on with."""

    location: str
    """Where it comes from: `builtin en 1`, or a file and a line."""

    reference: str | None = None
    """The answer that is wanted."""

    @property
    def shown(self) -> str:
        """What a reader takes for the prompt."""
        return str(self.turns[-1]["content"]) if self.turns else self.text

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        return str(self.turns[0]["content"]) if self.turns and self.turns[0]["role"] == "system" else None

    @property
    def is_plain(self) -> bool:
        """Whether no model's chat template is put around it."""
        return not self.turns


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
"""Six prompts a language, the same six in each."""


def builtin_prompts(language: str, system: str | None = None) -> list[ComparisonPrompt]:
    """Return the built-in prompts.

    A model without a chat template gets `Human: … Assistant:`, as DeepSpeed-Chat's `prompt_eval.py` asks: ending in a
    colon, because many base models write nothing after a space.

    Args:
        language: A key of `BUILTIN`.
        system: System message.
    """
    return [
        _conversation([Message("user", question)], f"builtin {language} {number}", None, system)
        for number, question in enumerate(BUILTIN[language], start=1)
    ]


def read_prompts(path: str, system: str | None = None) -> list[ComparisonPrompt]:
    """Read a file of prompts.

    A `.txt` file has a prompt a line. In every other type that data is read from, a record has `prompt`, and may have
    `system` and `reference`; or it is in a training format, and its last answer is the reference.

    Args:
        path: The file.
        system: System message of prompts that bring none.

    Raises:
        UserError: If the file does not exist or a record is none of these, with file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--prompts: {path!r} does not exist (looked in {Path.cwd()}); name a file, or builtin")
    if file.suffix == ".txt":
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        found = [_asked(line, None, f"{path}, line {number}", system) for number, line in lines if line.strip()]
    else:
        found = [_prompt(Record(_object(row, where), "prompts", where), system) for where, row in read_file(file)]
    if not found:
        raise UserError(f"--prompts: {path!r} holds no prompt")
    return found


def _object(row: object, location: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: a record must be a JSON object, not {type(row).__name__}")
    return row


def _prompt(record: Record, system: str | None) -> ComparisonPrompt:
    fields = record.fields
    if "prompt" in fields and not {"completion", "chosen"} & fields.keys():
        reference = None if fields.get("reference") is None else read_text(record, fields, "reference")
        own_system = system if fields.get("system") is None else read_text(record, fields, "system")
        return _asked(read_text(record, fields, "prompt"), reference, record.location, own_system)
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
    turns = [(message.role, "\n".join(filter(None, (message.content, message.context)))) for message in asked]
    if system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return ComparisonPrompt(
        [{"role": role, "content": content} for role, content in turns], _plain(turns), location, reference
    )


def _asked(text: str, reference: str | None, location: str, system: str | None) -> ComparisonPrompt:
    """A prompt of one turn: without a template it is gone on with as it stands."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    before = "" if system is None else f"{system}\n"
    return ComparisonPrompt([*turns, {"role": "user", "content": text}], before + text, location, reference)


def _plain(turns: Sequence[tuple[str, str]]) -> str:
    """Write a conversation for a model without a chat template."""
    names = {"user": "Human: ", "assistant": "Assistant: "}
    return " ".join(names.get(role, "") + content for role, content in turns) + " Assistant:"
