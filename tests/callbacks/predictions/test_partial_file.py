from __future__ import annotations

import json
from pathlib import Path

import pytest

from callbacks.predictions.partial_file import PartialPredictions, join_parts
from sft_lightning.errors import UserError

MADE_WITH = {"the model": "0" * 32, "model.generation": {"seed": 0, "top_k": 5}, "data.batch_size": 2}


def written(tmp_path: Path, *lines: str, end: str = "") -> PartialPredictions:
    path = tmp_path / "predictions.jsonl.partial"
    path.write_text("".join(f"{line}\n" for line in [json.dumps(MADE_WITH), *lines]) + end)
    return PartialPredictions(path)


def test_an_incomplete_line_and_an_incomplete_batch_are_cut_off(tmp_path: Path) -> None:
    partial = written(tmp_path, '{"a": 1}', '{"a": 2}', '{"a": 3}', end='{"a": 4')
    partial.check_made_with(MADE_WITH)
    assert partial.whole_batches([2, 2, 1]) == (1, 2)
    with partial.open_after(2) as file:
        file.write('{"a": "new"}\n')
    assert partial.path.read_text().splitlines()[1:] == ['{"a": 1}', '{"a": 2}', '{"a": "new"}']


def test_a_file_with_an_incomplete_header_is_written_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl.partial"
    path.write_text('{"the model"')
    partial = PartialPredictions(path)
    partial.check_made_with(MADE_WITH)
    assert partial.whole_batches([2]) == (0, 0)
    partial.open_after(0).close()
    assert json.loads(path.read_text()) == MADE_WITH


def test_all_batches_may_be_complete(tmp_path: Path) -> None:
    assert written(tmp_path, "{}", "{}", "{}").whole_batches([2, 1, 0]) == (2, 3)


def test_files_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    partial = written(tmp_path, "{}")
    parts = [tmp_path / f"predictions.jsonl.partial-{rank}-of-2" for rank in range(2)]
    with pytest.raises(UserError, match="another number of processes"):
        PartialPredictions(parts[0]).check_alone(parts)
    partial.check_alone([partial.path])


def test_the_rows_of_several_processes_are_joined_in_the_order_of_the_data(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{rank}" for rank in range(2)]
    for path, numbers in zip(parts, ([0, 1, 4, 5, 8], [2, 3, 6, 7]), strict=True):
        path.write_text("made with\n" + "".join(f"{number}\n" for number in numbers))
    join_parts(parts, 2, tmp_path / "predictions.jsonl")
    assert (tmp_path / "predictions.jsonl").read_text().split() == [str(number) for number in range(9)]
    assert not any(path.exists() for path in parts)
