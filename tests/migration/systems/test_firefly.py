from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_lightning.__main__ import main
from sft_lightning.data.pairs.store import Shortening, shorten

Migrate = Callable[..., dict[str, Any]]
Accepted = Callable[[], dict[str, Any]]

LLAMA2 = {
    "output_dir": "output/llama2-7b-sft-qlora",
    "model_name_or_path": "NousResearch/Llama-2-13b-chat-hf",
    "train_file": "./data/train.jsonl",
    "template_name": "llama2",
    "num_train_epochs": 5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "learning_rate": 1e-4,
    "max_seq_length": 1024,
    "logging_steps": 100,
    "save_steps": 100,
    "save_total_limit": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 100,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "gradient_checkpointing": True,
    "disable_tqdm": False,
    "optim": "paged_adamw_32bit",
    "seed": 42,
    "fp16": True,
    "report_to": "tensorboard",
    "dataloader_num_workers": 10,
    "save_strategy": "steps",
    "weight_decay": 0,
    "max_grad_norm": 0.3,
    "remove_unused_columns": False,
}
"""The keys of the CS5340 project's `train_args/llama2-7b-sft-qlora.json`."""


def test_the_cs5340_file_becomes_a_configuration(migrate: Migrate, accepted: Accepted) -> None:
    migrate("firefly", LLAMA2)
    config = accepted()
    model, data, trainer = config["model"], config["data"], config["trainer"]
    assert model["quantization"]["bits"] == 4
    assert (model["adapter"]["r"], model["adapter"]["target_modules"]) == (64, "all-linear")
    assert model["optimizer"]["class_path"].endswith("PagedAdamW32bit")
    assert model["optimizer"]["init_args"]["lr"] == 1e-4
    assert (model["lr_scheduler"]["name"], model["lr_scheduler"]["warmup_steps"]) == ("constant", 100)
    assert (model["dtype"], trainer["precision"]) == ("float16", "16-mixed")
    assert model["gradient_checkpointing"] is True
    assert (data["template"], data["max_length"], data["batch_size"]) == ("firefly/llama2", 1024, 1)
    assert data["sources"]["train"]["format"] == "firefly"
    assert (trainer["gradient_clip_val"], trainer["accumulate_grad_batches"]) == (0.3, 16)
    assert trainer["log_every_n_steps"] == 100


def test_mamba_gets_target_modules_that_an_adapter_can_train(migrate: Migrate, accepted: Accepted) -> None:
    mamba = {"model_name_or_path": "state-spaces/mamba-1.4b-hf", "train_mode": "lora", "template_name": "mamba"}
    migrate("firefly", {**LLAMA2, **mamba})
    model = accepted()["model"]
    assert (model["adapter"]["target_modules"], model["quantization"]) == ("mamba", None)
    assert (model["add_special_tokens"], model["adapter"]["trainable_token_indices"]) == (["</s>"], "added")


def test_full_pretraining_becomes_the_pretrain_task(migrate: Migrate, accepted: Accepted) -> None:
    changes = {"task_type": "pretrain", "train_mode": "full", "train_file": "./data/pretrain", "optim": "adamw_hf"}
    migrate("firefly", {**LLAMA2, **changes, "deepspeed": "./train_args/ds_z3_config.json"})
    config = accepted()
    assert (config["task"], config["data"]["packing"], config["model"]["adapter"]) == ("pretrain", "concat", None)
    assert config["data"]["sources"]["pretrain"]["format"] == "text"
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["trainer"]["strategy"] == "deepspeed_stage_3"


def test_the_argument_file_of_a_command_is_read(migrate: Migrate, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(LLAMA2))
    found = migrate("firefly", "torchrun --nproc_per_node=2 train.py --train_args_file own.json\n")
    assert found["data"]["template"] == "firefly/llama2"
    assert found["trainer"]["devices"] == 2


DPO = {"task_type": "dpo", "train_file": "./data/pairs.jsonl", "max_seq_length": 1024, "max_prompt_length": 300}


def test_preference_training_keeps_the_same_tokens_of_each_pair(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate("firefly", {**LLAMA2, **DPO, "beta": 0.2})
    config = accepted()
    data = config["data"]
    assert config["task"] == "dpo"
    assert (config["model"]["preference"]["loss"], config["model"]["preference"]["beta"]) == ("sigmoid", 0.2)
    assert (data["max_length"], data["max_prompt_length"], data["overlong"]) == (2048, 300, "truncate")
    assert (data["pair_history"], data["packing"], data["template"]) == ("chosen", "none", "firefly/llama2")
    assert data["sources"]["pairs"]["format"] == "preference"
    assert "Not migrated:\n#   --max_prompt_length" not in found["text"]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "kept"),
    [
        (900, 50, 60, (900, 50, 60)),
        (900, 800, 60, (300, 724, 60)),
        (200, 900, 60, (200, 824, 60)),
    ],
)
def test_migrated_lengths_truncate_pairs_as_firefly_does(
    prompt: int, chosen: int, rejected: int, kept: tuple[int, int, int], migrate: Migrate
) -> None:
    data = migrate("firefly", {**LLAMA2, **DPO})["data"]
    limits = Shortening(data["max_length"] // 2, data["max_prompt_length"])
    lengths = (np.array([tokens]) for tokens in (prompt, chosen, rejected))
    assert tuple(int(tokens[0]) for tokens in shorten(*lengths, limits)) == kept


def test_a_prompt_length_that_could_empty_answers_is_reduced_with_a_comment(
    migrate: Migrate, accepted: Accepted
) -> None:
    found = migrate("firefly", {**LLAMA2, **DPO, "max_seq_length": 512, "max_prompt_length": 512})
    assert accepted()["data"]["max_prompt_length"] == 256
    assert "max_prompt_length: 256  # 512 in the original, which can leave no tokens of an answer" in found["text"]


def test_preference_options_are_not_migrated_to_another_task(migrate: Migrate) -> None:
    text = migrate("firefly", {**LLAMA2, "beta": 0.1})["text"]
    assert "#   --beta 0.1: only for preference training" in text
    assert "max_prompt_length" not in text


def test_a_missing_argument_file_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "firefly", "train.py", "--train_args_file", "gone.json"]) == 2
    assert "'gone.json', which does not exist" in capsys.readouterr().err


def test_an_unknown_template_and_an_unknown_option_are_listed(migrate: Migrate) -> None:
    found = migrate("firefly", {**LLAMA2, "template_name": "none_such", "colour": "red"})
    assert "#   --template_name none_such: " in found["text"]
    assert "#   --colour red: not a known option of Firefly" in found["text"]
