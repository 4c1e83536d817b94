from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_lightning.data.sources import files
from sft_lightning.data.sources.files import READERS, read_file, reader_of
from sft_lightning.errors import UserError

Write = Callable[[str, Any], Path]


def read(path: Path) -> list[Any]:
    return [row for _, row in read_file(path)]


def locations(path: Path) -> list[str]:
    return [location for location, _ in read_file(path)]


def test_a_json_list_is_read_in_order(write_json: Write) -> None:
    path = write_json("a.json", [{"n": 1}, {"n": 2}])
    assert read(path) == [{"n": 1}, {"n": 2}]
    assert locations(path) == [f"{path}, record 0", f"{path}, record 1"]


def test_a_json_object_is_one_record(write_json: Write) -> None:
    assert read(write_json("a.json", {"n": 1})) == [{"n": 1}]


def test_json_lines_may_have_blank_lines_a_bom_and_unicode_line_separators(write_json: Write) -> None:
    path = write_json("a.jsonl", '\ufeff{"n": "x\u2028y\u0085z"}\n\n{"n": 2}\r\n')
    assert read(path) == [{"n": "x\u2028y\u0085z"}, {"n": 2}]
    assert locations(path) == [f"{path}, line 1", f"{path}, line 3"]


def test_json_lines_in_a_json_file_are_read_as_lines(write_json: Write) -> None:
    path = write_json("a.json", '{"n": "x\u2028y"}\n{"n": 2}\n')
    assert read(path) == [{"n": "x\u2028y"}, {"n": 2}]
    assert locations(path) == [f"{path}, line 1", f"{path}, line 2"]


ROWS = [
    {"instruction": "a, b", "output": "c\nd", "system": "s"},
    {"instruction": "é 🙂", "output": "", "system": "\u2028"},
    {"instruction": ' "quoted" ', "output": "x", "system": ""},
]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, rows: list[dict[str, Any]], opener: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with opener(path, table.schema) as out:
        out.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8"),
    "bom.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS, ensure_ascii=False), "utf-8"),
    "a.jsonl": lambda path: path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "utf-8"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "a.csv": lambda path: write_csv(path, ROWS),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2),
    "file.arrow": lambda path: write_arrow(path, ROWS, pa.ipc.new_file),
    "stream.arrow": lambda path: write_arrow(path, ROWS, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_file_types_give_the_same_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == ROWS
    assert len(set(locations(tmp_path / name))) == 3
    assert all(location.startswith(f"{tmp_path / name}, ") for location in locations(tmp_path / name))


def test_record_numbers_continue_across_the_batches_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 2)
    for name in ("a.parquet", "stream.arrow"):
        WRITERS[name](tmp_path / name)
        assert locations(tmp_path / name) == [f"{tmp_path / name}, record {i}" for i in range(3)]


def test_the_location_of_a_csv_record_is_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"a": "1"}, {"a": "2"}])
    assert locations(path) == [f"{path}, line 2", f"{path}, line 3"]


def test_a_text_file_is_one_document(write_json: Write) -> None:
    path = write_json("a.txt", "\ufeffOne.\n\nTwo.\n")
    assert read(path) == [{"text": "One.\n\nTwo.\n"}]
    assert locations(path) == [str(path)]


class _CountingReads:
    """Counts the rows that are parsed."""

    def __init__(self, loads: Callable[..., Any]) -> None:
        self._loads = loads
        self.calls = 0

    def __call__(self, text: str) -> Any:
        self.calls += 1
        return self._loads(text)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_read_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = "\n".join(['{"n": 1}'] * 50_000)
    content = f"{good}\nbroken".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    counting = _CountingReads(json.loads)
    monkeypatch.setattr(files.json, "loads", counting)
    assert [row for _, row in islice(read_file(tmp_path / name), 3)] == [{"n": 1}] * 3
    assert counting.calls <= 4
    with pytest.raises(UserError, match="line 50001"):
        read(tmp_path / name)


def test_a_parquet_file_is_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 10)
    pq.write_table(pa.table({"n": list(range(1000))}), tmp_path / "a.parquet")
    sizes: list[int] = []
    to_pylist = pa.RecordBatch.to_pylist

    class Spy:
        def __init__(self, batch: Any) -> None:
            self._batch = batch

        def to_pylist(self) -> Any:
            sizes.append(self._batch.num_rows)
            return to_pylist(self._batch)

    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **kwargs: map(Spy, batches(*args, **kwargs)))
    assert [row["n"] for _, row in islice(read_file(tmp_path / "a.parquet"), 12)] == list(range(12))
    assert sizes == [10, 10]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", " \n", "the file is empty"),
        ("a.txt", "\n", "the file is empty"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.csv", "n,m\n", "holds no records"),
        ("a.jsonl", '{"n": 1}\n{"n": }\n', "line 2, column 7: broken JSON"),
        ("a.json", '[{"n": 1},\n {"n": ]', "line 2, column 8: broken JSON"),
        ("a.json", '{"n": 1}\n{"n": ]', "line 2, column 7: broken JSON"),
        ("a.csv", "n,m\n1,2\n3\n", "line 3: expected 2 columns as in the header, found 1;"),
        ("a.csv", "n,m\n1,2,3,4\n", "line 2: expected 2 columns as in the header, found 4;"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        ("a.jsonl.gz", "version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        ("a.jsonl.gz", "not gzip", "cannot decompress the file with gzip"),
        ("a.parquet", "not parquet", "Arrow cannot read this .parquet file"),
        ("a.arrow", "not arrow", "Arrow cannot read this .arrow file"),
        ("a.xml", "<n/>", "'.xml' is unknown"),
    ],
)
def test_a_broken_file_is_refused_with_its_path_and_line(name: str, content: str, said: str, write_json: Write) -> None:
    path = write_json(name, content)
    with pytest.raises(UserError) as error:
        read(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_file_that_is_not_utf8_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"n": "\xff"}\n')
    with pytest.raises(UserError, match=rf"{name}: not UTF-8 text .*byte 0xff"):
        read(tmp_path / name)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"n": 1}\n' * 1000)
    for content in (whole[: len(whole) // 2], whole[:-12] + b"\0" * 12):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot decompress the file with gzip"):
            read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_truncated_table_is_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{name}: Arrow cannot read this \.\w+ file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_git_lfs_pointer_instead_of_a_table_is_refused(name: str, write_json: Write) -> None:
    path = write_json(name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git-LFS pointer"):
        read(path)


def test_the_ending_of_the_name_selects_the_reader() -> None:
    assert reader_of(Path("a.v2.jsonl.gz")) is READERS[".jsonl.gz"]
    assert reader_of(Path("a.b.parquet")) is READERS[".parquet"]
    assert reader_of(Path("a.json.gz")) is None
    assert reader_of(Path("README.md")) is None
    assert reader_of(Path("noname")) is None


def test_a_csv_cell_may_be_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    [(_, row)] = read_file(path)
    assert len(row["text"]) == 200_000


def test_broken_csv_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_text('text\na\n"b"c\rd\n')
    with pytest.raises(UserError, match=r"broken\.csv, line 3: broken CSV: new-line character seen"):
        list(read_file(path))
