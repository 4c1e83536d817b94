"""A streamed run, killed and continued, is the uninterrupted run to the last bit."""

from __future__ import annotations

import json
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
from sft_lightning.data import streaming

CHECKPOINTING = (
    "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: -1, save_last: true}}]"
)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four optimizer steps a window: a run of twelve has three."""
    monkeypatch.setattr(streaming, "rows_per_window", lambda rows_per_step, max_length: 4 * rows_per_step)


@pytest.fixture
def two_files(tmp_path: Path) -> dict[str, Path]:
    """A short and a long source; the short one is read several times."""
    files = {}
    for name, count in {"short": 10, "long": 90}.items():
        records = [{"instruction": f"Count {name} {i}.", "output": "1, 2, 3" + "." * (i % 9)} for i in range(count)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return files


@pytest.fixture
def stream_args(fit_args: list[str], two_files: dict[str, Path]) -> list[str]:
    """12 optimizer steps of 3 micro-batches, dropout on, validation and a checkpoint every 2 steps."""
    return [
        *[arg for arg in fit_args if "default_root_dir" not in arg and "sources" not in arg],
        f"--data.sources={{short: {{path: {two_files['short']}, streaming: true}}, "
        f"long: {{path: {two_files['long']}, streaming: true, weight: 2}}}}",
        f"--data.val_sources={{held: {{path: {two_files['short']}, max_examples: 4}}}}",
        f"--data.store_dir={two_files['short'].parent / 'stores'}",
        "--trainer.accumulate_grad_batches=3",
        "--trainer.max_steps=12",
        "--trainer.val_check_interval=6",
        "--model.adapter.dropout=0.3",
        "--model.lr_scheduler.warmup_steps=2",
        CHECKPOINTING,
    ]


def fit(args: list[str], run: Path, *more: str) -> int:
    return main(["fit", *args, f"--trainer.default_root_dir={run}", *more])


def scalars(run: Path, tag: str) -> dict[int, float]:
    """A value of every optimizer step, from all event files of a run; later ones win."""
    found: dict[int, float] = {}
    for file in sorted(run.glob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def losses(run: Path) -> dict[int, float]:
    return scalars(run, "train/loss")


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return loaded


def position(saved: dict[str, Any]) -> dict[str, Any]:
    (found,) = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return dict(found)


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["global_step"] == second["global_step"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    moments = [list(state["optimizer_states"][0]["state"].values()) for state in (first, second)]
    for one, other in zip(*moments, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    assert first["lr_schedulers"] == second["lr_schedulers"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_a_streamed_run_continued_from_any_checkpoint_ends_in_the_same_bits(
    packing: str, stream_args: list[str], tmp_path: Path
) -> None:
    args = [*stream_args, f"--data.packing={packing}"]
    assert fit(args, tmp_path / "whole") == 0
    whole = losses(tmp_path / "whole")
    assert sorted(whole) == list(range(12))
    assert position(checkpoint(tmp_path / "whole"))["window"]["window"] >= 2
    for step in (4, 10):
        again = tmp_path / f"again_{step}"
        saved = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        assert position(checkpoint(tmp_path / "whole", f"step={step}"))["rows"] == step * 3
        assert fit(args, again, f"--ckpt_path={saved}") == 0
        assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(again))
        assert losses(again) == {at: loss for at, loss in whole.items() if at >= step}


def test_validation_runs_while_streaming_and_at_the_end(stream_args: list[str], tmp_path: Path) -> None:
    assert fit(stream_args, tmp_path / "run") == 0
    assert len(scalars(tmp_path / "run", "val/loss/held")) == 6
    apart = [*stream_args, "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=12"]
    assert fit(apart, tmp_path / "apart") == 0
    assert len(scalars(tmp_path / "apart", "val/loss/held")) == 3


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("first", [3, 8])
def test_a_streamed_run_that_ended_goes_on_with_more_steps(first: int, stream_args: list[str], tmp_path: Path) -> None:
    def run(name: str, steps: int, *more: str) -> None:
        constant = ["--model.lr_scheduler.name=constant", f"--trainer.max_steps={steps}"]
        every_step = [arg.replace("every_n_train_steps: 2", "every_n_train_steps: 1") for arg in stream_args]
        assert fit(every_step, tmp_path / name, *constant, *more) == 0

    run("whole", 12)
    run("part", first)
    run("part", 12, "--ckpt_path=last")
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "part"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


class SaveAt(Callback):
    """Saves a checkpoint after a given micro-batch, wherever in an optimizer step it falls."""

    def __init__(self, micro_batch: int, folder: str) -> None:
        self.micro_batch, self.folder, self.seen = micro_batch, folder, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(f"{self.folder}/micro={self.seen}.ckpt")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("micro_batch", [1, 13, 26])
def test_a_checkpoint_within_a_step_continues_at_its_start(
    micro_batch: int, stream_args: list[str], tmp_path: Path
) -> None:
    saver = f"{{class_path: {__name__}.SaveAt, init_args: {{micro_batch: {micro_batch}, folder: {tmp_path}}}}}"
    args = [*stream_args, "--model.adapter.dropout=0"]
    assert fit(args, tmp_path / "whole", f"--trainer.callbacks+={saver}") == 0
    assert fit(args, tmp_path / "again", f"--ckpt_path={tmp_path / f'micro={micro_batch}.ckpt'}") == 0
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert again == {step: loss for step, loss in whole.items() if step >= micro_batch // 3}
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "again"))


@pytest.mark.usefixtures("small_windows")
def test_another_split_of_the_global_batch_continues_with_the_same_rows(stream_args: list[str], tmp_path: Path) -> None:
    args = [*stream_args, "--model.adapter.dropout=0"]
    assert fit(args, tmp_path / "whole") == 0
    saved = tmp_path / "whole" / "checkpoints" / "step=6.ckpt"
    other = ["--data.batch_size=3", "--trainer.accumulate_grad_batches=1"]
    assert fit(args, tmp_path / "again", *other, f"--ckpt_path={saved}") == 0
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert again == pytest.approx({step: whole[step] for step in range(6, 12)}, abs=1e-5)


def test_a_killed_streamed_run_continues_to_the_same_bits(stream_args: list[str], tmp_path: Path) -> None:
    assert fit(stream_args, tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "sft_lightning", "fit", *stream_args, f"--trainer.default_root_dir={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "step=4.ckpt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert fit(stream_args, killed, "--ckpt_path=last") == 0
    assert_same_bits(checkpoint(tmp_path / "whole"), checkpoint(killed))


@pytest.mark.usefixtures("small_windows")
def test_a_stream_that_changed_is_refused(
    stream_args: list[str], two_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(stream_args, tmp_path / "whole") == 0
    saved = tmp_path / "whole" / "checkpoints" / "step=6.ckpt"
    two_files["long"].write_text(two_files["long"].read_text().replace("1, 2, 3", "3, 2, 1"))
    assert fit(stream_args, tmp_path / "again", f"--ckpt_path={saved}") == 2
    assert "the streamed sources no longer hold" in capsys.readouterr().err


def test_a_stream_without_max_steps_is_a_users_error(
    stream_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit([arg for arg in stream_args if "max_steps" not in arg], tmp_path / "run") == 2
    assert "trainer.max_steps: not set" in capsys.readouterr().err


def test_a_broken_record_stops_the_run_and_is_named(
    stream_args: list[str], two_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with two_files["long"].open("a") as file:
        file.write('{"instruction": "no answer here"}\n')
    assert fit(stream_args, tmp_path / "run") == 2
    assert "long.jsonl, line 91" in capsys.readouterr().err
