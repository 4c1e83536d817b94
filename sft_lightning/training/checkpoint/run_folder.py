"""The folder of a run: whether it may be written to, and which checkpoint in it a run continues from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.files import damage_of

_BY_LIGHTNING = ("best", "hpc")
"""Values of `--ckpt_path` that Lightning finds itself."""


def check_run_folder(root: Path, folders: Sequence[Path], ckpt_path: str | None) -> None:
    """Check that a run can write to its folder without overwriting another run.

    Args:
        root: `trainer.default_root_dir`.
        folders: The folders that checkpoints are saved in.
        ckpt_path: What the run continues from: a checkpoint, `last`, or `None`.

    Raises:
        UserError: If the folder has results that the run does not continue from, or cannot be written to.
    """
    found = checkpoints_in(folders)
    results = [name for name in ("adapter", "model") if any(root.glob(f"{name}/[!.]*"))]
    results = ["checkpoints", *results] if found else results
    if results and (not ckpt_path or (ckpt_path == "last" and not found)):
        way = "continue it with --ckpt_path last, " if found else ""
        raise UserError(
            f"trainer.default_root_dir: {str(root)!r} holds the {' and '.join(results)} of an earlier run; "
            f"{way}choose another folder, or remove it"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir: cannot write to {str(root)!r}: {error.strerror}; choose another folder"
        ) from error


def checkpoints_in(folders: Sequence[Path]) -> list[Path]:
    """Return the checkpoints of a run: the `last` ones, then the others, each from the newest to the oldest.

    Args:
        folders: The folders that checkpoints are saved in.
    """
    found = [path for folder in folders for path in folder.glob("[!.]*.ckpt")]
    return sorted(found, key=lambda path: (path.name.startswith("last"), path.stat().st_mtime_ns), reverse=True)


def checkpoint_to_load(folders: Sequence[Path], ckpt_path: str | None) -> str | None:
    """Return the path of the checkpoint that `--ckpt_path` means, and say if it is not the one that the user expects.

    Args:
        folders: The folders that the run saves checkpoints in.
        ckpt_path: A checkpoint, `last`, or `None`.

    Returns:
        The path; `None` if there is nothing to load.

    Raises:
        UserError: If the checkpoint is missing or damaged; for `last`, if every checkpoint of the run is damaged.
    """
    if ckpt_path == "last":
        return _last_whole(folders)
    if not ckpt_path or ckpt_path in _BY_LIGHTNING or ":" in ckpt_path.partition("/")[0]:  # a URL or a registry
        return ckpt_path
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"--ckpt_path: {ckpt_path!r} is not a file; name a checkpoint, or use --ckpt_path last")
    if damage := damage_of(path):
        others = (other for other in checkpoints_in([path.parent]) if other != path)
        whole = next((other for other in others if not damage_of(other)), None)
        way = f"the newest whole one is {str(whole)!r}" if whole else "there is no whole one in its folder"
        raise UserError(f"--ckpt_path: the checkpoint {ckpt_path!r} is damaged: {damage}; {way}")
    return ckpt_path


def _last_whole(folders: Sequence[Path]) -> str | None:
    found = checkpoints_in(folders)
    if not found:
        rank_zero_info(f"--ckpt_path last: {folders[0]} has no checkpoint yet; the run starts from the beginning")
        return None
    damaged = []
    for path in found:
        if damage := damage_of(path):
            damaged.append(f"{path} is damaged: {damage}")
            continue
        if damaged or not path.name.startswith("last"):
            why = "; ".join(damaged) or f"{folders[0]} has no last.ckpt"
            rank_zero_info(f"--ckpt_path last: {why}; continuing from {path}, the newest whole checkpoint")
        return str(path)
    raise UserError(f"--ckpt_path last: no whole checkpoint: {'; '.join(damaged)}; start a new run in another folder")
