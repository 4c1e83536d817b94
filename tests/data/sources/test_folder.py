from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sft_lightning.data.sources.folder import folder_files
from sft_lightning.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of JSON, and everything that tools leave beside them."""
    for name in (
        "a.json",
        "b/c.jsonl",
        ".hidden.json",
        ".git/d.json",
        "json/default-1a/0.0.0/dataset_info.json",
        "json/default-1a/0.0.0/json-train.arrow",
        "saved/state.json",
        "saved/data-00000-of-00001.arrow",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(folder: Path, **options: str) -> list[str]:
    files = folder_files(folder, key="data.sources.s", **options)
    return [str(path.relative_to(folder)) for path in files]


def test_caches_and_hidden_files_are_no_data(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert names(folder) == ["a.json", "b/c.jsonl"]
    assert not caplog.records


def test_of_several_types_the_commonest_is_read_and_a_warning_says_so_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "a.parquet").touch()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert names(folder) == ["a.json", "b/c.jsonl"]
    [record] = caplog.records
    assert f"reads the 2 JSON files of '{folder}' and leaves out the others (1 .parquet)" in record.message
    assert "set data.sources.s.glob" in record.message


def test_arrow_files_without_a_cache_beside_them_are_data(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").touch()
    assert names(tmp_path) == ["a.arrow"]


def test_a_pattern_chooses_files_of_all_types(folder: Path) -> None:
    (folder / "a.parquet").touch()
    assert names(folder, glob="a.*") == ["a.json", "a.parquet"]
    assert names(folder, glob="b/*.jsonl") == ["b/c.jsonl"]
    with pytest.raises(UserError, match=r"data\.sources\.s\.glob: '\*\.csv' matches no data file .* a\.json"):
        names(folder, glob="*.csv")


def test_a_folder_of_caches_alone_has_no_data(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").touch()
    (tmp_path / "part.arrow").touch()
    with pytest.raises(UserError, match="contains no file of type"):
        names(tmp_path)
