from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from sft_lightning.migration.arguments import GivenOptions
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Options, System, translate
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments


def translated(*, quantized: bool = False, full: bool = False, validation: bool = False, **given: str) -> Draft:
    def finish(options: Options, draft: Draft) -> None:
        if validation:
            draft.set("data.val_fraction", 0.1)
        finish_training_arguments(options, draft, quantized=quantized, full=full)

    system = System(name="own", title="Own", source="", options=TRAINING_ARGUMENTS, finish=finish)
    return translate(system, GivenOptions({name: value.split() for name, value in given.items()}))


def test_max_steps_overrides_epochs() -> None:
    values = translated(max_steps="100", num_train_epochs="2").values
    assert (values["trainer.max_steps"], values["trainer.max_epochs"]) == (100, -1)


def test_a_fraction_of_an_epoch_is_rounded_up_with_a_comment() -> None:
    draft = translated(num_train_epochs="1.5")
    assert draft.values["trainer.max_epochs"] == 2
    assert "1.5 in the original" in draft.comments["trainer.max_epochs"]


def test_adafactor_takes_the_rate_of_the_schedule_and_none_of_adams_options() -> None:
    draft = translated(optim="adafactor", learning_rate="1e-4", adam_beta2="0.95", adam_epsilon="1e-6")
    init_args = {key.rpartition(".")[2]: value for key, value in draft.values.items() if "optimizer.init_args" in key}
    assert init_args == {"lr": 1e-4, "scale_parameter": False, "relative_step": False}
    assert [option for option, _ in draft.omitted] == ["--adam_beta2 0.95", "--adam_epsilon 1e-6"]
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert Adafactor([parameter], **init_args).param_groups[0]["lr"] == 1e-4


def test_an_unknown_optimizer_is_listed_and_adamw_is_used() -> None:
    draft = translated(optim="lion_32bit", adam_beta2="0.95")
    assert draft.values["model.optimizer.class_path"] == "torch.optim.AdamW"
    assert draft.values["model.optimizer.init_args.betas"] == [0.9, 0.95]
    assert draft.omitted[0][0] == "--optim lion_32bit"


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": "5"}, {"name": "constant", "warmup_steps": 5}),
        ({"warmup_ratio": "0.1"}, {"name": "linear", "warmup_ratio": 0.1}),
        ({"warmup_ratio": "0.1", "warmup_steps": "5"}, {"name": "linear", "warmup_steps": 5}),
        ({"lr_scheduler_type": "constant", "warmup_ratio": "0.1"}, {"name": "constant"}),
        ({"lr_scheduler_type": "inverse_sqrt"}, {"name": "cosine"}),
    ],
)
def test_schedules_and_warm_up_are_migrated(given: dict[str, str], schedule: dict[str, Any]) -> None:
    values = translated(**given).values
    prefix = "model.lr_scheduler."
    assert {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)} == schedule


@pytest.mark.parametrize(
    ("given", "full", "dtype", "precision"),
    [
        ({}, False, "float32", None),
        ({"bf16": "True"}, False, "bfloat16", "bf16-mixed"),
        ({"fp16": "True"}, True, "float32", "16-mixed"),
    ],
)
def test_weights_that_train_are_float32(given: dict[str, str], full: bool, dtype: str, precision: str | None) -> None:
    values = translated(full=full, **given).values
    assert (values["model.dtype"], values.get("trainer.precision")) == (dtype, precision)


@pytest.mark.parametrize(
    ("given", "init_args"),
    [
        ({"eval_strategy": "steps", "eval_steps": "50", "gradient_accumulation_steps": "4"}, {"every_n_steps": 50}),
        ({"evaluation_strategy": "steps", "logging_steps": "20"}, {"every_n_steps": 20}),
        ({"eval_strategy": "steps"}, {"every_n_steps": 500}),
        ({"eval_strategy": "epoch"}, {"every_n_epochs": 1}),
        ({"eval_strategy": "no"}, None),
        ({}, None),
    ],
)
def test_a_run_with_validation_data_validates_as_often_and_at_its_end(
    given: dict[str, str], init_args: dict[str, int] | None
) -> None:
    first, _ = translated(validation=True, **given).values["trainer.callbacks"]
    assert first["class_path"] == "callbacks.EvaluateEvery"
    assert first.get("init_args") == init_args


def test_an_evaluation_strategy_without_validation_data_is_listed() -> None:
    draft = translated(eval_strategy="steps", eval_steps="50")
    assert [callback["class_path"] for callback in draft.values["trainer.callbacks"]] == [
        "lightning.pytorch.callbacks.ModelCheckpoint"
    ]
    assert dict(draft.omitted)["--eval_strategy steps"] == "there is no validation data; set data.val_sources"
    assert not translated(eval_strategy="no").omitted


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"save_steps": "10"}, {"every_n_train_steps": 10, "save_top_k": -1}),
        ({"save_strategy": "epoch", "save_total_limit": "1"}, {"every_n_epochs": 1, "save_top_k": 1}),
        ({"save_total_limit": "3"}, {"every_n_train_steps": 500, "save_top_k": 3, "monitor": "step", "mode": "max"}),
    ],
)
def test_checkpoints_are_saved_as_often(given: dict[str, str], options: dict[str, Any]) -> None:
    [callback] = translated(**given).values["trainer.callbacks"]
    assert callback["init_args"] == {"filename": "{step}", "save_last": True, **options}
    assert translated(save_strategy="no").values["trainer.enable_checkpointing"] is False


@pytest.mark.parametrize(
    ("report_to", "loggers"),
    [("none", False), ("wandb", ["WandbLogger"]), ("tensorboard wandb", ["TensorBoardLogger", "WandbLogger"])],
)
def test_loggers_are_migrated(report_to: str, loggers: Any) -> None:
    found = translated(report_to=report_to, run_name="mine").values["trainer.logger"]
    assert (found and [logger["class_path"].rpartition(".")[2] for logger in found]) == loggers


def test_an_unknown_logger_and_a_run_name_without_wandb_are_listed() -> None:
    omitted = dict(translated(report_to="mlflow", run_name="mine").omitted)
    assert set(omitted) == {"--report_to mlflow", "--run_name mine"}
