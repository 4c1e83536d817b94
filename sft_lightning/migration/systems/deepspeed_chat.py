"""Options of DeepSpeed-Chat, step 1: `training/step1_supervised_finetuning/main.py`."""

from __future__ import annotations

from typing import Any

from sft_lightning.migration.distributed import devices, stage_name
from sft_lightning.migration.draft import Draft, keep_examples_unpacked, source_name
from sft_lightning.migration.options import Options, System, combined, copied, omitted
from sft_lightning.migration.training_arguments import precision, schedule

_WHOLE_DECODER = ("decoder.layers.", "layers.", "model.layers.", "transformer.h.", "h.", "gpt_neox.layers.")
_EVALUATED = {
    "Dahoas/rm-static": "test",
    "Dahoas/full-hh-rlhf": "test",
    "yitingxie/rlhf-reward-datasets": "test",
    "pvduy/sharegpt_alpaca_oa_vicuna_format": "test",
    "stanfordnlp/SHP": "validation",
    "lmqg/qg_jaquad": "validation",
    "lmqg/qag_jaquad": "validation",
    "Cohere/miracl-zh-queries-22-12": "dev",
    "Cohere/miracl-ja-queries-22-12": "dev",
}
"""The split that DeepSpeed-Chat evaluates on (`dschat/utils/data/raw_datasets.py`), by a part of the path."""

_INIT = "model.optimizer.init_args"


def _finish(options: Options, draft: Draft) -> None:
    lora = bool(options.number("lora_dim"))
    _sources(options, draft)
    draft.set("data.compat", "deepspeed_chat", "puts the same records into each part of data_split")
    draft.set("data.loss_on", "all", "prompts have a loss too, as in the original; assistant: only answers")
    draft.set(
        "data.template", "human_assistant", "for sources with messages; DeepSpeed-Chat's own data sets have no template"
    )
    draft.set("data.overlong", "truncate", "as in the original; counted and reported")
    keep_examples_unpacked(draft)
    draft.set("model.optimizer.class_path", "torch.optim.AdamW")
    draft.set(f"{_INIT}.betas", [0.9, 0.95], "as in DeepSpeed-Chat's code")
    rate = options.number("lora_learning_rate") if lora else options.number("learning_rate")
    draft.set(f"{_INIT}.lr", rate, "from --lora_learning_rate, which the adapter uses" if lora else "")
    schedule(options, draft, "cosine")
    if lora:
        _adapter(options, draft)
    else:
        draft.drop("model.adapter.")
    only = lora and options.flag("only_optimize_lora")
    half = {"fp16": "float16", "bf16": "bfloat16"}.get(options.text("dtype") or "fp16", "float16")
    precision(draft, half, full=not only)
    devices(options, draft)
    stage = options.number("zero_stage") or 0
    name = stage_name(int(stage), offload=options.flag("offload"))
    if name is not None:
        draft.set("trainer.strategy", name)
    elif options.flag("offload"):
        draft.omit(
            "--offload", "ZeRO stage 0 shards and offloads nothing; set trainer.strategy: deepspeed_stage_2_offload"
        )
    if options.flag("add_eot_token"):
        draft.set("model.add_special_tokens", options.words("eot_token"))


def _sources(options: Options, draft: Draft) -> None:
    plain_paths, whole = options.words("data_path"), options.words("sft_only_data_path")
    chosen: dict[str, Any] = {}
    for path in [*plain_paths, *whole]:
        extra = {"sft_only": True} if path in whole else {}
        if path == "local/jsonfile":
            draft.omit(
                path, "stands for data/train.json and data/eval.json in DeepSpeed-Chat's folder; correct the paths"
            )
            chosen["jsonfile"] = {"path": "data/train.json", "format": "deepspeed_chat/jsonfile", **extra}
        elif path in ("mkqa-Chinese", "mkqa-Japanese"):
            chosen[source_name(path)] = {"path": "mkqa", "format": f"deepspeed_chat/{path}", **extra}
        else:
            chosen[source_name(path.rpartition("/")[2])] = {"path": path, **extra}
    draft.set("data.sources", chosen)
    held_out = {name: found for name, source in chosen.items() if (found := _evaluated(source)) is not None}
    if held_out:
        draft.set("data.val_sources", held_out)
        draft.set(
            "trainer.callbacks",
            [{"class_path": "callbacks.EvaluateFirst"}],
            "perplexity before training, as in the original; then after each epoch",
        )
    for name in chosen.keys() - held_out.keys():
        draft.omit(f"evaluation on {chosen[name]['path']}", "not a data set of DeepSpeed-Chat; set data.val_sources")


