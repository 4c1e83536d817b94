"""Covers sft_lightning.migration.systems: what holds for the options of every system."""

from __future__ import annotations

from functools import cache

import pytest

from sft_lightning.cli.commands.migrate import migrate
from sft_lightning.migration.systems import SYSTEMS

VALUES = {
    "bnb_4bit_use_double_quant": "False",
    "adapter": "qlora", "bnb_4bit_quant_type": "fp4", "beta": "0.3", "data_path": "Dahoas/full-hh-rlhf",
    "data_split": "1,1,1", "ddp_find_unused_parameters": "true", "deepspeed": "ds_zero2.json", "double_quant": "False",
    "dtype": "bf16", "eval_file": "e.json", "eval_strategy": "epoch", "evaluation_strategy": "epoch",
    "fsdp": "full_shard", "load_in_kbits": "8", "local_rank": "1", "lr_scheduler_type": "constant", "mode": "chat",
    "model_type": "seq2seq", "optim": "sgd", "peft_path": "old", "processor_style": "vigogne_chat_v2",
    "quant_type": "fp4", "report_to": "wandb", "save_strategy": "epoch", "task_type": "pretrain",
    "template_name": "llama2", "torch_dtype": "bfloat16", "compute_dtype": "bfloat16", "train_mode": "full",
    "rope_scaling_type": "dynamic", "warmup_ratio": "0.07", "eval_split_ratio": "0.07", "lora_module_name": "x.",
}  # fmt: skip
"""A value of each option that is not a number and not a default; flags have none, other options are numbers."""

FLAGS = {
    "load_in_8bit", "load_in_4bit", "lora_target_all_linear_layers", "add_eot_token", "offload", "only_optimize_lora",
    "use_nested_quant", "pack_into_block", "q_lora", "full_finetuning", "fp16", "bf16",
}  # fmt: skip

WITH: dict[str, list[str]] = {
    "eval_strategy": ["--eval_data_path=e", "--eval_file=e", "--validation_file=e"],
    "evaluation_strategy": ["--eval_data_path=e", "--eval_file=e", "--validation_file=e"],
    "eval_steps": ["--evaluation_strategy=steps", "--eval_data_path=e", "--eval_file=e", "--validation_file=e"],
    "beta": ["--task_type=dpo"], "max_prompt_length": ["--task_type=dpo"], "block_size": ["--pack_into_block"],
    "use_nested_quant": ["--load_in_4bit"], "bnb_4bit_quant_type": ["--load_in_4bit"],
    "bnb_4bit_use_double_quant": ["--adapter=qlora", "--use_nested_quant=True"],
    "double_quant": ["--load_in_kbits=4"], "quant_type": ["--load_in_kbits=4"],
    "lora_learning_rate": ["--lora_dim=4"], "lora_module_name": ["--lora_dim=4"],
    "only_optimize_lora": ["--lora_dim=4"], "eot_token": ["--add_eot_token"],
    "load_in_4bit": ["--adapter=lora"], "load_in_8bit": ["--adapter=lora"],
    "target_modules": ["--adapter=lora"], "lora_target_modules": ["--adapter=lora"],
    "lora_target_all_linear_layers": ["--adapter=lora"], "lora_r": ["--adapter=lora"], "lora_alpha": ["--adapter=lora"],
    "lora_dropout": ["--adapter=lora"], "lora_modules_to_save": ["--adapter=lora"],
    "max_train_samples": ["--train_file=t"], "max_eval_samples": ["--eval_file=e"], "torch_dtype": ["--adapter=lora"],
}  # fmt: skip
"""Options with which an option means something."""

translated = cache(migrate)


def arguments(system: str, option: str) -> tuple[str, ...]:
    """Return the options with which an option means something, as far as the system has them."""
    known = {each.name for each in SYSTEMS[system].options}
    found = [each for each in WITH.get(option, []) if each[2:].partition("=")[0] in known]
    return ("train.py" if system != "fastchat" else "train_lora.py", "--model_name_or_path=m", *found)


def is_dropped(system: str, option: str) -> bool:
    """Whether an option changes neither the YAML nor the remarks."""
    given = f"--{option}" if option in FLAGS else f"--{option}={VALUES.get(option, '7')}"
    around = arguments(system, option)
    return translated(system, around) == translated(system, (*around, given))


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_option_is_dropped_without_a_remark(system: str) -> None:
    names = {option.name for option in SYSTEMS[system].options} - {"model_name_or_path"}
    assert not [name for name in sorted(names) if is_dropped(system, name)]
