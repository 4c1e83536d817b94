"""The folder that an export or a merge writes: as a whole or not at all, and never over what it did not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_lightning.errors import UserError

MANIFEST = "run_manifest.json"


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `folder` when the block ends.

    After an error in the block, `folder` is unchanged, and the temporary folder is deleted.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # a process was killed between the two renames below
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
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
    if not _is_written_by(folder, written_by):
        raise UserError(f"{where} was not written by this command, so it is not replaced; name another folder")


def _is_written_by(folder: Path, key: str) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and key in manifest
