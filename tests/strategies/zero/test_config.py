"""DeepSpeed JSONs as other trainers ship them: filled in from the YAML, and refused where they contradict it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.strategies.zero.config import YamlSettings, read_config, resolve, user_config
from sft_lightning.strategies.zero.options import ZeroOptions, stage_of


def yaml(**changes: Any) -> YamlSettings:
    values: dict[str, Any] = {
        "optimizer": "AdamW",
        "lr": 2e-4,
        "weight_decay": 0.0,
        "arguments": {"betas": (0.9, 0.999), "eps": 1e-8},
        "warmup_steps": 10,
        "num_steps": 100,
        "schedule": "cosine",
        "batch_size": 2,
        "accumulate": 4,
        "world_size": 8,
        "gradient_clip_val": 1.0,
        "precision": "bf16-mixed",
    }
    return YamlSettings(**{**values, **changes})


FP16_AUTO = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
SIZES_AUTO = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
# The JSONs that other trainers ship; `auto` is for the Hugging Face Trainer.
FASTCHAT_S2 = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "overlap_comm": True,
    },
    "fp16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
FASTCHAT_S3 = {
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "sub_group_size": 1e12,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 5e8,
        "stage3_param_persistence_threshold": 1e6,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **SIZES_AUTO,
}
VIGOGNE_ZERO2 = {
    "fp16": {**FP16_AUTO, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto"},
    },
    "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "reduce_scatter": True},
    **SIZES_AUTO,
}
FIREFLY_Z3 = {
    **SIZES_AUTO,
    "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "fp16": FP16_AUTO,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
SHIPPED = [
    (FASTCHAT_S2, "cosine", 2),
    (FASTCHAT_S3, "cosine", 3),
    (VIGOGNE_ZERO2, "linear", 2),
    (FIREFLY_Z3, "constant", 3),
]


@pytest.mark.parametrize(("config", "schedule", "stage"), SHIPPED)
def test_shipped_jsons_resolve_to_numbers_and_the_precision_of_the_yaml(
    config: dict[str, Any], schedule: str, stage: int
) -> None:
    resolved = resolve(config, yaml(schedule=schedule), source="ds.json")
    assert "auto" not in json.dumps(resolved)
    assert stage_of(resolved) == stage
    assert resolved["bf16"] == {"enabled": True}  # none of them has the block
    assert "fp16" not in resolved
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 1.0
    kept = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    assert resolved["zero_optimization"] == kept


def test_a_json_keeps_its_loss_scaling_if_the_yaml_has_float16() -> None:
    resolved = resolve(VIGOGNE_ZERO2, yaml(schedule="linear", precision="16-mixed"), source="ds.json")
    assert resolved["fp16"] == {
        "enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1,
        "initial_scale_power": 16,
    }  # fmt: skip
    assert "bf16" not in resolved


def test_float32_has_no_precision_block() -> None:
    resolved = resolve(FASTCHAT_S2, yaml(precision="32-true"), source="ds.json")
    assert not {"fp16", "bf16"} & resolved.keys()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is Lamb, model.optimizer is AdamW"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            "optimizer.params.lr is 1e-05, model.optimizer.init_args.lr is 0.0002",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "optimizer.type is Adam, model.optimizer is AdamW",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR"}},
            "scheduler.type is WarmupDecayLR (which is 'linear'), model.lr_scheduler.name is 'cosine'",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
            "optimizer.params.betas is [0.9, 0.95], model.optimizer.init_args.betas is [0.9, 0.999]",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}},
            "optimizer.params.eps is 1e-06, model.optimizer.init_args.eps is 1e-08",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_num_steps is 5, the warm-up of model.lr_scheduler is 10",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 1000}}},
            "scheduler.params.total_num_steps is 1000, the number of planned optimizer steps is 100",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1}}},
            "scheduler.params.cos_min_ratio is 0.1, model.lr_scheduler.min_lr_ratio is 0.0",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1e-3}}},
            "scheduler.params.warmup_max_lr is 0.001, model.optimizer.init_args.lr is 0.0002",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_min_lr": 1e-6}}},
            "scheduler.params.warmup_min_lr is 1e-06, the rate that model.lr_scheduler warms up from is 0.0",
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "log"}}},
            "scheduler.params.warmup_type is log, the warm-up of model.lr_scheduler is linear",
        ),
        ({"train_micro_batch_size_per_gpu": 16}, "train_micro_batch_size_per_gpu is 16, data.batch_size is 2"),
        (
            {"gradient_accumulation_steps": 1},
            "gradient_accumulation_steps is 1, trainer.accumulate_grad_batches is 4",
        ),
        ({"train_batch_size": 65}, "train_batch_size is 65, data.batch_size × trainer.accumulate_grad_batches × "),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, trainer.gradient_clip_val is 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, trainer.precision is 'bf16-mixed'"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, trainer.precision is 'bf16-mixed'"),
    ],
)
def test_a_json_that_contradicts_the_yaml_is_refused_with_both_values(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(config, yaml(), source="ds.json")
    assert str(error.value).startswith("ds.json contradicts the YAML: ")
    assert said in str(error.value)


def test_all_contradictions_are_in_one_message() -> None:
    config = {"scheduler": {"type": "WarmupLR"}, "train_batch_size": 1, "bf16": {"enabled": False}}
    with pytest.raises(UserError, match=r"scheduler\.type.*; train_batch_size.*; bf16\.enabled"):
        resolve(config, yaml(), source="ds.json")


def test_a_json_may_repeat_the_yaml() -> None:
    config = {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-4, "weight_decay": 0, "betas": [0.9, 0.999], "eps": "1e-8", "torch_adam": True},
        },
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10, "total_num_steps": "auto"}},
        "train_batch_size": 64,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
    }
    assert resolve(config, yaml(), source="ds.json")["bf16"] == {"enabled": True}


def test_resolving_does_not_change_the_users_dict() -> None:
    before = json.dumps(FIREFLY_Z3)
    resolve(FIREFLY_Z3, yaml(schedule="constant"), source="ds.json")
    assert json.dumps(FIREFLY_Z3) == before


def test_a_file_is_read_and_errors_name_it(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FASTCHAT_S2))
    assert read_config(file) == FASTCHAT_S2
    file.write_text('{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"ds\.json, line 2, column 2: invalid JSON"):
        read_config(file)
    file.write_text("[]")
    with pytest.raises(UserError, match=r"must hold a JSON object \(found a list\)"):
        read_config(file)
    with pytest.raises(UserError, match="does not exist"):
        read_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ZeroOptions(stage=1), "`stage`; set it in the DeepSpeed config"),
        (
            ZeroOptions(stage=3, quantized_weights=True),
            "`stage`, `quantized_weights`; set them in the DeepSpeed",
        ),
    ],
)
def test_a_config_cannot_be_combined_with_other_keys(options: ZeroOptions, said: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.strategy\.config: cannot be combined with {said}"):
        user_config(options, {"zero_optimization": {"stage": 2}})
    assert user_config(ZeroOptions(), FASTCHAT_S2) == FASTCHAT_S2


def test_the_optimizer_of_the_yaml_is_read_from_the_object() -> None:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5, weight_decay=0.25)
    settings = yaml(optimizer=None).with_optimizer(adam)
    assert (settings.optimizer, settings.lr, settings.weight_decay) == ("AdamW", 0.5, 0.25)


def test_what_is_not_known_yet_is_not_compared() -> None:
    params = {"warmup_num_steps": 5, "total_num_steps": 7, "warmup_max_lr": 1.0}
    config = {"scheduler": {"type": "WarmupCosineLR", "params": params}}
    resolve(config, yaml(optimizer=None, warmup_steps=None, num_steps=None), source="ds.json")


def test_an_optimizer_that_is_not_made_yet_is_not_compared() -> None:
    resolve({"optimizer": {"type": "Lamb"}}, yaml(optimizer=None), source="ds.json")
