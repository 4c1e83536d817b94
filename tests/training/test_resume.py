"""Covers sft_lightning.training.checkpoint, sft_lightning.training.module and sft_lightning.data.batches.loader.

A killed run, continued, ends in the bits of the uninterrupted run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks import Throughput
from sft_lightning.__main__ import main

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""A case that another one proves too."""

ReadRun = Callable[[Path], Any]

CHECKPOINTING = (
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: -1, save_last: true}}"
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


def without_adapter(args: list[str]) -> list[str]:
    return [arg for arg in args if "adapter" not in arg]


@pytest.mark.parametrize(
    ("mode", "stop"),
    [("lora", "step=4"), slow("lora", "step=8"), slow("qlora", "step=4"), slow("full", "step=14")],
)
@pytest.mark.end_to_end
def test_a_run_continued_from_a_checkpoint_ends_in_the_same_bits(
    mode: str, stop: str, fit_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    whole, again = read_run(tmp_path / "whole"), read_run(tmp_path / "again")
    quantization = ["--model.quantization.bits=4"] if mode == "qlora" else []
    for run, more in ((whole, []), (again, [f"--ckpt_path={whole.path(stop)}"])):
        args = [*options(fit_args, run.folder), *quantization, *more]
        if mode == "full":
            args = [*without_adapter(args), "--model.dropout=0.1"]
        assert main(["fit", *args]) == 0
    again.assert_ends_in_the_bits_of(whole)
    first_step = whole.checkpoint(stop)["global_step"]
    expected = {step: loss for step, loss in whole.losses.items() if step >= first_step}
    assert expected
    assert again.losses == expected


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(
    fit_args: list[str], tmp_path: Path, read_run: ReadRun, fit_and_kill: Callable[..., None]
) -> None:
    whole, killed = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert main(["fit", *options(fit_args, whole.folder)]) == 0
    fit_and_kill(options(fit_args, killed.folder), 27)  # the second epoch, within an accumulation window
    assert killed.checkpoint()["global_step"] == 8
    assert main(["fit", *options(fit_args, killed.folder), "--ckpt_path=last"]) == 0
    killed.assert_ends_in_the_bits_of(whole)
    assert whole.losses.items() >= killed.losses.items()
    assert max(killed.losses) == max(whole.losses)


LOGGERS = {
    "csv": "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: %s}}",
    "tensorboard": "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: %s}}",
    "wandb": "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {save_dir: %s, offline: true}}",
}


@pytest.mark.parametrize(
    "names", [["csv"], slow(["csv", "tensorboard"]), slow(["tensorboard", "csv"]), slow(["wandb", "csv"])]
)
def test_whatever_the_loggers_a_stopped_run_continues_from_its_own_folder(
    names: list[str], fit_args: list[str], tmp_path: Path, read_run: ReadRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "wandb" in names:
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def args(run: Path) -> list[str]:
        loggers = ", ".join(LOGGERS[name] % run for name in names)
        return ["fit", *options(fit_args, run), "--trainer.max_epochs=1", f"--trainer.logger=[{loggers}]"]

    def stop(self: Throughput, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == 5:
            raise ConnectionError("stopped")

    whole, stopped = read_run(tmp_path / "whole"), read_run(tmp_path / "stopped")
    assert main(args(whole.folder)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_train_batch_start", stop)
        with pytest.raises(ConnectionError, match="stopped"):
            main(args(stopped.folder))
    assert stopped.checkpoint()["global_step"] == 4
    assert main([*args(stopped.folder), "--ckpt_path=last"]) == 0
    stopped.assert_ends_in_the_bits_of(whole)
    for name in ("adapter/adapter_model.safetensors", "config.yaml", "data_report.json", "samples.jsonl"):
        assert (stopped.folder / name).is_file(), name


@pytest.mark.slow
def test_a_run_killed_in_its_only_epoch_continues_from_the_last_timed_checkpoint(
    fit_args: list[str], tmp_path: Path, read_run: ReadRun, fit_and_kill: Callable[..., None]
) -> None:
    def one_epoch(run: Path) -> list[str]:
        changed = {CHECKPOINTING, "--trainer.max_epochs=2"}
        timed = "{class_path: callbacks.TimedCheckpoint, init_args: {train_time_interval: '00:00:00'}}"
        return [*(arg for arg in options(fit_args, run) if arg not in changed), f"--trainer.callbacks+={timed}"]

    whole, killed = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert main(["fit", *one_epoch(whole.folder)]) == 0
    fit_and_kill(one_epoch(killed.folder), 20)  # of 22
    assert killed.checkpoint()["global_step"] == 6
    assert main(["fit", *one_epoch(killed.folder), "--ckpt_path=last"]) == 0
    killed.assert_ends_in_the_bits_of(whole)


@pytest.mark.slow
def test_samples_and_validation_change_no_learned_weight(
    fit_args: list[str], few_samples: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    own = [arg for arg in fit_args if arg not in few_samples]
    watched = [
        *options(own, tmp_path / "watched"),
        "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {every_n_steps: 1, "
        "generation: {temperature: 1.0, max_new_tokens: 3}}}",
    ]
    bare = [
        *options(own, tmp_path / "bare"),
        "--trainer.callbacks+={class_path: callbacks.SampleGeneration, init_args: {prompts: []}}",
        "--trainer.limit_val_batches=0",
    ]
    for args in (watched, bare):
        assert main(["fit", *args]) == 0
    assert (tmp_path / "watched" / "samples.jsonl").read_text().count("\n") > 6
    assert not (tmp_path / "bare" / "samples.jsonl").exists()
    read_run(tmp_path / "watched").assert_ends_in_the_bits_of(read_run(tmp_path / "bare"))


def test_a_checkpoint_with_other_trainable_weights_is_refused(
    fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole")]) == 0
    other = [*options(fit_args, tmp_path / "again"), "--model.adapter.modules_to_save=[lm_head]"]
    assert main(["fit", *other, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}"]) == 2
    assert "model.adapter.modules_to_save: null → ['lm_head']; restore the old values" in capsys.readouterr().err


def test_a_checkpoint_holds_no_frozen_weight(fit_args: list[str], tmp_path: Path, read_run: ReadRun) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole")]) == 0
    assert all(".lora_" in name for name in read_run(tmp_path / "whole").checkpoint()["state_dict"])


class SaveAt(Callback):
    """Saves a checkpoint after given micro-batches, wherever in an optimizer step they fall."""

    def __init__(self, micro_batches: list[int], folder: str) -> None:
        self.micro_batches, self.folder, self.seen = micro_batches, folder, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen in self.micro_batches:
            trainer.save_checkpoint(f"{self.folder}/micro={self.seen}.ckpt")


@pytest.mark.parametrize("micro_batch", [slow(8), 21, slow(23)])
def test_a_checkpoint_within_an_optimizer_step_continues_at_its_start(
    micro_batch: int, fit_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    saver = f"{{class_path: {__name__}.SaveAt, init_args: {{micro_batches: [{micro_batch}], folder: {tmp_path}}}}}"
    whole, again = read_run(tmp_path / "whole"), read_run(tmp_path / "again")
    assert main(["fit", *options(fit_args, whole.folder), f"--trainer.callbacks+={saver}"]) == 0
    saved = tmp_path / f"micro={micro_batch}.ckpt"
    assert main(["fit", *options(fit_args, again.folder), f"--ckpt_path={saved}"]) == 0
    first_step = torch.load(saved, weights_only=True)["global_step"]
    assert again.losses == {step: loss for step, loss in whole.losses.items() if step >= first_step}
    assert max(again.losses) == 15
    again.assert_ends_in_the_bits_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulate"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("stop", ["step=4", "step=8", "step=10"])
def test_another_split_of_the_global_batch_continues_with_the_same_rows(
    stop: str, batch_size: int, accumulate: int, fit_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    whole, again = read_run(tmp_path / "whole"), read_run(tmp_path / "again")
    assert main(["fit", *options(fit_args, whole.folder), "--model.adapter.dropout=0"]) == 0
    other = [
        *options(fit_args, again.folder), "--model.adapter.dropout=0",
        f"--data.batch_size={batch_size}", f"--trainer.accumulate_grad_batches={accumulate}",
    ]  # fmt: skip
    assert main(["fit", *other, f"--ckpt_path={whole.path(stop)}"]) == 0
    left = {step: loss for step, loss in whole.losses.items() if step >= int(stop.removeprefix("step="))}
    assert again.losses.keys() == left.keys()
    assert again.losses == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize("change", ["--data.max_length=170", slow("--seed_everything=1"), slow("--data.batch_size=2")])
def test_a_checkpoint_with_different_data_settings_is_refused_with_what_changed(
    change: str, fit_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(fit_args, tmp_path / "whole"), "--trainer.max_epochs=1"]) == 0
    resumed = [*options(fit_args, tmp_path / "again"), change]
    assert main(["fit", *resumed, f"--ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}"]) == 2
    assert "different data settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("first", [3, 11])
def test_a_run_that_reached_max_steps_within_an_epoch_continues_with_the_rest_of_the_epoch(
    first: int, fit_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    def run(name: str, steps: int, *more: str) -> None:
        args = [arg for arg in options(fit_args, tmp_path / name) if "max_epochs" not in arg]
        constant = ["--model.lr_scheduler.name=constant", f"--trainer.max_steps={steps}"]
        assert main(["fit", *args, *constant, *more]) == 0

    run("whole", 14)
    run("part", first)
    run("part", 14, "--ckpt_path=last")
    read_run(tmp_path / "part").assert_ends_in_the_bits_of(read_run(tmp_path / "whole"))
    assert read_run(tmp_path / "part").losses == read_run(tmp_path / "whole").losses
