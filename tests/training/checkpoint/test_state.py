from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.state import (
    RandomStates,
    check_trainable_state,
    random_state,
    rewind_to_step_start,
    set_random_state,
    trainable_state,
)


def half_frozen() -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad = False
    return model


def test_only_trainable_weights_are_kept() -> None:
    model = half_frozen()
    assert list(trainable_state(model, model.state_dict())) == ["bias"]


@pytest.mark.parametrize("keys", [[], ["bias", "weight"]])
def test_weights_that_are_missing_or_do_not_train_here_are_refused(keys: list[str]) -> None:
    model = half_frozen()
    with pytest.raises(UserError, match="--ckpt_path: the checkpoint was saved with different keys under model"):
        check_trainable_state(model, {key: model.state_dict()[key] for key in keys})


def test_random_states_read_from_a_file_continue_with_the_same_numbers(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    second = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], second[0])
    assert first[1].tolist() == second[1].tolist()
    assert first[2] == second[2]


def drawn() -> float:
    return float(torch.rand(()))


def test_loaded_random_states_are_continued_once() -> None:
    torch.manual_seed(1)
    saved = random_state()
    expected = drawn()
    states = RandomStates()
    assert not states.continue_loaded()
    states.load([saved], rank=0)
    torch.manual_seed(2)
    assert states.continue_loaded()
    assert drawn() == expected
    assert not states.continue_loaded()


def test_more_processes_than_before_share_the_saved_states_in_turn() -> None:
    saved = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        saved.append(random_state())
    found = []
    for rank in range(3):
        states = RandomStates()
        states.load(saved, rank)
        states.continue_loaded()
        found.append(drawn())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("within_step", [True, False])
def test_a_checkpoint_within_a_step_saves_the_states_from_before_its_first_micro_batch(within_step: bool) -> None:
    torch.manual_seed(1)
    states = RandomStates()
    states.note_step_start()
    before, now = drawn(), random_state()
    after = drawn()
    set_random_state(now)
    [saved] = states.gather(within_step=within_step)
    set_random_state(saved)
    assert drawn() == (before if within_step else after)


def test_loaded_states_that_were_never_continued_are_saved_again() -> None:
    torch.manual_seed(1)
    loaded, expected = random_state(), drawn()
    states = RandomStates()
    states.load([loaded], rank=0)
    [saved] = states.gather(within_step=False)
    set_random_state(saved)
    assert drawn() == expected


class Rows:
    """Twelve micro-batches an epoch, four of them a step."""

    def micro_batches_done(self, position: dict[str, int]) -> int:
        return position["rows"] // 4 * 4

    def is_within_epoch(self, position: dict[str, int]) -> bool:
        return position["rows"] < 12


@pytest.mark.parametrize(("rows", "micro_batches", "completed_epochs"), [(4, 4, 0), (6, 4, 0), (12, 12, 1)])
def test_a_position_is_set_to_the_start_of_its_optimizer_step(
    rows: int, micro_batches: int, completed_epochs: int
) -> None:
    counters = {"ready": rows, "completed": rows}
    fit_loop: dict[str, Any] = {
        "state_dict": {"combined_loader": [{"epoch": 0, "rows": rows}]},
        "epoch_loop.batch_progress": {"current": dict(counters), "total": dict(counters), "is_last_batch": True},
        "epoch_progress": {"current": {"processed": 1, "completed": 1}, "total": {"processed": 1, "completed": 1}},
    }
    rewind_to_step_start(fit_loop, Rows())  # type: ignore[arg-type]
    progress = fit_loop["epoch_loop.batch_progress"]
    assert progress["current"] == progress["total"] == {"ready": micro_batches, "completed": micro_batches}
    assert fit_loop["epoch_progress"]["current"]["completed"] == completed_epochs
