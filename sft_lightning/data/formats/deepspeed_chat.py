"""The sixteen data sets of DeepSpeed-Chat with its exact strings: the prompt and then the answer, without a template.

Prompt and answer, joined, are what `get_prompt_and_chosen` returns in `dschat/utils/data/raw_datasets.py` of
DeepSpeedExamples; the prompt ends where `get_prompt` ends. Only the answer is supervised, while DeepSpeed-Chat has a
loss on both. A record for which it returns `None` (and which it silently drops) is `Malformed` with the reason
`no_answer`; so is an answer that is only white space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sft_lightning.data.formats.fields import malformed
from sft_lightning.types import Message, Record

PREFIX = "deepspeed_chat/"
"""Beginning of the names of these formats."""

Reader = Callable[[Record], str | None]
"""Record → text; `None` if the data set has none for this record."""


@dataclass(frozen=True)
class PromptDataset:
    """One data set: how its prompt and its answer are read."""

    hub_name: str
    """The data set is used if this is a part of the source's path, as in `get_raw_dataset` of DeepSpeed-Chat's
    `data_utils.py`."""

    prompt: Reader
    """Reads what `get_prompt` returns."""

    answer: Reader
    """Reads what `get_prompt_and_chosen` writes after the prompt."""

    label: str = ""
    """The end of the prompt, if the answers already begin with it."""

    @property
    def format_name(self) -> str:
        """The name of the format: `deepspeed_chat/rm-static`."""
        return PREFIX + self.hub_name.rpartition("/")[2]

    def messages(self, record: Record) -> list[Message]:
        """Return the prompt, unsupervised, and the answer.

        Raises:
            Malformed: If a key is missing or is not text, or there is no answer.
        """
        [prompt] = self.question(record)
        answer = self.answer(record)
        if answer is None or not answer.strip():
            raise malformed(
                record, f"{self.hub_name} has no answer in this record, so there is nothing to learn", "no_answer"
            )
        question = prompt.content
        if self.label and answer.startswith(self.label):
            answer = answer[len(self.label) :]
        elif self.label:
            question = question[: -len(self.label)]
        return [Message("text", question), Message("text", answer)]

    def question(self, record: Record) -> list[Message]:
        """Return the prompt without the answer, to predict on.

        Raises:
            Malformed: If a key is missing or is not text, or there is no prompt.
        """
        prompt = self.prompt(record)
        if prompt is None:
            raise malformed(
                record, f"{self.hub_name} has no prompt in this record, so there is nothing to learn", "no_answer"
            )
        return [Message("text", prompt, train=False)]


def is_divided(path: str, format_name: str | None) -> bool:
    """Whether DeepSpeed-Chat divides the `train` split of a data set 9:1 into training and evaluation data.

    Args:
        path: Path of the source.
        format_name: Its format; `None`: found from the path.
    """
    return (format_name or dataset_format(path)) in _DIVIDED


def dataset_format(path: str) -> str | None:
    """Return the format of the data set whose Hub name is a part of `path`; `None` if there is none."""
    return next((dataset.format_name for dataset in DATASETS.values() if dataset.hub_name in path), None)


def _text(*path: str | int) -> Reader:
    """Return the reader of the string at a path of keys and indices; it gives `None` for null and an empty list."""

    def read(record: Record) -> str | None:
        value: Any = record.fields
        for depth, step in enumerate(path):
            if value is None or (value == [] and isinstance(step, int)):
                return None
            fits = isinstance(value, list) if isinstance(step, int) else isinstance(value, Mapping) and step in value
            if not fits:
                raise malformed(record, f"`{_dotted(path[: depth + 1])}` is missing")
            value = value[step]
        if value is not None and not isinstance(value, str):
            raise malformed(record, f"`{_dotted(path)}` must be a string (got {type(value).__name__})")
        return value

    return read


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def _around(before: str, reader: Reader, after: str = "") -> Reader:
    def read(record: Record) -> str | None:
        text = reader(record)
        return None if text is None else before + text + after

    return read


def _asked(*path: str | int) -> Reader:
    return _around(" Human: ", _text(*path), " Assistant:")


def _answered(*path: str | int) -> Reader:
    return _around(" ", _text(*path))


def _better_of_webgpt(record: Record) -> str | None:
    """Return the answer with the higher score (the first if equal) without its citations in brackets."""
    first, second = _number(record, "score_0", float), _number(record, "score_1", float)
    answer = _text("answer_0" if first >= second else "answer_1")(record)
    if answer is None:
        return None
    answer = re.sub(r" [\(\[].*?[\)\]]", "", answer)
    return " " + re.sub(r"[\(\[].*?[\)\]]", "", answer)


def _better_of_shp(record: Record) -> str | None:
    """Return the answer that the label prefers: A for 1, else B."""
    return _answered("human_ref_A" if _number(record, "labels", int) == 1 else "human_ref_B")(record)


def _number(record: Record, key: str, kind: type[int] | type[float]) -> float:
    value = record.fields.get(key)
    try:
        return kind(value)  # type: ignore[arg-type]  # a value that does not convert raises one of the errors below
    except (TypeError, ValueError, OverflowError) as error:
        raise malformed(record, f"`{key}` must be a number (got {value!r})") from error


def _vicuna_prompt(record: Record) -> str | None:
    prompt = _text("prompt")(record)
    return prompt.replace("USER", "Human").replace("ASSISTANT", "Assistant") if prompt else None


_PASSAGE = ("positive_passages", 0, "text")

DATASETS: Mapping[str, PromptDataset] = {
    dataset.format_name: dataset
    for dataset in (
        PromptDataset("Dahoas/rm-static", _text("prompt"), _text("chosen")),
        PromptDataset("Dahoas/full-hh-rlhf", _text("prompt"), _text("chosen")),
        PromptDataset("Dahoas/synthetic-instruct-gptj-pairwise", _asked("prompt"), _answered("chosen")),
        PromptDataset(
            "yitingxie/rlhf-reward-datasets",
            _around("", _text("prompt"), "Assistant:"),
            _text("chosen"),
            label="Assistant:",
        ),
        PromptDataset("openai/webgpt_comparisons", _asked("question", "full_text"), _better_of_webgpt),
        PromptDataset("stanfordnlp/SHP", _asked("history"), _better_of_shp),
        PromptDataset("pvduy/sharegpt_alpaca_oa_vicuna_format", _vicuna_prompt, _answered("label")),
        PromptDataset("wangrui6/Zhihu-KOL", _asked("INSTRUCTION"), _answered("RESPONSE")),
        PromptDataset("Cohere/miracl-zh-queries-22-12", _asked("query"), _answered(*_PASSAGE)),
        PromptDataset("Hello-SimpleAI/HC3-Chinese", _asked("question"), _answered("human_answers", 0)),
        PromptDataset("mkqa-Chinese", _asked("queries", "zh_cn"), _answered("answers", "zh_cn", 0, "text")),
        PromptDataset("mkqa-Japanese", _asked("queries", "ja"), _answered("answers", "ja", 0, "text")),
        PromptDataset("Cohere/miracl-ja-queries-22-12", _asked("query"), _answered(*_PASSAGE)),
        PromptDataset("lmqg/qg_jaquad", _asked("question"), _answered("sentence")),
        PromptDataset("lmqg/qag_jaquad", _asked("questions", 0), _answered("paragraph")),
        PromptDataset("local/jsonfile", _around(" ", _text("prompt")), _answered("chosen")),
    )
}
"""The data sets by format name, in the order in which DeepSpeed-Chat looks for them."""

_DIVIDED = {
    f"{PREFIX}{name}"
    for name in (
        "synthetic-instruct-gptj-pairwise", "webgpt_comparisons", "Zhihu-KOL", "HC3-Chinese", "mkqa-Chinese",
        "mkqa-Japanese",
    )
}  # fmt: skip
"""Formats of the data sets that have a `train` split only, from which DeepSpeed-Chat takes its evaluation data too."""
