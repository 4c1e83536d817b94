"""Covers sft_lightning.training.checkpoint and sft_lightning.data.batches.stream_loader.

A streamed run, killed and continued, ends in the bits of the uninterrupted run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from sft_lightning.__main__ import main
from sft_lightning.data.batches import stream_windows

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""A case that another one proves too."""

ReadRun = Callable[[Path], Any]

CHECKPOINTING = (
    "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
    "{filename: '{step}', every_n_train_steps: 2, save_top_k: -1, save_last: true}}"
)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four optimizer steps a window: a run of twelve has three."""
    monkeypatch.setattr(stream_windows, "rows_per_window", lambda rows_per_step, max_length: 4 * rows_per_step)


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


def position(saved: dict[str, Any]) -> dict[str, Any]:
    (found,) = saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return dict(found)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("packing", ["best_fit", slow("concat"), slow("none")])
def test_a_streamed_run_continued_from_any_checkpoint_ends_in_the_same_bits(
    packing: str, stream_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    args = [*stream_args, f"--data.packing={packing}"]
    whole = read_run(tmp_path / "whole")
    assert fit(args, whole.folder) == 0
    assert sorted(whole.losses) == list(range(12))
    assert position(whole.checkpoint())["window"]["window"] >= 2
    for step in (4, 10):
        again = read_run(tmp_path / f"again_{step}")
        assert position(whole.checkpoint(f"step={step}"))["rows"] == step * 3
        assert fit(args, again.folder, f"--ckpt_path={whole.path(f'step={step}')}") == 0
        again.assert_ends_in_the_bits_of(whole)
        assert again.losses == {at: loss for at, loss in whole.losses.items() if at >= step}


@pytest.mark.slow
def test_validation_runs_while_streaming_and_at_the_end(
    stream_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    assert fit(stream_args, tmp_path / "run") == 0
    assert len(read_run(tmp_path / "run").scalars("val/loss/held")) == 6
    apart = [*stream_args, "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=12"]
    assert fit(apart, tmp_path / "apart") == 0
    assert len(read_run(tmp_path / "apart").scalars("val/loss/held")) == 3


@pytest.mark.usefixtures("small_windows")
@pytest.mark.slow
@pytest.mark.parametrize("first", [3, 8])
def test_a_streamed_run_that_reached_max_steps_can_be_continued_with_more_steps(
    first: int, stream_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    def run(name: str, steps: int, *more: str) -> None:
        constant = ["--model.lr_scheduler.name=constant", f"--trainer.max_steps={steps}"]
        every_step = [arg.replace("every_n_train_steps: 2", "every_n_train_steps: 1") for arg in stream_args]
        assert fit(every_step, tmp_path / name, *constant, *more) == 0

    run("whole", 12)
    run("part", first)
    run("part", 12, "--ckpt_path=last")
    read_run(tmp_path / "part").assert_ends_in_the_bits_of(read_run(tmp_path / "whole"))
    assert read_run(tmp_path / "part").losses == read_run(tmp_path / "whole").losses


class SaveAt(Callback):
    """Saves a checkpoint after a given micro-batch, wherever in an optimizer step it falls."""

    def __init__(self, micro_batch: int, folder: str) -> None:
        self.micro_batch, self.folder, self.seen = micro_batch, folder, 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(f"{self.folder}/micro={self.seen}.ckpt")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 13, 26])
def test_a_checkpoint_within_a_step_continues_at_its_start(
    micro_batch: int, stream_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    saver = f"{{class_path: {__name__}.SaveAt, init_args: {{micro_batch: {micro_batch}, folder: {tmp_path}}}}}"
    whole, again = read_run(tmp_path / "whole"), read_run(tmp_path / "again")
    assert fit(stream_args, whole.folder, f"--trainer.callbacks+={saver}") == 0
    assert fit(stream_args, again.folder, f"--ckpt_path={tmp_path / f'micro={micro_batch}.ckpt'}") == 0
    assert again.losses == {step: loss for step, loss in whole.losses.items() if step >= micro_batch // 3}
    again.assert_ends_in_the_bits_of(whole)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.slow
def test_another_split_of_the_global_batch_continues_with_the_same_rows(
    stream_args: list[str], tmp_path: Path, read_run: ReadRun
) -> None:
    args = [*stream_args, "--model.adapter.dropout=0"]
    whole, again = read_run(tmp_path / "whole"), read_run(tmp_path / "again")
    assert fit(args, whole.folder) == 0
    other = ["--data.batch_size=3", "--trainer.accumulate_grad_batches=1"]
    assert fit(args, again.folder, *other, f"--ckpt_path={whole.path('step=6')}") == 0
    assert again.losses == pytest.approx({step: whole.losses[step] for step in range(6, 12)}, abs=1e-5)


@pytest.mark.slow
def test_a_killed_streamed_run_continues_to_the_same_bits(
    stream_args: list[str], tmp_path: Path, read_run: ReadRun, fit_and_kill: Callable[..., None]
) -> None:
    whole, killed = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert fit(stream_args, whole.folder) == 0
    fit_and_kill([*stream_args, f"--trainer.default_root_dir={killed.folder}"], 17)
    assert killed.checkpoint()["global_step"] == 4
    assert fit(stream_args, killed.folder, "--ckpt_path=last") == 0
    killed.assert_ends_in_the_bits_of(whole)


@pytest.mark.usefixtures("small_windows")
def test_a_stream_that_changed_is_refused(
    stream_args: list[str], two_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(stream_args, tmp_path / "whole") == 0
    saved = tmp_path / "whole" / "checkpoints" / "step=6.ckpt"
    two_files["long"].write_text(two_files["long"].read_text().replace("1, 2, 3", "3, 2, 1"))
    assert fit(stream_args, tmp_path / "again", f"--ckpt_path={saved}") == 2
    assert "the streamed sources no longer hold" in capsys.readouterr().err


def test_a_stream_without_max_steps_is_refused(
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
