"""Translate transformers' `TrainingArguments`, which four of the five systems take."""

from __future__ import annotations

import math
from typing import Any

from sft_lightning.migration.distributed import strategy
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Option, Options, combined, copied, omitted

_OPTIMIZERS = {
    "adamw_torch": "torch.optim.AdamW",
    "adamw_torch_fused": "torch.optim.AdamW",
    "adamw_hf": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adafactor": "transformers.Adafactor",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
}
_SCHEDULES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
_OUR_SCHEDULES = ("cosine", "linear", "constant", "polynomial", "wsd", "cosine_with_restarts")
_OPTIMIZER = "model.optimizer.init_args"

TRAINING_ARGUMENTS: tuple[Option, ...] = (
    copied("output_dir", "trainer.default_root_dir"),
    copied("seed", "seed_everything", "number", default="42"),
    combined("num_train_epochs", "trainer.max_epochs", default="3"),
    combined("max_steps", "trainer.max_steps", "overrides num_train_epochs, so `trainer.max_epochs: -1` is set too"),
    copied("per_device_train_batch_size", "data.batch_size", "number", default="8"),
    omitted("per_device_eval_batch_size", "validation uses data.batch_size"),
    copied("gradient_accumulation_steps", "trainer.accumulate_grad_batches", "number"),
    copied("learning_rate", f"{_OPTIMIZER}.lr", "number", default="5e-5"),
    copied("weight_decay", f"{_OPTIMIZER}.weight_decay", "number"),
    combined("adam_beta1", f"{_OPTIMIZER}.betas"),
    combined("adam_beta2", f"{_OPTIMIZER}.betas"),
    copied("adam_epsilon", f"{_OPTIMIZER}.eps", "number"),
    copied("max_grad_norm", "trainer.gradient_clip_val", "number"),
    combined("optim", "model.optimizer.class_path", "adamw_torch, adamw_hf, adafactor, sgd, and bitsandbytes' AdamW"),
    combined("lr_scheduler_type", "model.lr_scheduler.name", "constant_with_warmup: constant", default="linear"),
    copied("warmup_ratio", "model.lr_scheduler.warmup_ratio", "number"),
    combined("warmup_steps", "model.lr_scheduler.warmup_steps"),
    combined("fp16", "trainer.precision, model.dtype", "16-mixed"),
    combined("bf16", "trainer.precision, model.dtype", "bf16-mixed; an adapter's frozen base is bfloat16"),
    omitted("tf32", "float32 products stay exact; use bf16 for speed"),
    copied(
        "gradient_checkpointing", "model.gradient_checkpointing", "flag", note="`auto` is off if the activations fit"
    ),
    copied("logging_steps", "trainer.log_every_n_steps", "number"),
    omitted("logging_strategy", "the loss is logged every trainer.log_every_n_steps"),
    omitted("logging_first_step", "the first step is always logged"),
    omitted("logging_dir", "TensorBoard events are in trainer.default_root_dir"),
    combined(
        "evaluation_strategy",
        "trainer.callbacks (EvaluateEvery)",
        "steps, epoch, no; a run with validation data always validates after its last step too",
    ),
    combined("eval_strategy", "trainer.callbacks (EvaluateEvery)", "same as evaluation_strategy"),
    combined("eval_steps", "trainer.callbacks (EvaluateEvery.every_n_steps)", "optimizer steps"),
    combined("save_strategy", "trainer.callbacks (ModelCheckpoint)", "no: `enable_checkpointing: false`"),
    combined("save_steps", "trainer.callbacks (ModelCheckpoint.every_n_train_steps)"),
    combined("save_total_limit", "trainer.callbacks (ModelCheckpoint.save_top_k)"),
    combined("report_to", "trainer.logger", "tensorboard: the default; wandb: WandbLogger; none: false"),
    combined(
        "run_name",
        "trainer.logger (WandbLogger.name)",
        "only with wandb; otherwise trainer.default_root_dir names a run",
    ),
    combined("deepspeed", "trainer.strategy", "the JSON itself; if it does not exist, the stage in its name"),
    combined("fsdp", "trainer.strategy", "full_shard: fsdp2; with offload: fsdp2_offload"),
    omitted("fsdp_config", "fsdp2 does not need it"),
    omitted("fsdp_transformer_layer_cls_to_wrap", "the decoder layers are found automatically"),
    copied("neftune_noise_alpha", "model.neftune_alpha", "number"),
    combined(
        "ddp_find_unused_parameters", "trainer.strategy", "true: ddp_find_unused_parameters_true; false: the default"
    ),
    omitted("ddp_timeout", "set the timeout of DDPStrategy by class_path", key="trainer.strategy"),
    omitted("dataloader_num_workers", "tokens are read from memory-mapped files, so workers would not help"),
    omitted("remove_unused_columns", "unknown keys of a record are ignored"),
    omitted(
        "overwrite_output_dir",
        "a run folder is never overwritten; continue with --ckpt_path last, or use another folder",
    ),
    omitted("resume_from_checkpoint", "use --ckpt_path last", key="ckpt_path"),
    omitted("do_train", "use the `fit` command"),
    omitted("do_eval", "`fit` validates if there is validation data"),
    omitted("log_level", "the libraries' messages are already reduced"),
    omitted("disable_tqdm", "set `trainer.enable_progress_bar: false`", key="trainer.enable_progress_bar"),
    copied("torch_compile", "model.torch_compile", "flag", note="each decoder layer by itself"),
    omitted("local_rank", "the launcher sets it"),
    omitted("push_to_hub", "nothing is uploaded"),
    omitted("load_best_model_at_end", "use ModelCheckpoint with `monitor: val/loss`"),
    omitted("group_by_length", "use `data.packing: best_fit`, which leaves little padding"),
)


