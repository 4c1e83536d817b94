from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.sources import SourceConfig, read_records
from sft_lightning.errors import UserError

Write = Callable[[str, Any], Path]


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records("s", SourceConfig(path=str(path), **options))]


def test_a_json_list_is_read_in_order(write_json: Write) -> None:
    assert read(write_json("a.json", [{"n": 1}, {"n": 2}])) == [{"n": 1}, {"n": 2}]


def test_a_json_object_is_one_record(write_json: Write) -> None:
    assert read(write_json("a.json", {"n": 1})) == [{"n": 1}]


def test_json_lines_may_have_blank_lines_a_bom_and_unicode_line_separators(write_json: Write) -> None:
    path = write_json("a.jsonl", '\ufeff{"n": "x\u2028y"}\n\n{"n": 2}\n')
    assert read(path) == [{"n": "x\u2028y"}, {"n": 2}]


def test_json_lines_in_a_json_file_are_read_as_lines(write_json: Write) -> None:
    assert read(write_json("a.json", '{"n": 1}\n{"n": 2}\n')) == [{"n": 1}, {"n": 2}]


def test_a_folder_is_read_recursively_in_sorted_order(write_json: Write, tmp_path: Path) -> None:
    write_json("d/b.json", [{"n": 3}])
    write_json("d/a/z.jsonl", '{"n": 1}\n{"n": 2}')
    write_json("d/notes.md", "not data")
    assert read(tmp_path / "d") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_max_examples_stops_early(write_json: Write) -> None:
    assert read(write_json("a.json", [{"n": 1}, {"n": 2}]), max_examples=1) == [{"n": 1}]


def test_a_record_knows_its_file_and_line(write_json: Write) -> None:
    path = write_json("a.jsonl", '{"n": 1}\n\n{"n": 2}')
    locations = [record.location for record in read_records("s", SourceConfig(path=str(path)))]
    assert locations == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", "[]", "the list is empty"),
        ("a.jsonl", '{"n": 1}\n{"n": }\n', "line 2, column 7: broken JSON"),
        ("a.json", '[{"n": 1},\n {"n": ]', "line 2, column 8: broken JSON"),
        ("a.json", "[1]", "must be a JSON object, not int"),
        ("a.csv", "n\n1\n", "'.csv' is unknown"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    name: str, content: str, said: str, write_json: Write
) -> None:
    path = write_json(name, content)
    with pytest.raises(UserError) as error:
        read(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"n": "\xff"}]')
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "a.json")


def test_a_missing_path_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.path.*does not exist"):
        read(tmp_path / "nowhere")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        read(tmp_path)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": -1.0}, {"max_examples": 0}])
def test_a_source_checks_its_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SourceConfig(path="x", **options)
