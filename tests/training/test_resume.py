"""A killed run, continued, is the uninterrupted run to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_lightning.__main__ import main

CHECKPOINTING = (
    "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: -1, save_last: true}}]"
)


def options(fit_args: list[str], run: Path) -> list[str]:
    """Two epochs of 8 optimizer steps (the last of one micro-batch), dropout on, a checkpoint every 2 steps."""
    return [
        *[arg for arg in fit_args if "default_root_dir" not in arg and "max_length" not in arg],
        f"--trainer.default_root_dir={run}",
        "--data.max_length=160",
        "--data.val_fraction=0.1",
        "--trainer.accumulate_grad_batches=3",
        "--trainer.max_epochs=2",
        "--model.adapter.dropout=0.3",
        "--model.lr_scheduler.warmup_steps=2",
        CHECKPOINTING,
    ]


def losses(run: Path) -> dict[int, float]:
    """Loss of every optimizer step, from all event files of a run; later ones win."""
    found: dict[int, float] = {}
    for file in sorted(run.glob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    return found


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return loaded


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["global_step"] == second["global_step"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    moments = [list(state["optimizer_states"][0]["state"].values()) for state in (first, second)]
    for one, other in zip(*moments, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    assert first["lr_schedulers"] == second["lr_schedulers"]


def continue_from(stop: str, args: list[str], tmp_path: Path) -> None:
    """Run to the end, run again from a checkpoint of the first run, and compare all that is left of both."""
    assert main(["fit", *options(args, tmp_path / "whole")]) == 0
    saved = tmp_path / "whole" / "checkpoints" / f"{stop}.ckpt"
    assert main(["fit", *options(args, tmp_path / "again"), f"--ckpt_path={saved}"]) == 0
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert_same_bits(checkpoint(whole), checkpoint(again))
    first_step = torch.load(saved, weights_only=True)["global_step"]
    expected = {step: loss for step, loss in losses(whole).items() if step >= first_step}
    assert expected
    assert losses(again) == expected


@pytest.mark.parametrize("stop", ["step=2", "step=4", "step=6", "step=8", "step=14"])
def test_a_run_continued_from_any_checkpoint_ends_in_the_same_bits(
    stop: str, fit_args: list[str], tmp_path: Path
) -> None:
    continue_from(stop, fit_args, tmp_path)


def test_a_quantized_base_continues_to_the_same_bits(fit_args: list[str], tmp_path: Path) -> None:
    continue_from("step=4", [*fit_args, "--model.quantization.bits=4"], tmp_path)


def test_full_fine_tuning_continues_to_the_same_bits(fit_args: list[str], tmp_path: Path) -> None:
    continue_from("step=4", [arg for arg in fit_args if "adapter" not in arg], tmp_path)


def test_a_process_killed_in_mid_epoch_continues_to_the_same_bits(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "sft_lightning", "fit", *options(fit_args, killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "step=4.ckpt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main(["fit", *options(fit_args, killed), "--ckpt_path=last"]) == 0
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(killed))
    whole = losses(tmp_path / "whole")
    assert whole.items() >= losses(killed).items()
    assert max(losses(killed)) == max(whole)


def test_samples_and_validation_change_no_learned_weight(fit_args: list[str], tmp_path: Path) -> None:
    watched = [
        *options(fit_args, tmp_path / "watched"),
        "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {every_n_steps: 1, "
        "generation: {temperature: 1.0, max_new_tokens: 3}}}",
    ]
    bare = [
        *options(fit_args, tmp_path / "bare"),
        "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {prompts: []}}",
        "--trainer.limit_val_batches=0",
    ]
    for args in (watched, bare):
        assert main(["fit", *args]) == 0
    assert (tmp_path / "watched" / "samples.jsonl").read_text().count("\n") > 6
    assert not (tmp_path / "bare" / "samples.jsonl").exists()
    assert_same_bits(checkpoint(tmp_path / "watched"), checkpoint(tmp_path / "bare"))


def test_a_checkpoint_of_another_configuration_is_refused(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole")]) == 0
    other = [*options(fit_args, tmp_path / "again"), "--model.adapter.modules_to_save=[lm_head]"]
    with pytest.raises(RuntimeError, match="another configuration"):
        main(["fit", *other, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}"])


def test_a_checkpoint_holds_no_frozen_weight(fit_args: list[str], tmp_path: Path) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole")]) == 0
    assert all(".lora_" in name for name in checkpoint(tmp_path / "whole")["state_dict"])


class SaveAt(Callback):
    """Saves a checkpoint after given micro-batches, wherever in an optimizer step they fall."""

    def __init__(self, micro_batches: list[int], folder: str) -> None:
        self.micro_batches, self.folder, self.seen = micro_batches, folder, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen in self.micro_batches:
            trainer.save_checkpoint(f"{self.folder}/micro={self.seen}.ckpt")


@pytest.mark.parametrize("micro_batch", [1, 8, 21, 23])
def test_a_checkpoint_within_an_optimizer_step_continues_at_its_start(
    micro_batch: int, fit_args: list[str], tmp_path: Path
) -> None:
    saver = f"{{class_path: {__name__}.SaveAt, init_args: {{micro_batches: [{micro_batch}], folder: {tmp_path}}}}}"
    assert main(["fit", *options(fit_args, tmp_path / "whole"), f"--trainer.callbacks+={saver}"]) == 0
    saved = tmp_path / f"micro={micro_batch}.ckpt"
    assert main(["fit", *options(fit_args, tmp_path / "again"), f"--ckpt_path={saved}"]) == 0
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert again.keys() == {step for step in whole if step >= min(again)}
    assert max(again) == max(whole) == 15
    assert torch.load(saved, weights_only=True)["global_step"] == min(again)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("stop", ["step=4", "step=8", "step=10"])
def test_another_split_of_the_global_batch_continues_with_the_same_rows(
    stop: str, batch_size: int, accumulate: int, fit_args: list[str], tmp_path: Path
) -> None:
    no_dropout = [*options(fit_args, tmp_path / "whole"), "--model.adapter.dropout=0"]
    assert main(["fit", *no_dropout]) == 0
    saved = tmp_path / "whole" / "checkpoints" / f"{stop}.ckpt"
    other = [
        *options(fit_args, tmp_path / "again"), "--model.adapter.dropout=0",
        f"--data.batch_size={batch_size}", f"--trainer.accumulate_grad_batches={accumulate}",
    ]  # fmt: skip
    assert main(["fit", *other, f"--ckpt_path={saved}"]) == 0
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert again.keys() == {step for step in whole if step >= int(stop.removeprefix("step="))}
    assert again == pytest.approx({step: whole[step] for step in again}, abs=1e-5)


@pytest.mark.parametrize("change", ["--data.max_length=170", "--seed_everything=1", "--data.batch_size=2"])
def test_a_position_in_other_data_is_refused_with_what_changed(
    change: str, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole"), "--trainer.max_epochs=1"]) == 0
    resumed = [*options(fit_args, tmp_path / "again"), change]
    assert main(["fit", *resumed, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}"]) == 2
    assert "position is one in other data" in capsys.readouterr().err


@pytest.mark.parametrize("first", [3, 11])
def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_with_its_other_rows(
    first: int, fit_args: list[str], tmp_path: Path
) -> None:
    def run(name: str, steps: int, *more: str) -> None:
        args = [arg for arg in options(fit_args, tmp_path / name) if "max_epochs" not in arg]
        constant = ["--model.lr_scheduler.name=constant", f"--trainer.max_steps={steps}"]
        assert main(["fit", *args, *constant, *more]) == 0

    run("whole", 14)
    run("part", first)
    run("part", 14, "--ckpt_path=last")
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "part"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
