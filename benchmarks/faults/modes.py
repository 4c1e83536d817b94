"""Scenarios in which no fault is planted: settings and families of models in which a check could be a false alarm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.faults.scenarios import CONTINUED, EVERY_2_STEPS, NO_ADAPTER, PAIRS, Scenario

FAMILY_FOLDER = "families"
FAMILY_MODES = {"full": (), "lora": (), "qlora": ("--model.quantization.bits=4",)}


def _source(**keys: Any) -> str:
    return f"--data.sources={json.dumps({'source': keys})}"


_TWO_PROCESSES = ("--trainer.devices=2", "--trainer.strategy=ddp")
_METASPACE = "--model.model_name_or_path=metaspace"

MODES = (
    Scenario("bf16", ("--model.dtype=bfloat16",)),
    Scenario("bf16_mixed_full", ("--trainer.precision=bf16-mixed",), without=NO_ADAPTER),
    Scenario("bf16_true", ("--model.dtype=bfloat16", "--trainer.precision=bf16-true")),
    Scenario("int8", ("--model.quantization.bits=8",)),
    Scenario("qlora_bf16", ("--model.quantization.bits=4", "--model.dtype=bfloat16")),
    Scenario("loss_on_all", ("--data.loss_on=all",)),
    Scenario("loss_on_all_llama2", ("--data.loss_on=all", "--data.template=llama2")),
    Scenario("last_turn", ("--data.loss_on=last_turn",)),
    Scenario("metaspace", (_METASPACE,)),
    Scenario("metaspace_all_llama2", (_METASPACE, "--data.loss_on=all", "--data.template=llama2")),
    Scenario("metaspace_chinese", (_METASPACE, _source(path="chinese.json", format="messages"))),
    Scenario("trained_messages", (_source(path="flagged.json", format="messages"),)),
    Scenario("alpaca", (_source(path="questions.json", format="alpaca"), "--data.template=alpaca")),
    Scenario("text", (_source(path="texts.json", format="text"), "--task=pretrain")),
    Scenario("truncated", ("--data.max_length=48", "--data.overlong=truncate")),
    Scenario("dropped", ("--data.max_length=64", "--data.overlong=drop")),
    Scenario("concat_short", ("--data.max_length=32", "--data.packing=concat")),
    Scenario("auto_packing", ("--data.packing=auto",)),
    Scenario("held_out", ("--data.val_fraction=0.2",)),
    Scenario("shares", (
        "--data.sources={chats: {path: chats.json, format: messages, weight: 3}, "
        "questions: {path: questions.json, format: alpaca, weight: 1}}", "--data.blend.by=tokens")),
    Scenario("max_steps", ("--trainer.max_steps=2",)),
    Scenario("limited", ("--trainer.limit_train_batches=2",)),
    Scenario("two_epochs", ("--trainer.max_epochs=2", "--trainer.log_every_n_steps=4")),
    Scenario("sgd", ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1",
                     "--model.lr_scheduler.name=constant"), without=("--model.optimizer",)),
    Scenario("clip_value", ("--trainer.gradient_clip_algorithm=value",)),
    Scenario("unclipped", (), without=("--trainer.gradient_clip_val",)),
    Scenario("neftune", ("--model.neftune_alpha=5",)),
    Scenario("dora", ("--model.adapter.use_dora=true",)),
    Scenario("pissa", ("--model.adapter.init=pissa",)),
    Scenario("lora_plus", ("--model.adapter.lora_plus_ratio=16",)),
    Scenario("rslora_some_layers", ("--model.adapter.use_rslora=true", "--model.adapter.layers_to_transform=[1]")),
    Scenario("ia3", ("--model.adapter.peft_config=peft.IA3Config",), without=NO_ADAPTER),
    Scenario("head_saved", ("--model.adapter.modules_to_save=[lm_head]",)),
    Scenario("tokens_added", (
        "--model.add_special_tokens=[<|im_start|>, <|im_end|>]", "--data.template=chatml",
        "--model.adapter.modules_to_save=[embed_tokens, lm_head]")),
    Scenario("base_trained_too", ("--model.adapter.only_adapter=false",)),
    Scenario("some_trained", ("--model.trainable=[layers.1]",), without=NO_ADAPTER),
    Scenario("rope_scaled", ("--model.rope_scaling={type: linear, factor: 2.0}",)),
    Scenario("selective", ("--model.gradient_checkpointing=selective",)),
    Scenario("eager", ("--model.attn_implementation=eager", "--data.packing=none")),
    Scenario("adapter_continued", (),
             (("fit", "--trainer.default_root_dir=second", "--model.adapter.path=run/adapter"),)),
    Scenario("resumed_full", EVERY_2_STEPS, (CONTINUED,), without=NO_ADAPTER),
    Scenario("resumed_qlora", ("--model.quantization.bits=4", *EVERY_2_STEPS), (CONTINUED,)),
    Scenario("resumed_streamed", (
        "--data.sources={chats: {path: chats.json, format: messages, streaming: true}}", "--trainer.max_steps=4",
        *EVERY_2_STEPS), (CONTINUED,)),
    Scenario("resumed_ddp", (*_TWO_PROCESSES, *EVERY_2_STEPS, "--data.max_length=80"), (CONTINUED,), processes=2),
    Scenario("fsdp2", ("--trainer.devices=2", "--trainer.strategy=fsdp2"), processes=2),
    Scenario("ddp_full", _TWO_PROCESSES, processes=2, without=NO_ADAPTER),
    Scenario("dpo_ddp", (*PAIRS, *_TWO_PROCESSES), processes=2),
    Scenario("dpo_qlora", (*PAIRS, "--model.quantization.bits=4")),
    Scenario("dpo_separate", (*PAIRS, "--data.packing=none")),
    Scenario("ipo", (*PAIRS, "--model.preference.loss=ipo")),
    Scenario("orpo", (*PAIRS, "--model.preference.loss=orpo")),
    Scenario("simpo", (*PAIRS, "--model.preference.loss=simpo")),
)  # fmt: skip
"""Settings."""


def family_scenarios() -> Iterable[Scenario]:
    """Yield each family of models in each way of tuning."""
    from benchmarks.family_models import FAMILIES

    for family in FAMILIES:
        for mode, options in FAMILY_MODES.items():
            yield Scenario(
                f"{family_folder(family)}_{mode}",
                (
                    f"--model.model_name_or_path=../../{FAMILY_FOLDER}/{family_folder(family)}",
                    "--data.packing=auto",
                    "--data.overlong=truncate",
                    *options,
                ),
                without=NO_ADAPTER if mode == "full" else (),
            )


def family_folder(family: str) -> str:
    """Return the name of a family's folder: `Gemma_3_text`."""
    return family.replace(" ", "_").replace("(", "").replace(")", "")
