from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_lightning.errors import UserError
from sft_lightning.models.export.target import (
    MANIFEST,
    check_target,
    is_export_of,
    mend_folders,
    replaced_file,
    replaced_folder,
)


def check(folder: Path, *inputs: Path, overwrite: bool = False) -> None:
    check_target(folder, option="merge --output_dir", written_by="merged_into", inputs=inputs, overwrite=overwrite)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder with a file."""
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    return folder


def test_a_new_and_an_empty_folder_are_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(tmp_path / "new" / "merged", tmp_path / "adapter")
    check(tmp_path / "empty", tmp_path / "adapter")


def test_a_folder_with_files_is_kept(full: Path) -> None:
    with pytest.raises(UserError, match=r"^merge --output_dir: '.*full' is not empty; .*--overwrite true$"):
        check(full)


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"base": "an adapter"}'])
def test_what_the_command_did_not_write_is_not_overwritten(full: Path, manifest: str | None) -> None:
    if manifest is not None:
        (full / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match="was not written by this command"):
        check(full, overwrite=True)


def test_an_earlier_output_is_overwritten_on_request(full: Path) -> None:
    (full / MANIFEST).write_text(json.dumps({"merged_into": "original"}))
    check(full, overwrite=True)


@pytest.mark.parametrize("named", ["run", "run/adapter", "run/../run"])
def test_an_input_and_its_parents_are_never_replaced(tmp_path: Path, named: str) -> None:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / MANIFEST).write_text(json.dumps({"merged_into": "original"}))
    with pytest.raises(UserError, match=r"would replace '.*run/adapter', which the command reads"):
        check(tmp_path / named, adapter, overwrite=True)


def test_a_file_and_a_symbolic_link_are_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file; name a new folder"):
        check(full / "thesis.tex")
    (tmp_path / "link").symlink_to(full)
    with pytest.raises(UserError, match="is a symbolic link"):
        check(tmp_path / "link", overwrite=True)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(full: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_folder(full) as target:
        (target / "half").rename(target / "whole")
    assert [file.name for file in full.iterdir()] == ["thesis.tex"]
    with replaced_folder(full) as target:
        (target / "whole").touch()
    assert [file.name for file in full.iterdir()] == ["whole"]
    assert [folder.name for folder in full.parent.iterdir()] == ["full"]


def test_a_folder_that_a_killed_process_had_moved_away_comes_back(full: Path) -> None:
    full.rename(full.with_name(".full.old"))
    with pytest.raises(FileNotFoundError), replaced_folder(full) as target:
        (target / "half").rename(target / "whole")
    assert [file.name for file in full.iterdir()] == ["thesis.tex"]


def test_folders_that_a_killed_process_was_replacing_are_restored_and_its_leftovers_removed(tmp_path: Path) -> None:
    for name in (".a.adapter.new", ".a.adapter.old", "b.adapter", ".b.adapter.old", ".other.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    mend_folders(tmp_path, "*.adapter")
    found = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert found == {"a.adapter": ".a.adapter.old", "b.adapter": "b.adapter", ".other.new": ".other.new"}
    mend_folders(tmp_path / "missing", "*.adapter")


def test_an_export_is_known_by_the_steps_in_its_manifest(tmp_path: Path) -> None:
    assert not is_export_of(tmp_path, 8)
    (tmp_path / "run_manifest.json").write_text('{"optimizer_steps": 8}')
    assert not is_export_of(tmp_path, 8)  # without weights
    (tmp_path / "adapter_model.safetensors").touch()
    assert is_export_of(tmp_path, 8)
    assert not is_export_of(tmp_path, 9)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with replaced_file(file) as opened:
        opened.write(b"first")
        assert not file.exists()
    with pytest.raises(TypeError), replaced_file(file) as opened:
        opened.write("half")  # type: ignore[arg-type]
    assert [each.name for each in file.parent.iterdir()] == ["a.txt"]
    assert file.read_bytes() == b"first"
