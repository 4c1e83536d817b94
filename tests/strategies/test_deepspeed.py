"""ZeRO in two real processes over gloo, where DeepSpeed is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.errors import UserError
from sft_lightning.strategies.deepspeed import DeepSpeedZeRO

Logged = Callable[[Path, str], list[float]]
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="needs the deepspeed extra")


@pytest.mark.skipif(INSTALLED, reason="DeepSpeed is installed")
def test_without_deepspeed_the_way_out_is_said() -> None:
    with pytest.raises(UserError, match=r"pip install 'sft-lightning\[deepspeed\]', or use fsdp2"):
        DeepSpeedZeRO()


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "stage"), [("lora", 1), ("full", 2), ("qlora", 2)])
def test_zero_learns_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, mode: str, stage: int
) -> None:
    runs(tmp_path / "two", mode, processes=2, strategy=f"deepspeed_stage_{stage}")
    one = alone(mode)
    for name in ("train/loss", "val/loss"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(one, name), rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_a_zero_run_continues(runs: Any, logged: Logged, tmp_path: Path) -> None:
    where: Any = {"processes": 2, "strategy": "deepspeed_stage_2"}
    two = ("--trainer.max_epochs=2",)
    every_3 = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={step}",
    )
    runs(tmp_path / "parts", "lora", *two, *every_3, **where)
    [checkpoint] = (tmp_path / "parts/checkpoints").glob("step=3.ckpt")
    runs(tmp_path / "again", "lora", *two, f"--ckpt_path={checkpoint}", **where)
    expected = logged(tmp_path / "parts", "train/loss")[3:]
    assert logged(tmp_path / "again", "train/loss") == pytest.approx(expected, rel=1e-5)


@needs_deepspeed
def test_a_json_leaves_no_place_for_keys(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="no place for stage"):
        DeepSpeedZeRO(stage=1, config=str(tmp_path / "ds.json"))