def finish_training_arguments(options: Options, draft: Draft, *, quantized: bool, full: bool) -> None:
    """Translate the training arguments that depend on each other.

    Args:
        options: Options of the system.
        draft: The YAML.
        quantized: Whether the base is quantized.
        full: Whether all weights train, without an adapter.
    """
    _duration(options, draft)
    _optimizer(options, draft)
    schedule(options, draft, "linear")
    _precision(options, draft, full=full)
    strategy(options, draft, quantized=quantized)
    _callbacks(options, draft)
    _logger(options, draft)


def _duration(options: Options, draft: Draft) -> None:
    steps, epochs = options.number("max_steps"), options.number("num_train_epochs")
    if steps is not None and steps > 0:
        draft.set("trainer.max_steps", steps)
        draft.set("trainer.max_epochs", -1, "only max_steps limits the run")
    elif epochs is not None:
        whole = math.ceil(epochs)
        draft.set(
            "trainer.max_epochs", whole, "" if whole == epochs else f"{epochs} in the original; epochs must be whole"
        )


def _optimizer(options: Options, draft: Draft) -> None:
    name = options.text("optim") or "adamw_torch"
    path = _OPTIMIZERS.get(name)
    if path is None:
        draft.omit(options.as_written("optim"), "unknown optimizer; set model.optimizer.class_path")
    comment = "same arithmetic as adamw_hf" if name == "adamw_hf" else ""
    if "paged" in name or "8bit" in name:
        comment = "needs a GPU"
    draft.set("model.optimizer.class_path", path or _OPTIMIZERS["adamw_torch"], comment)
    if name == "adafactor":
        _adafactor(options, draft)
        return
    betas = [options.number("adam_beta1"), options.number("adam_beta2")]
    if betas != [None, None]:
        draft.set(f"{_OPTIMIZER}.betas", [betas[0] or 0.9, betas[1] or 0.999])


def _adafactor(options: Options, draft: Draft) -> None:
    """Set what Hugging Face's Trainer passes to Adafactor, and omit what it does not."""
    draft.set(f"{_OPTIMIZER}.scale_parameter", False)
    draft.set(f"{_OPTIMIZER}.relative_step", False, "the rate is the schedule's")
    draft.drop(f"{_OPTIMIZER}.eps")
    for option in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if options.number(option) is not None:
            draft.omit(options.as_written(option), "the original does not pass it to Adafactor")


