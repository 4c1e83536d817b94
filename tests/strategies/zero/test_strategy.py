"""ZeRO in two real processes over gloo: losses, checkpoints and exports are those of one process."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_lightning.errors import UserError
from sft_lightning.strategies.zero.config import YamlSettings
from sft_lightning.strategies.zero.strategy import DeepSpeedZeRO

Logged = Callable[[Path, str], list[float]]
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="needs the deepspeed extra")
EVERY_3 = (
    "--trainer.max_epochs=2",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=3",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.filename={step}",
)


def test_without_deepspeed_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sft-lightning\[deepspeed\]', or use trainer\.strategy: fsdp2"):
        DeepSpeedZeRO()


def assert_same(logged: Logged, found: Path, expected: Path) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        values = logged(expected, name)
        assert values
        assert logged(found, name) == pytest.approx(values, rel=1e-5), name


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stage"),
    [
        ("lora", 1),
        ("full", 2),
        ("qlora", 2),
        pytest.param("full", 3, marks=pytest.mark.end_to_end),
        ("lora", 3),
        ("qlora", 3),
    ],
)
def test_zero_learns_what_one_process_learns_and_exports_it(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, mode: str, stage: int
) -> None:
    said = runs(tmp_path / "two", mode, processes=2, strategy=f"deepspeed_stage_{stage}")
    assert not re.search(r"deprecated|sync_dist|will not actually clip|MEMBER", said)
    one = alone(mode)
    assert_same(logged, tmp_path / "two", one)
    name = "model/model.safetensors" if mode == "full" else "adapter/adapter_model.safetensors"
    ours, theirs = load_file(tmp_path / "two" / name), load_file(one / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-5)
    samples = (tmp_path / "two/samples.jsonl").read_text(encoding="utf-8")
    assert samples == (one / "samples.jsonl").read_text(encoding="utf-8")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stage"),
    [
        *(("full", "1_offload"), ("lora", "1_offload"), ("qlora", "1_offload")),
        *(("lora", "2"), ("full", "2"), ("lora", "3"), ("full", "3")),
    ],
)
def test_a_zero_run_continues_on_two_processes_and_on_one(
    runs: Any, logged: Logged, tmp_path: Path, mode: str, stage: str
) -> None:
    zero: Any = {"processes": 2, "strategy": f"deepspeed_stage_{stage}"}
    runs(tmp_path / "parts", mode, *EVERY_3, **zero)
    expected = logged(tmp_path / "parts", "train/loss")[3:]
    [checkpoint] = (tmp_path / "parts/checkpoints").glob("step=3.ckpt")
    assert (tmp_path / "parts/checkpoints/step=3.adapter").is_dir() is (mode != "full")
    for name, where in {"two": zero, "one": {}}.items():
        runs(tmp_path / name, mode, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}", **where)
        assert logged(tmp_path / name, "train/loss") == pytest.approx(expected, rel=1e-5), name


@needs_deepspeed
@pytest.mark.slow
def test_a_checkpoint_of_one_process_continues_and_is_validated_under_zero_3(
    runs: Any, logged: Logged, tmp_path: Path
) -> None:
    runs(tmp_path / "one", "full", *EVERY_3)
    [checkpoint] = (tmp_path / "one/checkpoints").glob("step=3.ckpt")
    where: Any = {"processes": 2, "strategy": "deepspeed_stage_3"}
    runs(tmp_path / "two", "full", "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}", **where)
    expected = logged(tmp_path / "one", "train/loss")[3:]
    assert logged(tmp_path / "two", "train/loss") == pytest.approx(expected, rel=1e-5)
    runs(tmp_path / "val", "full", f"--ckpt_path={checkpoint}", stage="validate", **where)
    runs(tmp_path / "val_one", "full", f"--ckpt_path={checkpoint}", stage="validate")
    expected = logged(tmp_path / "val_one", "val/loss")
    assert logged(tmp_path / "val", "val/loss") == pytest.approx(expected, rel=1e-6)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stage"),
    [("full", "1"), ("lora", "1"), ("qlora", "1"), ("full", "2"), ("lora", "3"), ("full", "3")],
)
def test_with_offloading_it_learns_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, mode: str, stage: str
) -> None:
    """DeepSpeed compiles its CPU Adam the first time, which takes two minutes."""
    runs(tmp_path / "two", mode, processes=2, strategy=f"deepspeed_stage_{stage}_offload")
    assert_same(logged, tmp_path / "two", alone(mode))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "processes", "partition"), [("full", 2, 2), ("lora", 2, 2), ("full", 4, 2), ("full", 4, 4)]
)
def test_with_a_secondary_partition_it_learns_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, mode: str, processes: int, partition: int
) -> None:
    keys = ("--trainer.strategy.stage=3", f"--trainer.strategy.hpz_partition_size={partition}")
    runs(tmp_path / "several", mode, *keys, processes=processes, strategy="sft_lightning.strategies.DeepSpeedZeRO")
    assert_same(logged, tmp_path / "several", alone(mode))


@needs_deepspeed
def test_the_configuration_of_a_strategy_is_checked_against_the_yaml() -> None:
    yaml = YamlSettings(
        schedule="cosine", batch_size=2, accumulate=4, world_size=8, gradient_clip_val=1.0, precision="bf16-mixed"
    )
    strategy = DeepSpeedZeRO(config={"train_batch_size": 64, "zero_optimization": {"stage": 2}})
    strategy.check_yaml(yaml)
    with pytest.raises(UserError, match=r"^trainer\.strategy contradicts the YAML: train_batch_size is 64, .* is 128"):
        strategy.check_yaml(replace(yaml, batch_size=4))
