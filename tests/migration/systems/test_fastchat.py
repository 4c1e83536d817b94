from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Migrate = Callable[..., dict[str, Any]]
Accepted = Callable[[], dict[str, Any]]

RECIPE = """\
DATA_PATH=../data/sharegpt_train.json
EVAL_DATA_PATH=../data/sharegpt_test.json
MODEL_NAME=<your model path>
OUTPUT_DIR=./checkpoints
PATH_TO_DEEPSPEED_CONFIG=../playground/deepspeed_config_lora_s{stage}.json

deepspeed ../fastchat/train/train_lora.py \\
    --run_name "a test" \\
    --model_name_or_path $MODEL_NAME \\
    --lora_r {r} --lora_alpha 16 --lora_dropout 0.05 \\
    --data_path $DATA_PATH --eval_data_path $EVAL_DATA_PATH \\
    --output_dir $OUTPUT_DIR \\
    --num_train_epochs {epochs} \\
    --bf16 True --tf32 True \\
    --per_device_train_batch_size {batch} --per_device_eval_batch_size {batch} \\
    --gradient_accumulation_steps {accumulate} \\
    --evaluation_strategy "epoch" --save_strategy "epoch" --save_total_limit 3 \\
    --learning_rate 3e-4 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" \\
    --logging_strategy "steps" --logging_steps 1 \\
    --model_max_length 1024 {q_lora} \\
    --deepspeed $PATH_TO_DEEPSPEED_CONFIG \\
    --gradient_checkpointing True \\
    --flash_attn True
"""
"""The fork's `scripts/train_lora_{7b_base,13b_base,70b_chat}.sh`."""

SIZES = {
    "7b": {"r": 8, "batch": 16, "accumulate": 2, "epochs": 10, "stage": 2, "q_lora": "--q_lora True"},
    "13b": {"r": 16, "batch": 4, "accumulate": 1, "epochs": 1, "stage": 2, "q_lora": "--q_lora True"},
    "70b": {"r": 64, "batch": 2, "accumulate": 8, "epochs": 5, "stage": 3, "q_lora": ""},
}


@pytest.mark.parametrize("size", SIZES)
def test_the_forks_recipes_become_configurations(migrate: Migrate, accepted: Accepted, size: str) -> None:
    row = SIZES[size]
    found = migrate("fastchat", RECIPE.format(**row))
    config = accepted()
    assert found["model"]["model_name_or_path"] == "<your model path>"
    assert config["model"]["adapter"]["r"] == row["r"]
    assert config["model"]["adapter"]["alpha"] == 16
    assert config["model"]["adapter"]["target_modules"][:2] == ["q_proj", "k_proj"]
    assert (config["model"]["quantization"] or {}).get("bits") == (4 if row["q_lora"] else None)
    assert config["model"]["optimizer"]["init_args"]["lr"] == 3e-4
    assert config["model"]["lr_scheduler"] | {"name": "cosine", "warmup_ratio": 0.03} == config["model"]["lr_scheduler"]
    assert config["model"]["dtype"] == "bfloat16"
    assert config["data"]["template"] == "vicuna_v1.1"
    assert config["data"]["max_length"] == 1024
    assert config["data"]["packing"] == "none"
    assert config["data"]["batch_size"] == row["batch"]
    assert config["data"]["val_sources"]["sharegpt_test"]["format"] == "sharegpt"
    assert config["trainer"]["accumulate_grad_batches"] == row["accumulate"]
    assert config["trainer"]["max_epochs"] == row["epochs"]
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["trainer"]["strategy"] == f"deepspeed_stage_{row['stage']}"
    evaluate, save = config["trainer"]["callbacks"]
    assert evaluate["class_path"].endswith("EvaluateEvery")
    assert evaluate["init_args"]["every_n_epochs"] == 1
    assert save["init_args"]["save_top_k"] == 3
    for option in ("--tf32 True", "--flash_attn True", "--logging_strategy steps", "--run_name a test"):
        assert f"#   {option}: " in found["text"]


def test_full_fine_tuning_has_no_adapter_and_float32_weights(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate(
        "fastchat",
        "torchrun --nproc_per_node=16 --master_port=20001 fastchat/train/train_mem.py --model_name_or_path llama-7b "
        "--data_path chat.json --fp16 --output_dir out --evaluation_strategy steps --eval_steps 1500 "
        "--gradient_accumulation_steps 16 --save_strategy steps --save_steps 1500 --save_total_limit 8 "
        '--learning_rate 2e-5 --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer '
        "--model_max_length 2048 --lazy_preprocess True",
    )
    config = accepted()
    assert config["model"]["adapter"] is None
    assert (config["model"]["dtype"], config["trainer"]["precision"]) == ("float32", "16-mixed")
    assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("fsdp2", 16)
    assert "#   --evaluation_strategy steps: there is no validation data; set data.val_sources" in found["text"]
    assert "target_length: 2048" in found["text"]


def test_defaults_of_fastchat_are_written_out(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate("fastchat", ["train_lora.py", "--model_name_or_path", "m", "--data_path", "d.json"])
    config = accepted()
    assert config["data"]["max_length"] == 512
    assert config["model"]["optimizer"]["init_args"]["lr"] == 5e-5
    assert config["model"]["lr_scheduler"]["name"] == "linear"
    assert config["trainer"]["max_epochs"] == 3
    assert "max_length: 512  # FastChat's default" in found["text"]


def test_a_deepspeed_json_is_used_as_it_is(migrate: Migrate, accepted: Accepted, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    base = ["train_lora.py", "--model_name_or_path", "m", "--deepspeed", str(file)]
    strategy = {"class_path": "sft_lightning.strategies.DeepSpeedZeRO", "init_args": {"config": str(file)}}
    assert migrate("fastchat", base)["trainer"]["strategy"] == strategy
    assert accepted()["trainer"]["strategy"]["init_args"]["config"] == str(file)
    quantized = migrate("fastchat", [*base, "--q_lora", "True"])
    assert quantized["trainer"]["strategy"] == strategy
    assert "the 4-bit base is sharded too" in quantized["text"]


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        (["--rope_scaling_type", "dynamic"], {"type": "dynamic", "target_length": 4096}),
        (["--rope_scaling_type", "linear", "--rope_scaling_factor", "2.0"], {"type": "linear", "factor": 2.0}),
    ],
)
def test_rope_scaling_is_migrated(
    migrate: Migrate, accepted: Accepted, options: list[str], scaling: dict[str, Any]
) -> None:
    migrate("fastchat", ["train_lora.py", "--model_max_length", "4096", *options])
    assert accepted()["model"]["rope_scaling"] | scaling == accepted()["model"]["rope_scaling"]