def schedule(options: Options, draft: Draft, default: str) -> None:
    """Set the learning-rate schedule and its warm-up.

    Args:
        options: Options of the system, with `lr_scheduler_type`, `warmup_steps` and `warmup_ratio`.
        draft: The YAML.
        default: The system's default schedule.
    """
    name = options.text("lr_scheduler_type") or default
    ours = _SCHEDULES.get(name, name)
    if ours not in _OUR_SCHEDULES:
        draft.omit(
            options.as_written("lr_scheduler_type"),
            f"must be one of {', '.join(_OUR_SCHEDULES)}; cosine is set instead",
        )
        ours = "cosine"
    comment = "" if options.has("lr_scheduler_type") else "default of the original"
    draft.set("model.lr_scheduler.name", ours, comment)
    steps = options.number("warmup_steps")
    if name == "constant":
        for warmup in ("warmup_steps", "warmup_ratio"):
            if options.has(warmup):
                draft.values.pop(f"model.lr_scheduler.{warmup}", None)
                draft.omit(options.as_written(warmup), "`constant` has no warm-up in transformers")
    elif steps:
        draft.values.pop("model.lr_scheduler.warmup_ratio", None)  # steps override the ratio in transformers
        draft.set("model.lr_scheduler.warmup_steps", steps)


def _precision(options: Options, draft: Draft, *, full: bool) -> None:
    half = "bfloat16" if options.flag("bf16") else "float16" if options.flag("fp16") else "float32"
    precision(draft, half, full=full)


def precision(draft: Draft, half: str, *, full: bool) -> None:
    """Set the data type of the weights and the precision of the arithmetic; weights that train are float32.

    Args:
        draft: The YAML.
        half: Data type of the arithmetic: float16, bfloat16, or float32.
        full: Whether all weights train, without an adapter.
    """
    master = full or half == "float32"
    comment = (
        "weights that train are float32; trainer.precision sets the arithmetic" if full and half != "float32" else ""
    )
    draft.set("model.dtype", "float32" if master else half, comment)
    if half != "float32":
        draft.set("trainer.precision", {"bfloat16": "bf16-mixed", "float16": "16-mixed"}[half])


def _callbacks(options: Options, draft: Draft) -> None:
    found = [*_validation(options, draft), *_checkpoints(options, draft)]
    if found:
        draft.set("trainer.callbacks", found)


def _validation(options: Options, draft: Draft) -> list[dict[str, Any]]:
    when = options.text("evaluation_strategy") or options.text("eval_strategy") or "no"
    if not {"data.val_sources", "data.val_fraction"} & draft.values.keys():
        for name in filter(options.has, ("evaluation_strategy", "eval_strategy", "eval_steps") if when != "no" else ()):
            draft.omit(options.as_written(name), "there is no validation data; set data.val_sources")
        return []
    init: dict[str, Any] = {}
    if when == "steps":
        init["every_n_steps"] = int(options.number("eval_steps") or options.number("logging_steps") or 500)
    elif when == "epoch":
        init["every_n_epochs"] = 1
    return [{"class_path": "callbacks.EvaluateEvery", **({"init_args": init} if init else {})}]


def _checkpoints(options: Options, draft: Draft) -> list[dict[str, Any]]:
    when = options.text("save_strategy") or "steps"
    if when == "no":
        draft.set("trainer.enable_checkpointing", False)
        return []
    limit = options.number("save_total_limit")
    init: dict[str, Any] = {"filename": "{step}", "save_last": True, "save_top_k": -1 if limit is None else limit}
    if limit is not None and limit > 1:
        init |= {"monitor": "step", "mode": "max"}  # keep the newest
    if when == "steps":
        init["every_n_train_steps"] = options.number("save_steps") or 500
    else:
        init["every_n_epochs"] = 1
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}
    return [callback]


def _logger(options: Options, draft: Draft) -> None:
    names = options.words("report_to")
    root = draft.values.get("trainer.default_root_dir", ".")
    run_name = options.text("run_name")
    if "wandb" not in names:
        if run_name is not None:
            draft.omit(options.as_written("run_name"), "trainer.default_root_dir names the run")
        if names == ["none"]:
            draft.set("trainer.logger", False)
        elif set(names) - {"tensorboard", "all"}:
            draft.omit(options.as_written("report_to"), "set the class of the logger in trainer.logger")
        return
    name = {"name": run_name} if run_name else {}
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": root, **name}}
    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": root, "name": "", "version": ""},
    }
    draft.set("trainer.logger", [board, wandb] if "tensorboard" in names else [wandb], "needs `pip install wandb`")
