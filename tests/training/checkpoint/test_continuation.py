from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sft_lightning.checks import CheckError
from sft_lightning.data.batches.collate import collate
from sft_lightning.data.batches.loader import TrainLoader
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint import state
from sft_lightning.training.checkpoint.continuation import compare_draws, compare_rows, next_draws, row_hashes
from sft_lightning.training.checkpoint.state import random_state
from sft_lightning.training.checks import run_checks
from sft_lightning.training.module import CausalLMModule
from sft_lightning.types import TokenizedExample

Run = tuple[Trainer, CausalLMModule, SFTDataModule]
MakeRun = Callable[..., Run]


def example(ids: list[int], prompt: int = 1) -> TokenizedExample:
    weights = np.array([0.0] * prompt + [1.0] * (len(ids) - prompt), np.float32)
    return TokenizedExample(np.array(ids, np.int32), weights)


def test_a_row_has_one_hash_however_wide_its_micro_batch_is() -> None:
    rows = [[example([5, 6, 7])], [example([5, 6, 8, 9, 9])]]
    together = row_hashes(collate(rows, pad_token_id=0, denominator=1.0, shape=(3, 9)))
    alone = [row_hashes(collate([row], pad_token_id=7, denominator=2.0))[0] for row in rows]
    assert together == alone
    assert len(set(alone)) == 2


@pytest.mark.parametrize("other", [example([5, 6, 8]), example([4, 6, 7]), example([5, 6, 7], prompt=2)])
def test_other_ids_labels_or_prompts_have_another_hash(other: TokenizedExample) -> None:
    hashes = [row_hashes(collate([[each]], pad_token_id=0, denominator=1.0)) for each in (example([5, 6, 7]), other)]
    assert hashes[0] != hashes[1]


def test_a_micro_batch_whose_weights_the_trainer_has_rounded_has_the_same_hash() -> None:
    batch = collate([[TokenizedExample(np.array([5, 6, 7], np.int32), np.array([0, 0.3, 1], np.float32))]],
                    pad_token_id=0, denominator=1.0)  # fmt: skip
    rounded = {**batch, "loss_weights": batch["loss_weights"].bfloat16()}
    assert row_hashes(rounded) == row_hashes(batch)  # type: ignore[arg-type]


def test_a_micro_batch_of_other_rows_is_a_failed_check() -> None:
    assert compare_rows([["a"], ["b", "c"]], ["a", "b", "c"]).passed
    assert compare_rows([], []).passed
    failed = compare_rows([["a"], ["b"]], ["b", "c"])
    assert failed.passed is False
    assert "a b → b c" in failed.figure


def test_the_next_draws_are_known_without_drawing() -> None:
    before = random_state()
    draws = next_draws(before)
    assert next_draws(random_state()) == draws
    assert draws["torch"] == float(torch.rand(()))
    assert draws["python"] == random.random()
    assert draws["numpy"] == np.random.random_sample()
    assert next_draws(random_state()) != draws


def test_generators_that_draw_other_numbers_are_a_failed_check() -> None:
    assert compare_draws({"torch": 0.5, "cuda": 0.1}, {"torch": 0.5}).passed
    failed = compare_draws({"torch": 0.5, "numpy": 0.25}, {"torch": 0.5, "numpy": 0.125})
    assert failed.passed is False
    assert failed.figure.endswith("numpy 0.250000 → 0.125000")


@pytest.fixture
def saved(make_run: MakeRun, tmp_path: Path) -> Path:
    """The checkpoint after the second optimizer step of four."""
    trainer, module, data = make_run(**OPTIONS, **saving(tmp_path, every=2))
    trainer.fit(module, data)
    return tmp_path / "step=2.ckpt"


OPTIONS: dict[str, Any] = {
    "trainer_max_steps": 4,
    "trainer_accumulate_grad_batches": 2,
    "packing": "best_fit",
    "dropout": 0.1,
}


def saving(folder: Path, every: int) -> dict[str, Any]:
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return {"trainer_enable_checkpointing": True, "trainer_callbacks": [checkpoints]}


def continue_run(make_run: MakeRun, checkpoint: Path, **changes: Any) -> CausalLMModule:
    trainer, module, data = make_run(**{**OPTIONS, **changes})
    trainer.fit(module, data, ckpt_path=str(checkpoint))
    return module


def outcomes(module: CausalLMModule) -> dict[str, bool | None]:
    return {check.name: check.passed for check in module.checks.checks if check.name.startswith("continued")}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_continued_run_checks_its_first_rows_and_draws(batch_size: int, saved: Path, make_run: MakeRun) -> None:
    trainer, module, data = make_run(**{**OPTIONS, "trainer_accumulate_grad_batches": 2 // batch_size})
    other = data.with_spec(replace(data.spec, batch_size=batch_size))
    trainer.fit(module, other, ckpt_path=str(saved))
    assert outcomes(module) == {"continued rows": True, "continued random draws": True}


def test_a_loader_that_continues_one_step_late_stops_the_run(
    saved: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_checks, "CHECKS", ())  # the comparison with the plan would notice it first
    load = TrainLoader.load_state_dict
    monkeypatch.setattr(
        TrainLoader, "load_state_dict", lambda self, found: load(self, {**found, "rows": found["rows"] + 2})
    )
    with pytest.raises(CheckError, match="continued rows: the first micro-batch has other rows"):
        continue_run(make_run, saved)


def test_generators_that_are_not_restored_stop_the_run(
    saved: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "set_random_state", lambda found: None)
    with pytest.raises(CheckError, match="continued random draws: other numbers than those of the checkpoint"):
        continue_run(make_run, saved)


def test_a_changed_dropout_is_said_and_a_changed_type_is_refused(
    saved: Path, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        continue_run(make_run, saved, dropout=0.2)
    assert "model.dropout: 0.1 → 0.2 (the configuration wins)" in caplog.text
    with pytest.raises(UserError, match=r"model\.dtype: float32 → bfloat16; restore the old values"):
        continue_run(make_run, saved, dtype="bfloat16")


def test_a_checkpoint_of_an_earlier_release_continues_and_says_what_is_not_compared(
    saved: Path, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    older = {key: value for key, value in checkpoint.items() if key not in ("settings", "next_step")}
    torch.save(older, saved)
    with caplog.at_level("INFO"):
        module = continue_run(make_run, saved)
    assert "the checkpoint has no settings, because an earlier release saved it" in caplog.text
    assert outcomes(module) == {"continued rows": None}
