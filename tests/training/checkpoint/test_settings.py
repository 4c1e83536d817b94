from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.training.checkpoint.settings import (
    changes,
    check_optimizer,
    check_weights,
    describe_training_changes,
    let_configuration_win,
    optimizer_settings,
    plain,
)

WEIGHTS: dict[str, Any] = {
    "model.model_name_or_path": ["models/a", "f1"],
    "model.dtype": "bfloat16",
    "model.quantization.bits": 4,
    "model.quantization.quant_type": "nf4",
    "model.rope_scaling.rope_type": "default",
    "model.adapter": "LORA",
    "model.adapter.alpha": 32,
    "model.adapter.target_modules": ["q_proj", "v_proj"],
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model.model_name_or_path": ["models/b", "f2"]},
            r"model\.model_name_or_path: models/a \(fingerprint f1\) → models/b \(fingerprint f2\)",
        ),
        ({"model.dtype": "float32"}, r"model\.dtype: bfloat16 → float32"),
        (
            {"model.quantization.bits": None, "model.quantization.quant_type": None},
            r"model\.quantization\.bits: 4 → null",
        ),
        ({"model.quantization.quant_type": "fp4"}, r"model\.quantization\.quant_type: nf4 → fp4"),
        ({"model.rope_scaling.rope_type": "linear"}, r"model\.rope_scaling\.rope_type: default → linear"),
        ({"model.adapter.alpha": 64}, r"model\.adapter\.alpha: 32 → 64"),
        ({"model.adapter": "IA3", "model.adapter.alpha": 1}, r"model\.adapter: LORA → IA3"),
    ],
)
def test_weights_that_would_mean_something_else_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(
        UserError, match=f"^--ckpt_path: the checkpoint's weights .* other settings: {message}; restore"
    ):
        check_weights(WEIGHTS, {**WEIGHTS, **changed}, trains=True)


def test_the_same_settings_are_accepted_wherever_the_base_lies() -> None:
    moved = {**WEIGHTS, "model.model_name_or_path": ["elsewhere/a", "f1"]}
    assert check_weights(WEIGHTS, moved, trains=True) == []


def test_settings_that_another_release_adds_or_drops_are_not_compared() -> None:
    older = {key: value for key, value in WEIGHTS.items() if key != "model.adapter.alpha"}
    assert check_weights(older, WEIGHTS, trains=True) == []
    assert check_weights(WEIGHTS, older, trains=True) == []


def test_a_base_without_a_fingerprint_is_said() -> None:
    unknown = {**WEIGHTS, "model.model_name_or_path": ["models/b", None]}
    assert check_weights(WEIGHTS, unknown, trains=True) == [
        "--ckpt_path: the base cannot be verified: models/b has no fingerprint"
    ]


def test_an_evaluation_may_compute_the_same_weights_in_another_type() -> None:
    other = {**WEIGHTS, "model.dtype": "float32", "model.quantization.bits": None}
    assert check_weights(WEIGHTS, other, trains=False) == [
        "model.dtype: bfloat16 → float32 (the configuration wins)",
        "model.quantization.bits: 4 → null (the configuration wins)",
    ]
    with pytest.raises(UserError, match="alpha"):
        check_weights(WEIGHTS, {**other, "model.adapter.alpha": 1}, trains=False)


def test_changes_read_as_the_yaml_does() -> None:
    saved = {"a": 2e-4, "b": False, "c": None, "same": 1, "gone": 1}
    found = changes(saved, {"a": 1e-4, "b": True, "c": "x", "same": 1, "new": 1})
    assert list(found.values()) == ["a: 0.0002 → 0.0001", "b: false → true", "c: null → x"]
    assert describe_training_changes({"a": 1}, {"a": 2}) == ["a: 1 → 2 (the configuration wins)"]


def test_values_become_what_a_checkpoint_reads_again() -> None:
    assert plain({"b": {"z", "a"}, "c": (1, 2.0), "d": torch.float32, "e": []}) == {
        "b": ["a", "z"],
        "c": [1, 2.0],
        "d": "torch.float32",
        "e": None,
    }
    assert plain(set()) is None


def adamw(*lrs: float, **options: Any) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.AdamW(groups, **options)


def test_another_optimizer_or_other_groups_cannot_go_on_from_the_state() -> None:
    saved = optimizer_settings(adamw(0.1))
    check_optimizer(saved, optimizer_settings(adamw(0.2, fused=True)))
    with pytest.raises(UserError, match=r"model\.optimizer: torch\.optim\.adamw\.AdamW → torch\.optim\.sgd\.SGD"):
        check_optimizer(saved, optimizer_settings(torch.optim.SGD([torch.zeros(1)])))
    with pytest.raises(UserError, match=r"model\.adapter\.lora_plus_ratio.* had 1 groups .* and has 2 now"):
        check_optimizer(saved, optimizer_settings(adamw(0.1, 0.2)))


def continued(before: torch.optim.Optimizer, after: torch.optim.Optimizer, last_epoch: int = 5) -> tuple[Any, Any]:
    """Return the changed checkpoint, and the lines; the linear schedule is halfway after 5 of 10 steps."""

    def factor_at(step: int) -> float:
        return 1 - step / 10

    schedule = torch.optim.lr_scheduler.LambdaLR(before, factor_at)
    saved = optimizer_settings(before)
    saved["groups"] = [
        {**group, "lr": group["initial_lr"]} for group in saved["groups"]
    ]  # as it is before the schedule changes it
    for _ in range(last_epoch):
        before.step()
        schedule.step()
    checkpoint = {"optimizer_states": [before.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    return checkpoint, let_configuration_win(checkpoint, saved, optimizer_settings(after), factor_at)


def test_the_rates_and_the_decay_of_the_configuration_win() -> None:
    checkpoint, lines = continued(adamw(0.1, 0.2), adamw(0.4, 0.8, weight_decay=0.5, betas=(0.5, 0.6)))
    assert lines == [
        "model.optimizer: lr 0.1 → 0.4 (the configuration wins)",
        "model.optimizer: betas [0.9, 0.999] → [0.5, 0.6] (the configuration wins)",
        "model.optimizer: weight_decay 0.01 → 0.5 (the configuration wins)",
        "model.optimizer: lr 0.2 → 0.8 (the configuration wins)",
    ]
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [(each["lr"], each["initial_lr"]) for each in groups] == [(0.2, 0.4), (0.4, 0.8)]
    assert {(each["weight_decay"], each["betas"]) for each in groups} == {(0.5, (0.5, 0.6))}
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [0.4, 0.8]


def test_an_unchanged_configuration_loads_the_same_bits() -> None:
    before = adamw(0.1, 0.3)
    checkpoint, lines = continued(before, adamw(0.1, 0.3))
    assert lines == []
    assert checkpoint["optimizer_states"][0]["param_groups"] == before.state_dict()["param_groups"]
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == [group["lr"] for group in before.param_groups]
