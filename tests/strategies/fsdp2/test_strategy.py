"""FSDP2 in two real processes over gloo: losses, checkpoints and exports are those of one process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.strategies import FSDP2

Logged = Callable[[Path, str], list[float]]
EVERY_3 = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=3",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.filename={step}",
)


def assert_same_losses(logged: Logged, found: Path, expected: Path, rel: float = 1e-5) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        values = logged(expected, name)
        assert values
        assert logged(found, name) == pytest.approx(values, rel=rel), name


def same_tensors(found: Path, expected: Path, tolerance: float) -> None:
    one, two = load_file(expected), load_file(found)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.end_to_end
def test_lora_learns_what_one_process_learns_and_exports_it(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path
) -> None:
    said = runs(tmp_path / "two", "lora", *EVERY_3, processes=2, strategy="fsdp2")
    one = alone("lora")
    assert_same_losses(logged, tmp_path / "two", one)
    same_tensors(tmp_path / "two/adapter/adapter_model.safetensors", one / "adapter/adapter_model.safetensors", 2e-6)
    [beside] = (tmp_path / "two/checkpoints").glob("step=3.adapter")
    assert (beside / "adapter_model.safetensors").is_file()
    samples = (tmp_path / "two/samples.jsonl").read_text(encoding="utf-8")
    assert samples == (one / "samples.jsonl").read_text(encoding="utf-8")
    assert "logits not compared, because no process has the full model" in said


@pytest.mark.slow
def test_full_fine_tuning_learns_what_one_process_learns_and_exports_it(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path
) -> None:
    runs(tmp_path / "two", "full", processes=2, strategy="fsdp2")
    one = alone("full")
    assert_same_losses(logged, tmp_path / "two", one)
    same_tensors(tmp_path / "two/model/model.safetensors", one / "model/model.safetensors", 2e-5)
    assert json.loads((tmp_path / "two/model/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two/model")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rel"), [("lora_bf16_base", 2e-2), ("qlora", 1e-5)])
def test_adapters_over_another_type_learn_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path, mode: str, rel: float
) -> None:
    runs(tmp_path / "two", mode, processes=2, strategy="fsdp2")
    assert_same_losses(logged, tmp_path / "two", alone(mode), rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_in_bf16_mixed_a_sharded_run_learns_what_one_process_learns(
    runs: Any, logged: Logged, tmp_path: Path, mode: str
) -> None:
    mixed = "--trainer.precision=bf16-mixed"
    runs(tmp_path / "one", mode, mixed)
    runs(tmp_path / "two", mode, mixed, processes=2, strategy="fsdp2")
    losses, expected = (logged(tmp_path / name, "train/loss") for name in ("two", "one"))
    assert losses == pytest.approx(expected, rel=1e-2)
    state = torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("lora", 2), ("lora", 1), ("full", 2), ("full", 1)])
def test_a_sharded_run_continues_on_two_processes_and_on_one(
    runs: Any, logged: Logged, tmp_path: Path, mode: str, processes: int
) -> None:
    two = ("--trainer.max_epochs=2",)
    runs(tmp_path / "whole", mode, *two)
    runs(tmp_path / "parts", mode, *two, *EVERY_3, processes=2, strategy="fsdp2")
    [checkpoint] = (tmp_path / "parts/checkpoints").glob("step=3.ckpt")
    again = ("fsdp2", 2) if processes == 2 else ("auto", 1)
    resumed = (*two, f"--ckpt_path={checkpoint}")
    runs(tmp_path / "again", mode, *resumed, processes=again[1], strategy=again[0])
    expected = logged(tmp_path / "whole", "train/loss")[3:]
    assert logged(tmp_path / "again", "train/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_process_continues_sharded(runs: Any, logged: Logged, tmp_path: Path) -> None:
    two = ("--trainer.max_epochs=2",)
    runs(tmp_path / "parts", "lora", *two, *EVERY_3)
    [checkpoint] = (tmp_path / "parts/checkpoints").glob("step=3.ckpt")
    runs(tmp_path / "again", "lora", *two, f"--ckpt_path={checkpoint}", processes=2, strategy="fsdp2")
    expected = logged(tmp_path / "parts", "train/loss")[3:]
    assert logged(tmp_path / "again", "train/loss") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_validated_sharded(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path
) -> None:
    one = alone("full")
    [checkpoint] = (one / "checkpoints").glob("last.ckpt")
    where = (f"--ckpt_path={checkpoint}",)
    runs(tmp_path / "two", "full", *where, processes=2, strategy="fsdp2", stage="validate")
    runs(tmp_path / "one", "full", *where, stage="validate")
    expected = logged(tmp_path / "one", "val/loss")
    assert logged(tmp_path / "two", "val/loss") == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_hybrid_sharding_learns_what_one_process_learns(
    runs: Any, alone: Callable[[str], Path], logged: Logged, tmp_path: Path
) -> None:
    hybrid = "sft_lightning.strategies.FSDP2"
    runs(tmp_path / "two", "lora", "--trainer.strategy.replicas=2", processes=2, strategy=hybrid)
    assert_same_losses(logged, tmp_path / "two", alone("lora"))


@pytest.mark.slow
def test_replicas_that_do_not_divide_the_processes_are_refused(runs: Any, tmp_path: Path) -> None:
    command = runs.command(
        tmp_path, "lora", "--trainer.strategy.replicas=3", processes=2, strategy="sft_lightning.strategies.FSDP2"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "trainer.strategy.replicas: 3 does not divide the number of processes, which is 2" in done.stderr


@pytest.mark.parametrize("replicas", [0, -1])
def test_a_number_of_replicas_below_1_is_refused(replicas: int) -> None:
    with pytest.raises(UserError, match=rf"trainer\.strategy\.replicas: must be at least 1 \(got {replicas}\)"):
        FSDP2(replicas=replicas)
