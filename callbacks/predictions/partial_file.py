"""The predictions of an unfinished run: a header line with everything that answers depend on, then one line each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

from sft_lightning.errors import UserError

_WAYS_OUT = "change it back, remove the file to answer everything again, or choose another trainer.default_root_dir"


class PartialPredictions:
    """The file that one process writes.

    A killed run may leave an incomplete last line, or an incomplete batch; both are cut off.

    Args:
        path: The file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = _whole_lines(path)
        self._header = lines[0] if lines else b""
        self._rows = lines[1:]

    def check_alone(self, expected: Sequence[Path]) -> None:
        """Check that the folder has no unfinished predictions of another number of processes.

        Args:
            expected: The files that the processes of this run write.

        Raises:
            UserError: If there are other files.
        """
        stem = expected[0].name.partition(".partial")[0]
        for other in sorted(self.path.parent.glob(f"{stem}.partial*")):
            if other not in expected:
                raise UserError(f"{other}: was written by a run with another number of processes; {_WAYS_OUT}")

    def check_made_with(self, made_with: Mapping[str, Any]) -> None:
        """Check that the file was written with the same model, prompts and settings; they are the header of a new file.

        Args:
            made_with: Everything that answers depend on. The keys are the words of the error message.

        Raises:
            UserError: If something has changed.
        """
        now = json.loads(json.dumps(made_with))
        before = json.loads(self._header) if self._rows else now
        for key, value in now.items():
            if before.get(key) != value:
                raise UserError(
                    f"{self.path}: has {len(self._rows):,} answers of an unfinished run, but {key} changed since"
                    f"{_difference(before.get(key), value)}; {_WAYS_OUT}"
                )
        if not self._rows:
            self._header = json.dumps(now).encode() + b"\n"

    def whole_batches(self, batch_lengths: Sequence[int]) -> tuple[int, int]:
        """Return the number of complete batches at the start of the file, and the number of their rows.

        Args:
            batch_lengths: Number of rows of each batch.
        """
        batches = rows = 0
        for length in batch_lengths:
            if not length or rows + length > len(self._rows):
                break
            batches, rows = batches + 1, rows + length
        return batches, rows

    def open_after(self, num_rows: int) -> TextIO:
        """Open the file for appending after its first `num_rows` rows; the rest is cut off."""
        if num_rows:
            os.truncate(self.path, sum(map(len, [self._header, *self._rows[:num_rows]])))
        else:
            self.path.write_bytes(self._header)
        return self.path.open("a", encoding="utf-8")


def part_paths(target: Path, world_size: int) -> list[Path]:
    """Return the file that each process writes, by rank.

    Args:
        target: The file of all predictions.
        world_size: Number of processes.
    """
    if world_size == 1:
        return [target.with_name(f"{target.name}.partial")]
    return [target.with_name(f"{target.name}.partial-{rank}-of-{world_size}") for rank in range(world_size)]


def join_parts(parts: Sequence[Path], batch_size: int, target: Path) -> None:
    """Write the predictions of all processes to one file, in the order of the data, and remove the parts.

    The file appears when it is complete.

    Args:
        parts: The files of the processes; batch n was answered by process n modulo their number.
        batch_size: Rows per batch.
        target: The file to write.
    """
    files = [path.open(encoding="utf-8") for path in parts]
    joined = target.with_name(f"{target.name}.joined")
    try:
        for file in files:
            next(file)  # the header
        with joined.open("w", encoding="utf-8") as out:
            for number in count():
                rows = list(islice(files[number % len(files)], batch_size))
                if not rows:
                    break
                out.writelines(rows)
    finally:
        for file in files:
            file.close()
    joined.replace(target)
    for path in parts:
        path.unlink()


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines before the first incomplete one."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # nothing, or an incomplete line, follows the last line feed
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line + b"\n")
    return lines


def _difference(before: Any, now: Any) -> str:
    """Return a readable difference of two values; empty for hashes."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        changes = [f"{key} {before.get(key)} → {value}" for key, value in now.items() if before.get(key) != value]
        return f": {', '.join(changes)}"
    is_hash = isinstance(now, str) and len(now) == 32
    return "" if is_hash else f": {before} → {now}"
