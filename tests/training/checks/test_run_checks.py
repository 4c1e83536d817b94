from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from sft_lightning.training.checks import run_checks
from sft_lightning.training.checks.hooks import RunCheck, is_logging_point
from sft_lightning.training.checks.run_checks import RunChecks

HOOKS: dict[str, tuple[Any, ...]] = {
    "on_load_checkpoint": ("checkpoint",),
    "on_fit_start": (),
    "on_train_start": (),
    "on_train_batch_start": ("batch", 3),
    "on_before_optimizer_step": ("optimizer",),
    "on_train_batch_end": ("batch", 3),
    "on_validation_start": (),
    "on_validation_batch_end": ("batch", 3, 1),
    "on_validation_end": (),
    "on_train_epoch_end": (),
    "on_train_end": (),
}


class Recording(RunCheck):
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        return lambda *arguments: Recording.calls.append((name, *arguments))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_check_is_asked_in_every_hook_of_a_training_run(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checks, "CHECKS", (Recording, Recording))
    monkeypatch.setattr(Recording, "calls", [])
    outputs = (None,) if hook in ("on_train_batch_end", "on_validation_batch_end") else ()
    for stage in ("fit", "validate"):
        trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))
        getattr(RunChecks(), hook)(trainer, "module", *outputs, *HOOKS[hook])
    assert Recording.calls == [(hook, "module", *HOOKS[hook])] * 2


@pytest.mark.parametrize(("step", "every", "expected"), [(1, 10, True), (5, 10, False), (10, 10, True), (10, 0, False)])
def test_the_first_step_and_every_logged_one_are_logging_points(step: int, every: int, expected: bool) -> None:
    trainer = SimpleNamespace(global_step=step, log_every_n_steps=every)
    assert is_logging_point(SimpleNamespace(trainer=trainer)) is expected  # type: ignore[arg-type]
