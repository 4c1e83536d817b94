from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.run_folder import check_run_folder, checkpoint_to_load, checkpoints_in


@pytest.mark.parametrize(
    ("files", "ckpt_path", "message"),
    [
        ([], None, None),
        (["config.yaml", "events.out.tfevents.1"], None, None),  # stopped before anything was trained
        (["checkpoints/.last.ckpt.123.tmp"], "last", None),  # killed while it wrote its first checkpoint
        ([], "last", None),
        (["checkpoints/last.ckpt"], "last", None),
        (["checkpoints/step=8.ckpt"], "run/checkpoints/step=8.ckpt", None),
        (
            ["checkpoints/last.ckpt", "adapter/adapter_config.json"],
            None,
            "checkpoints and adapter .*_path last,",
        ),
        (["checkpoints/step=8.ckpt"], "last", None),
        (
            ["checkpoints/step=8.ckpt"],
            None,
            r"holds the checkpoints of an earlier run; continue it with --ckpt_path last",
        ),
        (["model/config.json"], "last", r"holds the model of an earlier run; choose another folder, or remove it"),
    ],
)
def test_a_run_folder_must_be_new_or_continued(
    files: list[str], ckpt_path: str | None, message: str | None, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    if message is None:
        check_run_folder(tmp_path / "run", [tmp_path / "run" / "checkpoints"], ckpt_path)
        assert (tmp_path / "run").is_dir()
    else:
        with pytest.raises(UserError, match=message):
            check_run_folder(tmp_path / "run", [tmp_path / "run" / "checkpoints"], ckpt_path)


def test_a_run_folder_that_cannot_be_written_to_gives_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"default_root_dir: cannot write to '.*run': Not a directory"):
        check_run_folder(tmp_path / "file" / "run", [], None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("sft_lightning.training.checkpoint.run_folder.rank_zero_info", lines.append)
    return lines


def save(folder: Path, *names: str) -> None:
    """Write a checkpoint for each name, a second apart."""
    for second, name in enumerate(names):
        torch.save({"weights": torch.arange(1000.0)}, folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (second, second))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "bits":
        middle = content.index(torch.arange(500.0, 504.0).numpy().tobytes())
        content[middle : middle + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(content)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "header": b"XX" + content[2:]}[how])


def test_last_is_the_last_checkpoint_although_another_is_newer(tmp_path: Path, said: list[str]) -> None:
    save(tmp_path, "step=2", "last", "step=4")
    assert checkpoint_to_load([tmp_path], "last") == str(tmp_path / "last.ckpt")
    assert said == []
    assert [path.stem for path in checkpoints_in([tmp_path])] == ["last", "step=4", "step=2"]


@pytest.mark.parametrize("how", ["cut", "empty", "header", "bits"])
def test_a_damaged_last_checkpoint_gives_way_to_the_newest_whole_one(how: str, tmp_path: Path, said: list[str]) -> None:
    save(tmp_path, "step=2", "step=4", "step=6", "last")
    damage(tmp_path / "last.ckpt", how)
    damage(tmp_path / "step=6.ckpt", "bits")
    assert checkpoint_to_load([tmp_path], "last") == str(tmp_path / "step=4.ckpt")
    [line] = said
    assert "last.ckpt is damaged" in line
    assert "step=6.ckpt is damaged: the checksum of " in line
    assert line.endswith("step=4.ckpt, the newest whole checkpoint")


def test_without_a_last_checkpoint_the_newest_continues_the_run(tmp_path: Path, said: list[str]) -> None:
    save(tmp_path, "step=4", "step=10")
    assert checkpoint_to_load([tmp_path], "last") == str(tmp_path / "step=10.ckpt")
    assert "has no last.ckpt; continuing from" in said[0]


def test_without_any_checkpoint_the_run_starts_from_the_beginning(tmp_path: Path, said: list[str]) -> None:
    assert checkpoint_to_load([tmp_path], "last") is None
    assert "has no checkpoint yet; the run starts from the beginning" in said[0]


def test_a_damaged_checkpoint_is_refused_with_the_newest_whole_one(tmp_path: Path) -> None:
    save(tmp_path, "step=2", "step=4")
    damage(tmp_path / "step=4.ckpt", "bits")
    with pytest.raises(UserError, match=r"step=4.ckpt' is damaged: .*; the newest whole one is '.*step=2.ckpt'"):
        checkpoint_to_load([tmp_path], str(tmp_path / "step=4.ckpt"))
    damage(tmp_path / "step=2.ckpt", "cut")
    with pytest.raises(UserError, match="there is no whole one in its folder"):
        checkpoint_to_load([tmp_path], str(tmp_path / "step=4.ckpt"))
    with pytest.raises(UserError, match="--ckpt_path last: no whole checkpoint: "):
        checkpoint_to_load([tmp_path], "last")


@pytest.mark.parametrize("name", ["missing.ckpt", ""])
def test_a_checkpoint_that_is_missing_or_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--ckpt_path: .* is not a file; name a checkpoint, or use --ckpt_path last"):
        checkpoint_to_load([tmp_path], str(tmp_path / name))


@pytest.mark.parametrize("path", [None, "best", "hpc", "s3://bucket/step=2.ckpt", "registry:model"])
def test_what_lightning_finds_itself_is_left_to_it(path: str | None, tmp_path: Path) -> None:
    assert checkpoint_to_load([tmp_path], path) == path
