from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from sft_lightning.data.pairs.kind import reference_folder
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.preference.losses import PreferenceConfig

Train = Callable[..., Any]
WritePairs = Callable[..., Path]


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "qlora", "full"])
def test_the_first_step_has_a_loss_of_log_2_and_trains_what_the_spec_says(kind: str, train: Train) -> None:
    run = train(kind, trainer={"max_steps": 1})
    assert abs(run.losses[0] - math.log(2)) <= 1e-6
    assert abs(run.logged[0]["train/rewards/margin"]) <= 1e-5
    names = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad}
    assert names == set(run.gradients[0])
    assert all(".lora_" in name for name in names) is (kind in ("lora", "qlora"))


@pytest.mark.parametrize("kind", ["lora without dropout", "full"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_gradients_are_equal_however_a_step_is_split(kind: str, packing: str, train: Train) -> None:
    # A row is a unit of the plan: a packed one, or the two rows of a pair if nothing is packed.
    split = train(kind, data={"packing": packing}, trainer={"accumulate_grad_batches": 2})
    whole = train(kind, data={"packing": packing, "batch_size": 2}, trainer={"accumulate_grad_batches": 1})
    assert split.gradient_difference(whole) <= 1e-6
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)


def test_packed_and_unpacked_epochs_have_the_same_gradient(train: Train) -> None:
    one_step = {"accumulate_grad_batches": 100}
    packed, unpacked = (
        train("lora without dropout", data={"packing": packing}, trainer=one_step) for packing in ("best_fit", "none")
    )
    assert packed.data.plan(0).num_rows < unpacked.data.plan(0).num_rows == 20
    assert packed.gradient_difference(unpacked) <= 1e-6


@pytest.mark.parametrize(
    "loss", ["simpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "hinge", "orpo"))]
)
def test_every_loss_learns_to_prefer_the_chosen_answer(loss: str, train: Train) -> None:
    config = PreferenceConfig(loss=loss, beta=2.0 if loss == "simpo" else 0.1)  # type: ignore[arg-type]
    run = train(preference=config, lr=1e-2, trainer={"max_epochs": 4})
    assert run.losses[-1] < run.losses[0]
    assert run.logged[-1]["train/rewards/margin"] > run.logged[0]["train/rewards/margin"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_continues_to_the_same_bits(kind: str, train: Train, tmp_path: Path) -> None:
    whole = train(kind, lr=1e-3, trainer={"max_epochs": 2})
    half = train(kind, lr=1e-3, trainer={"max_epochs": 2, "max_steps": 2})
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    for file in reference_folder(half.data).glob("*.npy"):
        file.unlink()  # the checkpoint has all that is needed
    resumed = train(kind, lr=1e-3, trainer={"max_epochs": 2}, ckpt_path=tmp_path / "half.ckpt")
    assert len(half.logged) + len(resumed.logged) == len(whole.logged)
    assert resumed.logged[-1] == whole.logged[-1]
    for name, parameter in whole.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, resumed.module.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_validation_logs_loss_and_rewards_of_each_source(kind: str, train: Train, write_pairs: WritePairs) -> None:
    source = SourceConfig(path=str(write_pairs("val.json", 6)))
    run = train(kind, data={"val_sources": {"a": source, "b": source}}, trainer={"max_epochs": 1})
    logged = run.trainer.callback_metrics
    for name in ("val/loss", "val/loss/a", "val/loss/b"):
        assert abs(float(logged[name]) - math.log(2)) <= 1e-6
    assert {"val/rewards/margin", "val/rewards/accuracy/a", "val/log_probs/chosen/b"} <= logged.keys()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_checkpoint_is_validated_against_the_model_before_training(
    kind: str, train: Train, write_pairs: WritePairs, tmp_path: Path
) -> None:
    data = {"val_sources": {"held": SourceConfig(path=str(write_pairs("val.json", 6)))}}
    run = train(kind, lr=1e-2, data=data)
    during = float(run.trainer.callback_metrics["val/loss"])
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    for file in reference_folder(run.data).glob("*.npy"):
        file.unlink()
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accumulate_grad_batches": 2}
    [found] = Trainer(accelerator="cpu", **settings).validate(
        CausalLMModule(replace(run.module.spec)),
        run.data.with_spec(run.data.spec),
        ckpt_path=tmp_path / "end.ckpt",
        verbose=False,
    )
    assert found["val/loss"] == pytest.approx(during, abs=1e-6)
    assert during < math.log(2) - 1e-3


def test_a_shortened_pair_is_trained_and_reported(train: Train) -> None:
    run = train(data={"max_length": 100, "overlong": "truncate", "max_prompt_length": 20}, trainer={"max_steps": 1})
    report = run.data.report.sources["train/toy"]
    assert report.examples == report.truncated == 20
    assert report.longest > 100
    assert abs(run.losses[0] - math.log(2)) <= 1e-6


def test_a_micro_batch_of_pairs_waits_for_no_device(train: Train, waits: list[list[str]]) -> None:
    train("full", trainer={"accumulate_grad_batches": 3, "max_steps": 2})
    assert len(waits) == 6
    assert waits[3:5] == [[], []]  # the first step proves the head, and the end of a step is logged
