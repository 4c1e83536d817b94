from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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


ROWS = [{"instruction": "a, b", "output": "c\nd"}, {"instruction": "é", "output": ""}]


def test_every_file_type_gives_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(ROWS)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as out:
        out.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as out:
        out.write_table(table)
    for name in ("a.jsonl.gz", "a.csv", "a.parquet", "file.arrow", "stream.arrow"):
        assert read(tmp_path / name) == ROWS, name


def test_a_text_file_is_one_document(write_json: Write) -> None:
    assert read(write_json("a.txt", "\ufeffOne.\n\nTwo.\n")) == [{"text": "One.\n\nTwo.\n"}]


def test_real_broken_files_are_refused_or_read(real_data: Path) -> None:
    with pytest.raises(UserError, match="git-LFS pointer"):
        read(real_data / "broken" / "lfs_pointer_named.jsonl.gz")
    [document] = read(real_data / "broken" / "utf8_bom.txt")
    assert not document["text"].startswith("\ufeff")


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
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", '{"n": 1}\n{"n": }\n', "line 2, column 7: broken JSON"),
        ("a.json", '[{"n": 1},\n {"n": ]', "line 2, column 8: broken JSON"),
        ("a.json", "[1]", "must be a JSON object, not int"),
        ("a.xml", "<n/>", "'.xml' is unknown"),
        ("a.csv", "n,m\n1,2\n3\n", "line 3: the row does not have the 2 cells"),
        ("a.csv", "n,m\n1,2,3\n", "line 2: the row does not have the 2 cells"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        ("a.jsonl.gz", "version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        ("a.jsonl.gz", "not gzip", "not a gzip file"),
        ("a.parquet", "not parquet", "not a .parquet file"),
        ("a.arrow", "not arrow", "not a .arrow file"),
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
