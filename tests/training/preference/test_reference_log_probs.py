from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.training.preference import reference_log_probs
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig
from sft_lightning.training.preference.reference_log_probs import load_table, save_table, table_key

Train = Callable[..., Any]


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "full"])
def test_the_reference_stays_the_same_while_the_model_learns(kind: str, train: Train) -> None:
    before = train(kind)
    after = train(kind, lr=1e-2, trainer={"max_epochs": 2})
    assert after.losses[-1] < 0.6 < before.losses[-1]
    batch = next(iter(before.data.train_dataloader()))
    found = [run.reference.log_probs(run.module, batch, "train") for run in (before, after)]
    assert torch.equal(*found)
    now = answer_log_probs(after.module, batch).log_probs
    assert float((now - found[0]).abs().max()) > 0.1


def test_precomputed_log_probabilities_are_found_on_disk_by_the_next_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train("full", trainer={"max_steps": 1})

    def refuse(*_: Any) -> None:
        raise AssertionError("computed a second time")

    monkeypatch.setattr(reference_log_probs, "compute_table", refuse)
    second = train("full", trainer={"max_steps": 1})
    assert torch.equal(*(run.reference.split_tables["train"][0] for run in (first, second)))
    with pytest.raises(AssertionError, match="second time"):  # other pairs and another precision
        train("full", data={"loss_on": "last_turn"}, trainer={"max_steps": 1, "precision": "bf16-mixed"})


def test_a_continued_adapter_is_compared_with_its_start(train: Train, tmp_path: Path) -> None:
    train("lora without dropout", lr=1e-2).module.language_model.save_pretrained(tmp_path / "adapter")
    adapter = AdapterConfig(r=4, dropout=0.0, path=str(tmp_path / "adapter"))
    started = train(adapter=adapter, trainer={"max_steps": 1})
    assert abs(started.losses[0] - math.log(2)) <= 1e-6
    off = train(adapter=adapter, preference=PreferenceConfig(reference="adapter_off"), trainer={"max_steps": 1})
    assert abs(off.losses[0] - math.log(2)) > 1e-3


def test_a_loss_without_reference_asks_for_none(train: Train) -> None:
    run = train(preference=PreferenceConfig(loss="orpo"), trainer={"max_steps": 1})
    batch = next(iter(run.data.train_dataloader()))
    assert run.reference.log_probs(run.module, batch, "train") is None


def test_a_preference_run_refuses_data_that_are_not_pairs(train: Train) -> None:
    run = train(trainer={"max_steps": 1})
    run.trainer.datamodule = SFTDataModule(run.data.spec)
    with pytest.raises(UserError, match=r"SFTDataModule\(spec, Pairs\)"):
        reference_log_probs.pair_data_of(run.module)


def test_a_table_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    table = torch.randn(3, 2)
    save_table(tmp_path / "references", "key", table)
    found = load_table(tmp_path / "references", "key", 3)
    assert found is not None
    assert torch.equal(found, table)
    assert [path.name for path in (tmp_path / "references").iterdir()] == ["key.npy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((4, 2), np.float32), "belong to other data"),
        (np.zeros((3, 2), np.float64), "belong to other data"),
        (None, "are damaged"),
    ],
)
def test_a_damaged_or_foreign_table_is_computed_again_with_a_warning(
    content: np.ndarray | None, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        (tmp_path / "key.npy").write_bytes(b"\x93NUMPY cut off")
    else:
        np.save(tmp_path / "key.npy", content)
    assert load_table(tmp_path, "key", 3) is None
    assert message in caplog.text


def test_a_missing_table_is_none_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_table(tmp_path, "key", 3) is None
    assert not caplog.text


def test_a_tables_key_depends_on_each_part_and_on_their_borders() -> None:
    assert table_key("a", "b") == table_key("a", "b")
    assert len({table_key("a", "b"), table_key("a", "c"), table_key("ab", ""), table_key("", "ab")}) == 4
