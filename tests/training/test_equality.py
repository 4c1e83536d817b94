"""Covers sft_lightning.training.module, sft_lightning.training.losses and sft_lightning.data.plan.

Every split of a step has the same gradient, and every interrupted run ends in the same bits; by the scripts that write
docs/equality.md.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lightning.training.checks import run_checks

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> Any:
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(_BENCHMARKS))


gradients, resume = _load("equality_gradients"), _load("equality_resume")

ALONE = [split for split in gradients.all_splits(1) if split.batch_size in (1, 4) and split.accumulate < 24]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved: Path = gradients.save_model(tmp_path_factory.mktemp("equality"))
    return saved


def ids(split: Any) -> str:
    return f"{split.mode}-{split.packing}-{split.batch_size}x{split.accumulate}"


@pytest.mark.parametrize(
    "split",
    [
        pytest.param(split, marks=[] if split.packing == "best_fit" else [pytest.mark.slow], id=ids(split))
        for split in ALONE
    ],
)
def test_every_split_of_a_step_has_the_gradient_of_a_bare_loop(split: Any, model: Path) -> None:
    measured = gradients.measure(split, model)
    assert measured.difference <= gradients.TOLERANCE
    assert (measured.steps > 1) is (split.accumulate * split.batch_size < 20)


def test_a_mean_of_means_is_found_to_have_another_gradient(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        sums = self(batch)
        return sums.loss / sums.weight  # type: ignore[no-any-return]

    monkeypatch.setattr(gradients.CausalLMModule, "training_step", mean_of_means)
    monkeypatch.setattr(run_checks, "CHECKS", ())  # the run's own would stop it
    assert gradients.measure(gradients.Split("full", "none", 2, 4, 1), model).difference > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_gradient_is_the_same_over_several_processes(processes: int, model: Path) -> None:
    measured = gradients.measure_together(gradients.all_splits(processes), model)
    assert len(measured) == len(gradients.all_splits(processes))
    assert max(each.difference for each in measured) <= gradients.TOLERANCE


@pytest.fixture(scope="module")
def interrupted(model: Path) -> Path:
    """A run with dropout in one process, which left a checkpoint at every moment; and a streamed one."""
    for streams in (False, True):
        resume.train(resume.Run("lora", 1, True, streams=streams), model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("moment", resume.MOMENTS)
def test_a_run_continued_from_any_moment_ends_in_the_same_bits(moment: str, interrupted: Path) -> None:
    run = resume.Run("lora", 1, True, moment, 1, streams=moment == "streaming")
    resume.train(run, interrupted)
    assert resume.differences(run, interrupted) == ([], 0.0)


@pytest.mark.slow
def test_a_run_that_ends_in_other_bits_is_found(interrupted: Path) -> None:
    run = resume.Run("lora", 1, True, "mid epoch", 1)
    resume.train(run, interrupted)
    tampered = replace(run, mode="tampered with")
    for of, to in ((run, tampered), (run.uninterrupted, tampered.uninterrupted)):
        to.folder(interrupted).mkdir(parents=True, exist_ok=True)
        for name in ("seen.json", "end.ckpt"):
            (to.folder(interrupted) / name).write_bytes((of.folder(interrupted) / name).read_bytes())
    end = tampered.folder(interrupted) / "end.ckpt"
    state = torch.load(end, weights_only=True)
    state["random_states"][0]["torch"][0] += 1
    next(iter(state["state_dict"].values())).view(-1)[0].add_(1e-7)
    torch.save(state, end)
    assert resume.differences(tampered, interrupted) == (["weights", "random states"], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("started_by", "processes"), [(1, 1), (2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("mode", resume.MODES)
def test_every_mode_is_continued_by_the_same_and_by_another_number_of_processes(
    mode: str, started_by: int, processes: int, model: Path
) -> None:
    missing = [run for run in resume.uninterrupted(started_by, (mode,)) if not run.folder(model).exists()]
    if missing:
        resume.train_together(missing, model)
    runs = list(resume.continued(processes, started_by, (mode,)))
    resume.train_together(runs, model)
    cells = {resume.cell(run, model).split(",")[0] for run in runs}
    assert cells == ({"bits"} if started_by == processes else {"rows"})


def test_the_equality_page_has_every_mode_and_every_split() -> None:
    guide = (_BENCHMARKS.parent / "docs" / "equality.md").read_text(encoding="utf-8")
    found = [
        float(each)
        for each in re.findall(r"^\| (?:full|lora) \| (?:none|best_fit|concat) \|.* (\S+) \|$", guide, re.MULTILINE)
    ]
    assert len(found) == sum(len(gradients.all_splits(processes)) for processes in (1, 2, 4))
    assert max(found) <= gradients.TOLERANCE
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| bits \| bits \| rows, \S+ \| rows, \S+ \|$", guide, re.MULTILINE)
    assert rows == [(mode, moment) for mode in resume.MODES for moment in resume.MOMENTS]
