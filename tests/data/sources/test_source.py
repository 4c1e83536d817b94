from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from sft_lightning.data.sources.source import SourceConfig, is_saved_dataset, read_record, read_records, source_files
from sft_lightning.errors import UserError

Write = Callable[[str, Any], Path]


def read(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records("s", SourceConfig(path=str(path), **options))]


def test_a_folder_is_read_recursively_in_sorted_order(write_json: Write, tmp_path: Path) -> None:
    write_json("d/b.json", [{"n": 3}])
    write_json("d/a/z.jsonl", '{"n": 1}\n{"n": 2}')
    write_json("d/notes.md", "not data")
    assert read(tmp_path / "d") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_real_broken_files_are_refused_or_read(real_data: Path) -> None:
    with pytest.raises(UserError, match="git-LFS pointer"):
        read(real_data / "broken" / "lfs_pointer_named.jsonl.gz")
    [document] = read(real_data / "broken" / "utf8_bom.txt")
    assert not document["text"].startswith("\ufeff")


def test_max_examples_stops_early(write_json: Write) -> None:
    path = write_json("a.jsonl", '{"n": 1}\n{"n": 2}\nbroken')
    assert read(path, max_examples=2) == [{"n": 1}, {"n": 2}]


def test_the_first_records_of_a_big_source_are_read_without_the_others(write_json: Write, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n' * 1000 + b"broken"))
    write_json("d/b.jsonl", "broken")
    records = read_records("s", SourceConfig(path=str(tmp_path / "d")))
    assert [record.fields for record in islice(records, 5)] == [{"n": 1}] * 5


def test_a_record_has_its_source_file_and_line(write_json: Write) -> None:
    path = write_json("a.jsonl", '{"n": 1}\n\n{"n": 2}')
    records = list(read_records("s", SourceConfig(path=str(path))))
    assert [record.location for record in records] == [f"{path}, line 1", f"{path}, line 3"]
    assert {record.source for record in records} == {"s"}
    assert read_record("s", SourceConfig(path=str(path)), 1) == records[1]


@pytest.mark.parametrize("row", ["[1]", '["a"]', "[[]]", "[null]"])
def test_a_record_that_is_not_an_object_is_refused_with_its_location(row: str, write_json: Write) -> None:
    with pytest.raises(UserError, match=r"a\.json, record 0: a record must be a JSON object \(got "):
        read(write_json("a.json", row))


def test_a_path_may_begin_with_the_home_folder(
    write_json: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json("a.json", [{"n": 1}])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.json") == [{"n": 1}]


def test_a_missing_path_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.path.*does not exist"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["nowhere.json", "data/nowhere.parquet", "a b", "a/b/c"])
def test_a_path_that_cannot_be_a_hub_id_does_not_exist(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.path.*does not exist \(looked in "):
        read(path)


def test_an_unknown_file_type_is_refused_with_the_known_ones(write_json: Write) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.path: .*'\.xml' is unknown.*Known: .*\.jsonl"):
        read(write_json("a.xml", "<n/>"))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.path: the folder .* contains no file of type \.json, "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"weight": 0.0}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"max_epochs": 0.0}, "max_epochs"),
        ({"max_examples": 0}, "max_examples"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.sources\.<name>\.{key}: must be"):
        SourceConfig(path="x", **options)


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_rename_keys_to_those_of_the_format(write_json: Write) -> None:
    path = write_json("a.json", [{"q": "Who?", "a": "I.", "id": 7}])
    assert read(path, columns={"instruction": "q", "output": "a"}) == [{"instruction": "Who?", "output": "I.", "id": 7}]


def test_columns_can_swap_keys_and_replace_a_key_of_that_name(write_json: Write) -> None:
    path = write_json("a.json", [{"a": 1, "b": 2, "c": 3}])
    assert read(path, columns={"a": "b", "b": "a"}) == [{"a": 2, "b": 1, "c": 3}]
    assert read(path, columns={"a": "b"}) == [{"a": 2, "c": 3}]


def test_a_missing_column_is_refused_with_the_keys_of_the_record(write_json: Write) -> None:
    path = write_json("a.json", [{"q": "Who?", "a": "I."}, {"question": "Who?", "a": "I."}])
    with pytest.raises(UserError) as error:
        read(path, columns={"instruction": "q"})
    assert f"{path}, record 1: data.sources.s.columns reads 'instruction' from 'q'" in str(error.value)
    assert "its keys are: a, question" in str(error.value)


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(write_json: Write, tmp_path: Path) -> Path:
    for name, n in {
        "train.jsonl": 1,
        "train-00000-of-00002.json": 0,
        "trainer.json": 9,
        "test/part.json": 2,
        "validation/deep/part.json": 3,
    }.items():
        write_json(f"d/{name}", json.dumps({"n": n}))
    return tmp_path / "d"


@pytest.mark.parametrize(("split", "found"), [("train", [0, 1]), ("test", [2]), ("validation", [3]), ("trainer", [9])])
def test_a_split_of_a_folder_is_the_files_and_subfolders_of_that_name(
    split: str, found: list[int], folder: Path
) -> None:
    assert [row["n"] for row in read(folder, split=split)] == found


def test_a_missing_split_of_a_folder_is_refused_with_its_files(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        read(folder, split="dev")
    assert "data.sources.s.split: " in str(error.value)
    assert "contains no file or subfolder named 'dev'; it contains: " in str(error.value)
    assert str(Path("test/part.json")) in str(error.value)


def test_a_file_has_no_splits(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.split: 'train', but .* is a single file"):
        read(folder / "train.jsonl", split="train")


@pytest.mark.parametrize("options", [{"subset": "a"}, {"revision": "main"}])
def test_a_local_path_has_neither_subset_nor_revision(options: dict[str, str], folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s: subset and revision are only valid for Hub data sets"):
        read(folder, **options)


def test_source_files_are_listed_in_reading_order(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in source_files("s", SourceConfig(path=str(folder)))]
    assert names == sorted(names)
    assert len(names) == 5


# --- save_to_disk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    one, two = (datasets.Dataset.from_list([{"n": n}, {"n": n + 1}]) for n in (0, 10))
    one.save_to_disk(str(folder / "plain"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(folder / "dict"))
    return folder


def test_a_saved_dataset_is_read_in_order(saved: Path) -> None:
    assert is_saved_dataset(saved / "plain")
    assert read(saved / "plain") == [{"n": 0}, {"n": 1}]
    [first, _] = read_records("s", SourceConfig(path=str(saved / "plain")))
    assert first.location == f"{saved / 'plain'}, record 0"


def test_a_saved_dict_of_datasets_gives_train_or_the_split_that_is_set(saved: Path) -> None:
    assert is_saved_dataset(saved / "dict")
    assert read(saved / "dict") == [{"n": 0}, {"n": 1}]
    assert read(saved / "dict", split="test", max_examples=1) == [{"n": 10}]


def test_a_missing_split_of_a_saved_dict_is_refused_with_the_nearest(saved: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.split: 'tset' is unknown\. Did you mean 'test'\?"):
        read(saved / "dict", split="tset")


def test_a_split_of_a_saved_dataset_without_splits_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.s\.split: 'train', but .* has no splits"):
        read(saved / "plain", split="train")


def test_a_slice_of_a_saved_split_is_read(saved: Path) -> None:
    assert read(saved / "dict", split="test[:1]") == [{"n": 10}]


@pytest.mark.parametrize("options", [{"subset": "a"}, {"revision": "main"}])
def test_a_saved_dataset_has_neither_subset_nor_revision(options: dict[str, str], saved: Path) -> None:
    with pytest.raises(UserError, match="subset and revision are only valid for Hub data sets"):
        read(saved / "plain", **options)


def test_a_broken_saved_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.sources\.s\.path: cannot load .* as a save_to_disk folder"):
        read(tmp_path)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_loaded_with_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"n": 1}, {"n": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"subset": "en", "split": "train[:10%]", "revision": "abc", "max_examples": 1}
    [record] = read_records("s", SourceConfig(path="someone/data.set-1", **options))  # type: ignore[arg-type]
    assert (record.fields, record.location) == ({"n": 1}, "someone/data.set-1, record 0")
    assert read("name") == [{"n": 1}, {"n": 2}]
    assert asked == [
        (("someone/data.set-1", "en"), {"split": "train[:10%]", "revision": "abc", "streaming": False}),
        (("name", None), {"split": "train", "revision": None, "streaming": False}),
    ]


def test_a_hub_id_can_be_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Any:
        n = 0
        while True:
            yield {"n": n}
            n += 1

    def load(*args: Any, streaming: bool, **kwargs: Any) -> Any:
        assert streaming
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("a/b", streaming=True, max_examples=3) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_the_error_of_an_unreachable_hub_says_where_the_path_was_looked_for() -> None:
    with pytest.raises(UserError) as error:
        read("surely-nobody/has-this-data")
    path = "data.sources.s.path: 'surely-nobody/has-this-data'"
    assert f"{path} is not a local file or folder (looked in " in str(error.value)
    assert "loading it from the Hugging Face Hub failed: " in str(error.value)


@pytest.mark.parametrize("raised", [ValueError("Unknown split 'dev'.\nmore"), FileNotFoundError("no such data set")])
def test_errors_of_the_hub_are_told_in_one_line(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as error:
        read("a/b", split="dev")
    assert str(raised).split("\n")[0] in str(error.value)
    assert "more" not in str(error.value)


def test_a_bare_list_of_messages_is_a_conversation(write_json: Callable[..., Path]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [record] = read_records("s", SourceConfig(path=str(write_json("chats.json", [turns]))))
    assert record.fields == {"messages": turns}
