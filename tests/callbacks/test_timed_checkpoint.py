from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


@pytest.mark.parametrize(("interval", "steps"), [("00:00:00", [1, 2, 3, 4, 5, 6, 7, 8]), ("01:00:00", [8])])
def test_the_clock_is_looked_at_when_an_optimizer_step_has_ended(
    interval: str, steps: list[int], fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = ModelCheckpoint._save_checkpoint

    def note(self: ModelCheckpoint, trainer: object, filepath: str) -> None:
        save(self, trainer, filepath)  # type: ignore[arg-type]
        if Path(filepath).name == "last.ckpt":
            saved.append(torch.load(filepath, weights_only=True)["global_step"])

    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", note)
    timed = f"{{class_path: callbacks.TimedCheckpoint, init_args: {{train_time_interval: {interval}}}}}"
    run = fit(
        f"--trainer.callbacks+={timed}",
        "--trainer.accumulate_grad_batches=3",
        "--data.packing=none",
    )
    assert sorted(set(saved)) == steps
    assert sorted(path.name for path in (run / "checkpoints").glob("*.ckpt")) == ["last.ckpt", "step=8.ckpt"]
