from __future__ import annotations

from collections.abc import Callable
from typing import Any

Migrate = Callable[..., dict[str, Any]]
Accepted = Callable[[], dict[str, Any]]

DOCUMENTED = """\
python vigogne/train/train_sft.py \\
    --model_name_or_path "meta-llama/Llama-2-7b-hf" \\
    --train_file "/path/to/train/instruct/file.jsonl" \\
    --output_dir "outputs/llama-2-7b-sft-instruct-lora-int8" \\
    --overwrite_output_dir \\
    --mode "instruct" \\
    --preprocessing_num_workers "8" --dataloader_num_workers "1" \\
    --pack_into_block --block_size "2048" \\
    --load_in_8bit \\
    --lora_r "64" --lora_alpha "16" --lora_dropout "0.05" \\
    --target_modules "q_proj" "v_proj" "k_proj" "o_proj" "gate_proj" "up_proj" "down_proj" \\
    --per_device_train_batch_size "8" --per_device_eval_batch_size "4" \\
    --num_train_epochs "3" --learning_rate "1e-4" --warmup_ratio "0.03" \\
    --lr_scheduler_type "cosine" --weight_decay "0" \\
    --torch_compile --fp16 --gradient_checkpointing \\
    --ddp_find_unused_parameters false \\
    --log_level "info" --logging_steps "10" --logging_first_step true \\
    --save_strategy "steps" --save_steps "100" --save_total_limit "3" \\
    --report_to "tensorboard" "wandb" \\
    --do_train
"""
"""The command in Vigogne's guide."""


def test_the_documented_command_becomes_a_configuration(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate("vigogne", DOCUMENTED)
    config = accepted()
    assert config["model"]["quantization"]["bits"] == 8
    assert config["model"]["dtype"] == "float16"
    assert config["model"]["torch_compile"] is True
    assert len(config["model"]["adapter"]["target_modules"]) == 7
    assert (config["data"]["packing"], config["data"]["max_length"]) == ("best_fit", 2048)
    assert config["data"]["template"] == "vigogne/instruct_en"
    assert config["data"]["sources"]["file"]["path"] == "/path/to/train/instruct/file.jsonl"
    assert config["trainer"]["precision"] == "16-mixed"
    assert [logger["class_path"].rpartition(".")[2] for logger in config["trainer"]["logger"]] == [
        "TensorBoardLogger",
        "WandbLogger",
    ]
    assert config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] == 100
    for option in ("--overwrite_output_dir", "--dataloader_num_workers 1", "--log_level info"):
        assert f"#   {option}: " in found["text"]


def test_strict_length_limits_are_shifted_by_one(migrate: Migrate, accepted: Accepted) -> None:
    migrate(
        "vigogne", ["train_sft.py", "--train_file", "a.json", "--model_min_length", "5", "--model_max_length", "10"]
    )
    data = accepted()["data"]
    assert (data["min_length"], data["max_length"], data["overlong"]) == (6, 9, "drop")


def test_options_of_version_2_are_migrated(migrate: Migrate, accepted: Accepted) -> None:
    migrate(
        "vigogne",
        "python vigogne/cli/train_sft.py --adapter qlora --bnb_4bit_quant_type fp4 --lora_target_all_linear_layers "
        "--processor_style vigogne_chat_v3 --train_file c.jsonl --eval_split_ratio 0.01 --max_train_samples 50 "
        "--bf16 --torch_dtype bfloat16 --lora_modules_to_save embed_tokens lm_head",
    )
    config = accepted()
    quantization = config["model"]["quantization"]
    assert (quantization["bits"], quantization["quant_type"], quantization["double_quant"]) == (4, "fp4", True)
    assert config["model"]["adapter"]["target_modules"] == "all-linear"
    assert config["model"]["adapter"]["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config["data"]["template"] == "vigogne/chat_v3"
    assert config["data"]["val_fraction"] == 0.01
    assert config["data"]["sources"]["c"]["max_examples"] == 50


def test_no_adapter_means_full_fine_tuning(migrate: Migrate, accepted: Accepted) -> None:
    migrate("vigogne", ["train_sft.py", "--adapter", "None", "--train_file", "a.json", "--bf16"])
    assert accepted()["model"]["adapter"] is None
    assert accepted()["model"]["dtype"] == "float32"


def test_version_2_2_without_an_adapter_trains_all_weights(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate("vigogne", ["vigogne/cli/train_sft.py", "--model_name_or_path", "m", "--load_in_8bit"])
    assert accepted()["model"]["adapter"] is None
    assert "quantization" not in found["model"]
    assert "#   --load_in_8bit: all weights train" in found["text"]
    first = migrate("vigogne", ["vigogne/train/train_sft.py", "--model_name_or_path", "m", "--load_in_8bit"])
    assert first["model"]["adapter"]["r"] == 8
    assert first["model"]["quantization"] == {"bits": 8}


def test_a_number_of_examples_without_a_file_is_remarked(migrate: Migrate) -> None:
    found = migrate("vigogne", ["train_sft.py", "--model_name_or_path", "m", "--max_eval_samples", "5"])
    assert "#   --max_eval_samples 5: there is no file for it" in found["text"]
