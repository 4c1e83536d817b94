from __future__ import annotations

from collections.abc import Callable
from typing import Any

Migrate = Callable[..., dict[str, Any]]
Accepted = Callable[[], dict[str, Any]]

RUN_SFT = """\
lr=1e-4
lora_rank=8
lora_alpha=32
lora_trainable="q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"
modules_to_save="embed_tokens,lm_head"
lora_dropout=0.05

pretrained_model={base}
chinese_tokenizer_path=path/to/chinese/llama/tokenizer/dir
dataset_dir=path/to/sft/data/dir
gradient_accumulation_steps=8
output_dir=output_dir
peft_model=path/to/peft/model/dir
validation_file=validation_file_name.json

deepspeed_config_file=ds_zero2_no_offload.json

torchrun --nnodes 1 --nproc_per_node 1 run_clm_sft_with_peft.py \\
    --deepspeed ${{deepspeed_config_file}} \\
    --model_name_or_path ${{pretrained_model}} --tokenizer_name_or_path ${{chinese_tokenizer_path}} \\
    --dataset_dir ${{dataset_dir}} --validation_split_percentage 0.001 \\
    --per_device_train_batch_size 1 --per_device_eval_batch_size 1 \\
    --do_train --do_eval --seed $RANDOM --fp16 \\
    --max_steps 100 --lr_scheduler_type cosine --learning_rate ${{lr}} --warmup_ratio 0.03 --weight_decay 0 \\
    --logging_strategy steps --logging_steps 10 --logging_first_step True \\
    --save_strategy steps --save_total_limit 3 --save_steps 500 \\
    --evaluation_strategy steps --eval_steps 250 \\
    --gradient_accumulation_steps ${{gradient_accumulation_steps}} --preprocessing_num_workers 8 \\
    --max_seq_length 512 --output_dir ${{output_dir}} --overwrite_output_dir --ddp_timeout 30000 \\
    --lora_rank ${{lora_rank}} --lora_alpha ${{lora_alpha}} --trainable ${{lora_trainable}} \\
    --modules_to_save ${{modules_to_save}} --lora_dropout ${{lora_dropout}} \\
    --torch_dtype float16 --validation_file ${{validation_file}} {peft} \\
    --gradient_checkpointing --ddp_find_unused_parameters False
"""
"""The options that `scripts/training/run_sft.sh` sets."""


def test_run_sft_becomes_a_configuration(migrate: Migrate, accepted: Accepted) -> None:
    found = migrate("chinese_alpaca", RUN_SFT.format(base="path/to/llama", peft=""))
    config = accepted()
    model, data, trainer = config["model"], config["data"], config["trainer"]
    assert (model["adapter"]["r"], model["adapter"]["alpha"]) == (8, 32)
    assert model["adapter"]["target_modules"][:2] == ["q_proj", "v_proj"]
    assert model["adapter"]["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert (model["dtype"], trainer["precision"]) == ("float16", "16-mixed")
    assert model["resize_vocabulary"] is True
    assert (data["template"], data["max_length"]) == ("chinese_alpaca/1", 512)
    assert data["val_sources"]["validation_file_name"]["format"] == "alpaca"
    assert (trainer["max_steps"], trainer["max_epochs"]) == (100, -1)
    assert trainer["callbacks"][0]["init_args"]["every_n_steps"] == 250
    assert trainer["strategy"] == "deepspeed_stage_2"
    assert (trainer["devices"], trainer["num_nodes"]) == (1, 1)
    assert "seed_everything" not in found
    assert "#   --seed $RANDOM: the script does not set this variable" in found["text"]
    assert "#   --validation_split_percentage 0.001: the script ignores it" in found["text"]


def test_a_continued_adapter_keeps_its_own_configuration(migrate: Migrate, accepted: Accepted) -> None:
    migrate("chinese_alpaca", RUN_SFT.format(base="path/to/llama-2", peft="--peft_path ${peft_model}"))
    config = accepted()
    assert config["model"]["adapter"]["path"] == "path/to/peft/model/dir"
    assert config["model"]["adapter"]["modules_to_save"] is None
    assert config["data"]["template"] == "chinese_alpaca/2"


def test_quantization_of_version_2_is_migrated(migrate: Migrate, accepted: Accepted) -> None:
    migrate("chinese_alpaca", ["run.py", "--load_in_kbits", "4", "--double_quant", "False", "--bf16", "True"])
    quantization = accepted()["model"]["quantization"]
    assert (quantization["bits"], quantization["quant_type"], quantization["double_quant"]) == (4, "nf4", False)
