from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.comparison.prompts import BUILTIN, ComparisonPrompt, builtin_prompts, read_prompts
from sft_lightning.errors import UserError


def read(tmp_path: Path, *rows: dict[str, Any], system: str | None = None) -> list[ComparisonPrompt]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(str(path), system)


def test_every_language_has_the_same_number_of_prompts() -> None:
    assert {language: len(prompts) for language, prompts in BUILTIN.items()} == {"en": 6, "zh": 6, "ja": 6}


def test_builtin_prompts_end_in_a_colon_for_models_without_a_template() -> None:
    first = builtin_prompts("en", "Be brief.")[0]
    question = BUILTIN["en"][0]
    assert first.text == f"Be brief. Human: {question} Assistant:"
    assert [turn["role"] for turn in first.messages] == ["system", "user"]
    assert (first.shown, first.system) == (question, "Be brief.")


def test_a_prompt_with_reference_and_system_is_read(tmp_path: Path) -> None:
    [own, other] = read(
        tmp_path, {"prompt": "Hi", "reference": "Ho", "system": "Own"}, {"prompt": "Bye"}, system="Given"
    )
    assert (own.shown, own.reference, own.system, own.text) == ("Hi", "Ho", "Own", "Own\nHi")
    assert (other.reference, other.system) == (None, "Given")
    assert own.location.endswith("prompts.jsonl, line 1")


def test_a_prompt_with_roles_in_its_text_is_continued_as_it_is_by_models_with_and_without_a_template(
    tmp_path: Path,
) -> None:
    text = "Human: Please tell me about Microsoft in a few sentence? Assistant:"
    [prompt, other] = read(tmp_path, {"prompt": text}, {"prompt": "Is Human: a role? Assistant: yes"})
    assert prompt.is_plain
    assert (prompt.text, prompt.shown) == (text, text)
    assert not other.is_plain


def test_training_formats_are_read_and_their_last_answer_is_the_reference(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    [alpaca, messages, plain] = read(
        tmp_path,
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {"messages": chat},
        {"prompt": "one,", "completion": " two"},
    )
    assert (alpaca.shown, alpaca.reference) == ("Add\n1 1", "2")
    assert (len(messages.messages), messages.reference) == (3, "d")
    assert messages.text == "Human: a Assistant: b Human: c Assistant:"
    assert (plain.is_plain, plain.text, plain.reference) == (True, "one,", " two")


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert [(each.shown, each.location.rpartition(", ")[2]) for each in read_prompts(str(path))] == [
        ("one", "line 1"),
        ("two", "line 3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("a.txt", "\n\n", "holds no prompts"),
        ("a.json", '["text"]', "must be a JSON object"),
        ("a.jsonl", '{"prompt": 3}', r"line 1.*prompt"),
        ("a.jsonl", '{"question": "x"}', "cannot detect the format"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))
