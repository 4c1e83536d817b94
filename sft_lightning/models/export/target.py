"""Files and folders that are written as a whole or not at all, and never over what a command did not write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.trained_base import MANIFEST as MANIFEST


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` when the block ends.

    After an error in the block, `folder` is unchanged, and the temporary folder is deleted.
    """
    mend_folder(folder)
    temporary, old = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def mend_folder(folder: Path) -> None:
    """Remove what a process that was killed in `replaced_folder` left; restore the folder if it was being replaced."""
    temporary, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def mend_folders(parent: Path, pattern: str) -> None:
    """Do the same for all folders of a parent.

    Args:
        parent: The parent; may be missing.
        pattern: Pattern of the folders' names, such as `*.adapter`.
    """
    for left in [*parent.glob(f".{pattern}.new"), *parent.glob(f".{pattern}.old")]:
        mend_folder(parent / left.name[1:].rpartition(".")[0])


def is_export_of(folder: Path, optimizer_steps: int) -> bool:
    """Whether a folder holds the exported weights of a run.

    Args:
        folder: The folder; may be missing.
        optimizer_steps: Optimizer steps that the run has taken.
    """
    return _manifest(folder).get("optimizer_steps") == optimizer_steps and any(folder.glob("*.safetensors"))


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


@contextmanager
def replaced_file(file: Path) -> Iterator[IO[bytes]]:
    """Yield an empty temporary file, which gets the name of `file` when the block ends and all of it is on the disk.

    After an error in the block, `file` is unchanged, and the temporary file, `.<name>.<pid>.tmp`, is deleted.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(folder: Path, *, option: str, written_by: str, inputs: Iterable[Path], overwrite: bool) -> None:
    """Check that a command may write a folder: a new or empty one, or with `overwrite` one that it wrote before.

    Args:
        folder: The folder to write.
        option: The command and its option, for errors.
        written_by: A key that only this command's `run_manifest.json` has.
        inputs: Files and folders that the command reads.
        overwrite: Replace an earlier output of the same command.

    Raises:
        UserError: If writing would delete something else: an input, a folder that contains one, a file, or a folder
            that the command did not write.
    """
    where = f"{option}: {str(folder)!r}"
    if folder.is_symlink():
        raise UserError(f"{where} is a symbolic link; name the folder itself")
    resolved = folder.resolve()
    for path in (each.resolve() for each in inputs):
        if resolved == path or resolved in path.parents:
            raise UserError(f"{where} would replace {str(path)!r}, which the command reads; name another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{where} is a file; name a new folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{where} is not empty; name another folder, or replace an earlier output with --overwrite true"
        )
    if written_by not in _manifest(folder):
        raise UserError(f"{where} was not written by this command, so it is not replaced; name another folder")


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder; an empty one if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
