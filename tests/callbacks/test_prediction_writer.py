from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks import PredictionWriter
from callbacks.partial_predictions import PartialPredictions
from callbacks.prediction_writer import _join
from sft_lightning.__main__ import main
from sft_lightning.errors import UserError
from sft_lightning.models.generation.generate import generate

MADE_WITH = {"the model": "0" * 32, "model.generation": {"seed": 0, "top_k": 5}, "data.batch_size": 2}
Predict = Callable[..., int]


@pytest.fixture
def predict(fit_args: list[str], alpaca_file: Path) -> Predict:
    """Answer 24 prompts in batches of 5; sampled, so that answers tell whether random states are what they were."""
    sampled = "--model.generation={max_new_tokens: 6, temperature: 1.0, seed: 3}"
    data = ["--data.batch_size=5", f"--data.predict_sources={{asked: {{path: {alpaca_file}, format: alpaca}}}}"]
    return lambda *options: main(["predict", *fit_args, *data, sampled, *options])


def kill(predict: Predict, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Predict, and kill the run in the middle of writing a batch."""
    write = PredictionWriter.on_predict_batch_end

    def interrupted(self: PredictionWriter, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        if number == after:
            assert self._file is not None
            self._file.write(json.dumps(outputs[0]) + '\n{"source": "to')
            self._file.flush()
            raise RuntimeError("killed")
        write(self, trainer, module, outputs, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "on_predict_batch_end", interrupted)
        with pytest.raises(RuntimeError, match="killed"):
            predict()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_killed_run_goes_on_where_it_stopped_to_the_same_answers(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(f"--trainer.default_root_dir={tmp_path / 'whole'}") == 0
    whole = rows(tmp_path / "whole")
    kill(predict, monkeypatch, after=3)
    run = tmp_path / "run"
    asked: list[int] = []
    assert not (run / "predictions.jsonl").exists()
    monkeypatch.setattr(
        "sft_lightning.training.module.generate",
        lambda model, tokenizer, prompts, **options: (
            asked.append(len(prompts)) or generate(model, tokenizer, prompts, **options)
        ),
    )
    assert predict() == 0
    assert sum(asked) == 24 - 15
    assert rows(run) == whole
    assert [path.name for path in run.iterdir() if "partial" in path.name] == []
    assert len({row["location"] for row in whole}) == 24


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.generation.seed=4", "model.generation changed: seed 3 → 4"),
        ("--data.batch_size=4", "data.batch_size changed: 5 → 4"),
        ("--data.template=vicuna_v1.1", "the prompts changed"),
        ("--model.dtype=bfloat16", "the model changed"),
    ],
)
def test_another_model_or_other_prompts_do_not_go_on(
    option: str,
    said: str,
    predict: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kill(predict, monkeypatch, after=1)
    partial = tmp_path / "run" / "predictions.jsonl.partial"
    before = partial.read_bytes()
    assert predict(option) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "remove the file to answer everything again" in error
    assert partial.read_bytes() == before


def written(tmp_path: Path, *lines: str, end: str = "") -> PartialPredictions:
    path = tmp_path / "predictions.jsonl.partial"
    path.write_text("".join(f"{line}\n" for line in [json.dumps(MADE_WITH), *lines]) + end)
    return PartialPredictions(path)


def test_a_torn_line_and_a_batch_that_is_not_whole_are_cut_off(tmp_path: Path) -> None:
    partial = written(tmp_path, '{"a": 1}', '{"a": 2}', '{"a": 3}', end='{"a": 4')
    partial.check_made_with(MADE_WITH)
    assert partial.whole_batches([2, 2, 1]) == (1, 2)
    with partial.open_after(2) as file:
        file.write('{"a": "new"}\n')
    assert partial.path.read_text().splitlines()[1:] == ['{"a": 1}', '{"a": 2}', '{"a": "new"}']


def test_a_file_that_was_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl.partial"
    path.write_text('{"the model"')
    partial = PartialPredictions(path)
    partial.check_made_with(MADE_WITH)
    assert partial.whole_batches([2]) == (0, 0)
    partial.open_after(0).close()
    assert json.loads(path.read_text()) == MADE_WITH


def test_everything_may_be_answered_already(tmp_path: Path) -> None:
    assert written(tmp_path, "{}", "{}", "{}").whole_batches([2, 1, 0]) == (2, 3)


def test_answers_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    partial = written(tmp_path, "{}")
    parts = [tmp_path / f"predictions.jsonl.partial-{rank}-of-2" for rank in range(2)]
    with pytest.raises(UserError, match="another number of processes"):
        PartialPredictions(parts[0]).check_alone(parts)
    partial.check_alone([partial.path])


def test_rows_of_several_processes_are_joined_in_the_order_of_the_data(tmp_path: Path) -> None:
    parts = [tmp_path / f"part-{rank}" for rank in range(2)]
    for path, numbers in zip(parts, ([0, 1, 4, 5, 8], [2, 3, 6, 7]), strict=True):
        path.write_text("made with\n" + "".join(f"{number}\n" for number in numbers))
    _join(parts, 2, tmp_path / "predictions.jsonl")
    assert (tmp_path / "predictions.jsonl").read_text().split() == [str(number) for number in range(9)]
    assert not any(path.exists() for path in parts)
