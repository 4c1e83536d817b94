from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_lightning.__main__ import main

FIRST = "--trainer.callbacks+=callbacks.EvaluateFirst"
HELD_OUT = "--data.val_fraction=0.2"


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(next(run.glob("events*")))).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_validation_at_step_0_is_of_the_untrained_model(fit: Callable[..., Path]) -> None:
    run = fit(
        HELD_OUT,
        FIRST,
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        "--model.optimizer.init_args.lr=0.05",
    )
    (first, before), (_, after) = scalars(run, "val/loss")
    assert first == 0
    assert after < before - 0.01
    [(_, start), *_] = scalars(run, "val/perplexity")
    assert start == pytest.approx(torch.tensor(before).exp().item(), rel=1e-4)
    run.rename(run.with_name("trained"))
    frozen = fit(
        HELD_OUT, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--model.optimizer.init_args.lr=0"
    )
    assert scalars(frozen, "val/loss")[0][1] == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_evaluating_first_changes_no_learned_weight(fit: Callable[..., Path]) -> None:
    learned = []
    for extra in ((), (FIRST,)):
        run = fit(HELD_OUT, "--trainer.max_steps=4", "--model.adapter.dropout=0.3", *extra)
        learned.append(load_file(run / "adapter" / "adapter_model.safetensors"))
        checkpoints = {path.name for path in (run / "checkpoints").glob("*.ckpt")}
        assert "step=0.ckpt" not in checkpoints
        run.rename(run.with_name(f"run{len(learned)}"))
    assert all(torch.equal(tensor, learned[1][name]) for name, tensor in learned[0].items())


def test_a_continued_run_does_not_evaluate_first_again(fit: Callable[..., Path]) -> None:
    options = (HELD_OUT, FIRST, "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2")
    run = fit(*options, "--trainer.max_steps=1")
    assert [step for step, _ in scalars(run, "val/loss")] == [0, 0]  # before that step, and after it
    for events in run.glob("events*"):
        events.unlink()
    fit(*options, "--trainer.max_steps=3", "--ckpt_path=last")
    assert [step for step, _ in scalars(run, "val/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "set data.val_sources or data.val_fraction"),
        ([HELD_OUT, "--trainer.limit_val_batches=0"], "cannot be combined"),
    ],
)
def test_evaluating_first_requires_validation_data(
    options: list[str], said: str, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit_args, FIRST, *options]) == 2
    error = capsys.readouterr().err
    assert "callbacks.EvaluateFirst: " in error
    assert said in error


EVERY = "--trainer.callbacks+={class_path: callbacks.EvaluateEvery, init_args: {every_n_steps: %d}}"


def test_validations_count_optimizer_steps_and_include_the_last(fit: Callable[..., Path]) -> None:
    options = (HELD_OUT, EVERY % 2, "--trainer.accumulate_grad_batches=3", "--data.packing=none")
    run = fit(*options, "--trainer.max_steps=5", "--trainer.max_epochs=-1", "--model.lr_scheduler.name=constant")
    assert [step for step, _ in scalars(run, "val/loss")] == [1, 3, 4]  # after steps 2, 4 and 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([EVERY % 2], "set data.val_sources or data.val_fraction"),
        ([EVERY % 0, HELD_OUT], "every_n_steps must be at least 1 (got 0)"),
        ([EVERY % 2, HELD_OUT, "--trainer.val_check_interval=4"], "cannot be combined with trainer.val_check_interval"),
        (
            [HELD_OUT, EVERY.replace("%d", "2, every_n_epochs: 1")],
            "set every_n_steps or every_n_epochs, not both",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(
    options: list[str], said: str, fit_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit_args, *options]) == 2
    error = capsys.readouterr().err
    assert "callbacks.EvaluateEvery: " in error
    assert said in error