def _evaluated(source: dict[str, Any]) -> dict[str, Any] | None:
    """Return what DeepSpeed-Chat evaluates a source on; `None` if it is not one of its data sets."""
    from sft_lightning.data.formats.deepspeed_chat import is_divided  # imports numpy, which --help does not need

    path, name = source["path"], source.get("format")
    if name == "deepspeed_chat/jsonfile":
        return {**source, "path": "data/eval.json"}
    if is_divided(path, name):
        return source  # `data.compat` takes a tenth of it
    split = next((split for part, split in _EVALUATED.items() if part in path), None)
    return None if split is None else {**source, "split": split}


def _adapter(options: Options, draft: Draft) -> None:
    draft.set("model.adapter.alpha", 1, "DeepSpeed-Chat scales the adapter by 1 / r")
    draft.set("model.adapter.dropout", 0.0, "DeepSpeed-Chat has none")
    scope = options.text("lora_module_name") or ""
    draft.set(
        "model.adapter.target_modules", "all-linear", f"all linear layers but the head; {scope!r} in the original"
    )
    if scope not in _WHOLE_DECODER:
        draft.omit(options.as_written("lora_module_name"), "set model.adapter.target_modules to a regular expression")
    if not options.flag("only_optimize_lora"):
        draft.set("model.adapter.only_adapter", False, "without --only_optimize_lora all other weights train too")
        draft.set("model.adapter.base_lr", options.number("learning_rate"), "from --learning_rate")


SYSTEM = System(
    name="deepspeed_chat",
    title="DeepSpeed-Chat",
    source="`training/step1_supervised_finetuning/main.py`",
    options=(
        combined(
            "data_path", "data.sources", "the format is found from the name of the data set", default="Dahoas/rm-static"
        ),
        copied("data_split", "data.data_split", default="2,4,4", note="`data_split_part: 0` is step 1"),
        combined("sft_only_data_path", "data.sources.<name>.sft_only"),
        copied("data_output_path", "data.store_dir"),
        copied("model_name_or_path", "model.model_name_or_path"),
        copied("per_device_train_batch_size", "data.batch_size", "number", default="16"),
        omitted("per_device_eval_batch_size", "validation uses data.batch_size"),
        copied("max_seq_len", "data.max_length", "number", default="512"),
        combined("learning_rate", "model.optimizer.init_args.lr", "with LoRA: model.adapter.base_lr", default="1e-3"),
        combined("lora_learning_rate", "model.optimizer.init_args.lr", "with LoRA", default="5e-4"),
        copied("weight_decay", "model.optimizer.init_args.weight_decay", "number", default="0.0"),
        copied("num_train_epochs", "trainer.max_epochs", "number", default="1"),
        copied("gradient_accumulation_steps", "trainer.accumulate_grad_batches", "number"),
        combined("lr_scheduler_type", "model.lr_scheduler.name", "constant_with_warmup: constant", default="cosine"),
        copied("num_warmup_steps", "model.lr_scheduler.warmup_steps", "number"),
        copied("output_dir", "trainer.default_root_dir"),
        copied("seed", "seed_everything", "number", default="1234"),
        omitted("local_rank", "the launcher sets it"),
        copied("gradient_checkpointing", "model.gradient_checkpointing", "flag"),
        copied("dropout", "model.dropout", "number"),
        omitted("disable_dropout", "set model.dropout: 0.0", key="model.dropout"),
        combined("offload", "trainer.strategy", "deepspeed_stage_2_offload, deepspeed_stage_3_offload"),
        combined("dtype", "trainer.precision, model.dtype", default="fp16"),
        combined("zero_stage", "trainer.strategy", "0: none", default="0"),
        copied("lora_dim", "model.adapter.r", "number", note="with `alpha: 1`, `dropout: 0`"),
        combined("lora_module_name", "model.adapter.target_modules", "all-linear", default="decoder.layers."),
        combined("only_optimize_lora", "model.adapter.only_adapter", "without it: false"),
        omitted("compute_fp32_loss", "the loss is always computed in float32"),
        omitted("enable_tensorboard", "TensorBoard is on by default"),
        omitted("tensorboard_path", "events are in trainer.default_root_dir"),
        combined("add_eot_token", "model.add_special_tokens"),
        combined("eot_token", "model.add_special_tokens", default="<|endoftext|>"),
        omitted("print_loss", "the loss is logged every trainer.log_every_n_steps"),
        omitted("deepspeed", "the stage comes from zero_stage"),
        omitted("deepspeed_config", "DeepSpeed-Chat ignores it; set trainer.strategy", key="trainer.strategy"),
    ),
    finish=_finish,
)
