from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks import PredictionWriter
from sft_lightning.__main__ import main
from sft_lightning.models.generation.generate import generate

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


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_answers(
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
        ("--model.generation.seed=4", "model.generation changed since: seed 3 → 4"),
        ("--data.batch_size=4", "data.batch_size changed since: 5 → 4"),
        ("--data.template=vicuna_v1.1", "the prompts changed since"),
        ("--model.dtype=bfloat16", "the model changed since"),
    ],
)
def test_another_model_or_other_prompts_are_refused(
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
