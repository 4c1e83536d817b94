from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_lightning.cli.commands.migrate import migrate as command

Migrate = Callable[..., dict[str, Any]]
Accepted = Callable[[], dict[str, Any]]

SCRIPT = """\
#!/bin/bash
# a note
OUTPUT=$1
ZERO_STAGE=$2
if [ "$OUTPUT" == "" ]; then
    OUTPUT=./output
fi
if [ "$ZERO_STAGE" == "" ]; then
    ZERO_STAGE={stage}
fi
mkdir -p $OUTPUT

deepspeed {launcher} main.py \\
   {options} \\
   --zero_stage $ZERO_STAGE \\
   --enable_tensorboard --tensorboard_path $OUTPUT \\
   --deepspeed --output_dir $OUTPUT &> $OUTPUT/training.log
"""

BLEND = (
    "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
    "yitingxie/rlhf-reward-datasets --data_split 2,4,4 --max_seq_len 512 --lr_scheduler_type cosine "
    "--num_warmup_steps 0 --seed 1234 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1"
)

# script, stage, learning rate of the options, weight decay, epochs, batch size, accumulation, options of LoRA
ROWS: dict[str, tuple[Any, ...]] = {
    "single_gpu/run_1.3b": (0, None, None, None, None, 8, "--lora_dim 128"),
    "single_gpu/run_6.7b_lora": (0, None, 0, 16, 8, 16, "--lora_dim 128 --gradient_checkpointing"),
    "single_node/run_1.3b": (2, 9.65e-6, 0, 16, 8, 1, ""),
    "single_node/run_1.3b_lora": (0, 1e-3, 0.1, 16, 8, 1, "--lora_dim 128 --only_optimize_lora"),
    "single_node/run_6.7b": (3, 9.65e-6, 0, 16, 6, 1, ""),
    "single_node/run_13b": (3, 1e-4, 0, 16, 4, 1, "--lora_dim 128"),
    "single_node/run_30b_lora": (3, 9.65e-6, 0, 16, 4, 1, "--lora_dim 128"),
    "multi_node/run_66b": (3, 1e-4, 0.1, 2, 4, 1, "--lora_dim 128"),
    "llama2/run_llama2_7b": (3, 9.65e-6, 0, 4, 4, 1, ""),
    "llama2/run_llama2_7b_lora": (3, 9.65e-6, 0, 4, 4, 1, '--lora_dim 128 --lora_module_name "layers."'),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_scripts_of_step_1_become_configurations(migrate: Migrate, accepted: Accepted, name: str) -> None:
    stage, lr, decay, epochs, batch, accumulate, lora = ROWS[name]
    given = {
        "learning_rate": lr,
        "weight_decay": decay,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
    }
    options = " ".join(f"--{option} {value}" for option, value in given.items() if value is not None)
    launcher = "--num_gpus 1" if "single_gpu" in name else ""
    found = migrate(
        "deepspeed_chat",
        SCRIPT.format(
            stage=stage, launcher=launcher, options=f"{BLEND} {options} --model_name_or_path facebook/opt-1.3b {lora}"
        ),
    )
    config = accepted()
    model, data, trainer = config["model"], config["data"], config["trainer"]
    init = model["optimizer"]["init_args"]
    assert init["betas"] == [0.9, 0.95]
    assert init["lr"] == (5e-4 if lora else lr)
    assert init["weight_decay"] == (decay or 0)
    assert trainer["max_epochs"] == (epochs or 1)
    assert data["batch_size"] == (batch or 16)
    assert trainer["accumulate_grad_batches"] == accumulate
    strategies = {0: None, 2: "deepspeed_stage_2", 3: "deepspeed_stage_3"}
    assert found["trainer"].get("strategy") == strategies[int(stage)]
    assert found["trainer"].get("devices") == (1 if launcher else None)
    assert trainer["default_root_dir"] == "./output"
    assert (data["data_split"], data["compat"], data["loss_on"]) == ("2,4,4", "deepspeed_chat", "all")
    assert [source["path"] for source in data["sources"].values()][:2] == ["Dahoas/rm-static", "Dahoas/full-hh-rlhf"]
    assert data["val_sources"]["rm_static"]["split"] == "test"
    assert [callback["class_path"] for callback in found["trainer"]["callbacks"]] == ["callbacks.EvaluateFirst"]
    assert config["seed_everything"] == 1234
    if not lora:
        assert model["adapter"] is None
    else:
        adapter = model["adapter"]
        assert (adapter["r"], adapter["alpha"], adapter["dropout"]) == (128, 1, 0)
        assert adapter["only_adapter"] == ("only_optimize_lora" in lora)
        assert adapter["base_lr"] == (None if "only_optimize_lora" in lora else lr or 1e-3)
    only_adapter = "only_optimize_lora" in lora
    assert (model["dtype"], trainer["precision"]) == ("float16" if only_adapter else "float32", "16-mixed")


def test_options_outside_the_scripts_are_migrated(migrate: Migrate, accepted: Accepted) -> None:
    migrate(
        "deepspeed_chat",
        "deepspeed main.py --model_name_or_path m --data_path local/jsonfile --sft_only_data_path wangrui6/Zhihu-KOL "
        "--dtype bf16 --zero_stage 2 --offload --dropout 0.0 --add_eot_token --lr_scheduler_type constant_with_warmup "
        "--data_output_path cache --num_warmup_steps 5",
    )
    config = accepted()
    assert config["trainer"]["strategy"] == "deepspeed_stage_2_offload"
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["model"]["dropout"] == 0
    assert config["model"]["add_special_tokens"] == ["<|endoftext|>"]
    assert config["model"]["lr_scheduler"]["name"] == "constant"
    assert config["model"]["lr_scheduler"]["warmup_steps"] == 5
    assert config["data"]["sources"]["Zhihu_KOL"]["sft_only"]
    assert config["data"]["sources"]["jsonfile"]["format"] == "deepspeed_chat/jsonfile"
    assert config["data"]["store_dir"] == "cache"


def test_a_lora_scope_smaller_than_the_decoder_is_not_migrated(migrate: Migrate) -> None:
    found = migrate("deepspeed_chat", ["main.py", "--lora_dim", "8", "--lora_module_name", "fc1"])
    assert "#   --lora_module_name fc1: set model.adapter.target_modules to a regular expression" in found["text"]


SWEEP = """\
ZERO_STAGE=$1
OFFLOAD=$2
LORA=$3
OUTPUT=$4
if [ "$OFFLOAD" == true ]; then
    OFFLOAD="--offload"
else
    OFFLOAD=""
fi
if [ "$LORA" == true ]; then
    LORA="--lora_dim 128"
else
    LORA=""
fi
cmd="deepspeed main.py \\
   --data_path Dahoas/rm-static --model_name_or_path facebook/opt-1.3b \\
   --deepspeed --zero_stage $ZERO_STAGE ${OFFLOAD} ${LORA} --output_dir $OUTPUT"
echo $cmd
$cmd &> $OUTPUT/training.log
"""
"""The form of training_scripts/opt/single_node/sweep/run_single.sh."""


def test_a_sweep_script_is_read_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "run_single.sh").write_text(SWEEP)

    def run(*arguments: str) -> dict[str, Any]:
        migrated: dict[str, Any] = yaml.safe_load(
            command("deepspeed_chat", [str(tmp_path / "run_single.sh"), *arguments])
        )
        return migrated

    whole = run("3", "true", "true", "out")
    assert whole["trainer"]["strategy"] == "deepspeed_stage_3_offload"
    assert whole["trainer"]["default_root_dir"] == "out"
    assert whole["model"]["adapter"]["r"] == 128
    assert run("2", "false", "false", "out")["trainer"]["strategy"] == "deepspeed_stage_2"
    assert "adapter" not in run("2", "false", "false", "out")["model"]


def test_offloading_at_stage_0_is_remarked(migrate: Migrate) -> None:
    found = migrate("deepspeed_chat", ["main.py", "--model_name_or_path", "m", "--offload"])
    assert "#   --offload: ZeRO stage 0 shards and offloads nothing" in found["text"]
