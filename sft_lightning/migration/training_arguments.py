"""transformers' `TrainingArguments`, which four of the five systems take, and how they are carried over."""

from __future__ import annotations

import math
from typing import Any

from sft_lightning.migration.distributed import strategy
from sft_lightning.migration.draft import Draft
from sft_lightning.migration.options import Option, Options, joint, left, plain

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
    plain("output_dir", "trainer.default_root_dir"),
    plain("seed", "seed_everything", "number", default="42"),
    joint("num_train_epochs", "trainer.max_epochs", default="3"),
    joint("max_steps", "trainer.max_steps", "goes before epochs there, so `trainer.max_epochs: -1` with it"),
    plain("per_device_train_batch_size", "data.batch_size", "number", default="8"),
    left("per_device_eval_batch_size", "validation takes data.batch_size"),
    plain("gradient_accumulation_steps", "trainer.accumulate_grad_batches", "number"),
    plain("learning_rate", f"{_OPTIMIZER}.lr", "number", default="5e-5"),
    plain("weight_decay", f"{_OPTIMIZER}.weight_decay", "number"),
    joint("adam_beta1", f"{_OPTIMIZER}.betas"),
    joint("adam_beta2", f"{_OPTIMIZER}.betas"),
    plain("adam_epsilon", f"{_OPTIMIZER}.eps", "number"),
    plain("max_grad_norm", "trainer.gradient_clip_val", "number"),
    joint("optim", "model.optimizer.class_path", "adamw_torch, adamw_hf, adafactor, sgd, and bitsandbytes' AdamW"),
    joint("lr_scheduler_type", "model.lr_scheduler.name", "constant_with_warmup: constant", default="linear"),
    plain("warmup_ratio", "model.lr_scheduler.warmup_ratio", "number"),
    joint("warmup_steps", "model.lr_scheduler.warmup_steps"),
    joint("fp16", "trainer.precision, model.dtype", "16-mixed"),
    joint("bf16", "trainer.precision, model.dtype", "bf16-mixed; an adapter's frozen base is bfloat16"),
    left("tf32", "no key: float32 products stay exact; bf16 is where the speed is"),
    plain("gradient_checkpointing", "model.gradient_checkpointing", "flag", note="`auto` is off while activations fit"),
    plain("logging_steps", "trainer.log_every_n_steps", "number"),
    left("logging_strategy", "the loss is logged every trainer.log_every_n_steps"),
    left("logging_first_step", "the first step is always logged"),
    left("logging_dir", "TensorBoard events are in trainer.default_root_dir"),
    joint("evaluation_strategy", "trainer.val_check_interval", "epoch is the default; no: `limit_val_batches: 0`"),
    joint("eval_strategy", "trainer.val_check_interval", "as evaluation_strategy"),
    joint("eval_steps", "trainer.val_check_interval", "times accumulate_grad_batches: it counts micro-batches"),
    joint("save_strategy", "trainer.callbacks (ModelCheckpoint)", "no: `enable_checkpointing: false`"),
    joint("save_steps", "trainer.callbacks (ModelCheckpoint.every_n_train_steps)"),
    joint("save_total_limit", "trainer.callbacks (ModelCheckpoint.save_top_k)"),
    joint("report_to", "trainer.logger", "tensorboard is the default; wandb; none: false"),
    joint("run_name", "trainer.logger (WandbLogger.name)", "a run is named by trainer.default_root_dir else"),
    joint("deepspeed", "trainer.strategy", "the stage and offload that the file says, or its name"),
    joint("fsdp", "trainer.strategy", "full_shard: fsdp2; with offload: fsdp2_offload"),
    left("fsdp_config", "fsdp2 needs no such settings"),
    left("fsdp_transformer_layer_cls_to_wrap", "the decoder layers are found from the model"),
    plain("neftune_noise_alpha", "model.neftune_alpha", "number"),
    joint(
        "ddp_find_unused_parameters", "trainer.strategy", "true: ddp_find_unused_parameters_true; false is the default"
    ),
    left("ddp_timeout", "DDPStrategy's timeout, by class_path", key="trainer.strategy"),
    left("dataloader_num_workers", "tokens are read from memory-mapped files; workers would only copy them"),
    left("remove_unused_columns", "other keys of a record are never read"),
    left(
        "overwrite_output_dir", "a run's folder is never overwritten: continue with --ckpt_path last, or name another"
    ),
    left("resume_from_checkpoint", "--ckpt_path last", key="ckpt_path"),
    left("do_train", "`fit` trains"),
    left("do_eval", "`fit` validates when there is validation data"),
    left("log_level", "no key: the libraries' messages are few as it is"),
    left("disable_tqdm", "`trainer.enable_progress_bar: false`", key="trainer.enable_progress_bar"),
    left("torch_compile", "nothing is compiled here"),
    left("local_rank", "the launcher sets it"),
    left("push_to_hub", "nothing is ever uploaded"),
    left("load_best_model_at_end", "ModelCheckpoint with `monitor: val/loss` keeps the best"),
    left("group_by_length", "`data.packing: best_fit` leaves nothing to gain"),
)


def finish_training_arguments(options: Options, draft: Draft, *, quantized: bool, full: bool) -> None:
    """Carry over what stands in several training arguments together."""
    _duration(options, draft)
    _optimizer(options, draft)
    schedule(options, draft, "linear")
    _precision(options, draft, full=full)
    strategy(options, draft, quantized=quantized)
    _validation(options, draft)
    _checkpoints(options, draft)
    _logger(options, draft)


def _duration(options: Options, draft: Draft) -> None:
    steps, epochs = options.number("max_steps"), options.number("num_train_epochs")
    if steps is not None and steps > 0:
        draft.set("trainer.max_steps", steps)
        draft.set("trainer.max_epochs", -1, "max_steps alone decides, as there")
    elif epochs is not None:
        whole = math.ceil(epochs)
        draft.set("trainer.max_epochs", whole, "" if whole == epochs else f"{epochs} there: epochs are whole here")


def _optimizer(options: Options, draft: Draft) -> None:
    name = options.text("optim") or "adamw_torch"
    path = _OPTIMIZERS.get(name)
    if path is None:
        draft.leave(options.shown("optim"), "not known here; name its class in model.optimizer.class_path")
    remark = "the same arithmetic as adamw_hf" if name == "adamw_hf" else ""
    if "paged" in name or "8bit" in name:
        remark = "needs a GPU"
    draft.set("model.optimizer.class_path", path or _OPTIMIZERS["adamw_torch"], remark)
    betas = [options.number("adam_beta1"), options.number("adam_beta2")]
    if betas != [None, None]:
        draft.set(f"{_OPTIMIZER}.betas", [betas[0] or 0.9, betas[1] or 0.999])


def schedule(options: Options, draft: Draft, default: str) -> None:
    """Carry over the schedule and its warm-up.

    Args:
        options: With `lr_scheduler_type`, `warmup_steps` and `warmup_ratio`.
        draft: Gets them.
        default: The system's schedule where none is given.
    """
    name = options.text("lr_scheduler_type") or default
    ours = _SCHEDULES.get(name, name)
    if ours not in _OUR_SCHEDULES:
        draft.leave(options.shown("lr_scheduler_type"), f"there are {', '.join(_OUR_SCHEDULES)}; cosine is set instead")
        ours = "cosine"
    remark = "" if options.has("lr_scheduler_type") else "the default there"
    draft.set("model.lr_scheduler.name", ours, remark)
    steps = options.number("warmup_steps")
    if name == "constant":
        for warmup in ("warmup_steps", "warmup_ratio"):
            if options.has(warmup):
                draft.values.pop(f"model.lr_scheduler.{warmup}", None)
                draft.leave(options.shown(warmup), "transformers' `constant` has no warm-up")
    elif steps:
        draft.values.pop("model.lr_scheduler.warmup_ratio", None)  # steps go before the ratio there
        draft.set("model.lr_scheduler.warmup_steps", steps)


def _precision(options: Options, draft: Draft, *, full: bool) -> None:
    half = "bfloat16" if options.flag("bf16") else "float16" if options.flag("fp16") else "float32"
    precision(draft, half, full=full)


def precision(draft: Draft, half: str, *, full: bool) -> None:
    """Set the type of the weights, and of the arithmetic: weights that train are float32, whatever frozen ones are."""
    master = full or half == "float32"
    remark = "weights that train are float32, the arithmetic is not" if full and half != "float32" else ""
    draft.set("model.dtype", "float32" if master else half, remark)
    if half != "float32":
        draft.set("trainer.precision", {"bfloat16": "bf16-mixed", "float16": "16-mixed"}[half])


def _validation(options: Options, draft: Draft) -> None:
    when = options.text("evaluation_strategy") or options.text("eval_strategy")
    if when == "steps":
        steps = options.number("eval_steps") or options.number("logging_steps") or 500
        accumulate = draft.values.get("trainer.accumulate_grad_batches", 1)
        draft.set(
            "trainer.val_check_interval",
            int(steps) * int(accumulate),
            f"micro-batches: {steps} optimizer steps of {accumulate}",
        )
        draft.set("trainer.check_val_every_n_epoch", None, "so that the interval goes on over epochs")
    elif when == "no":
        draft.set("trainer.limit_val_batches", 0)


def _checkpoints(options: Options, draft: Draft) -> None:
    when = options.text("save_strategy") or "steps"
    if when == "no":
        draft.set("trainer.enable_checkpointing", False)
        return
    limit = options.number("save_total_limit")
    init: dict[str, Any] = {"filename": "{step}", "save_last": True, "save_top_k": -1 if limit is None else limit}
    if limit is not None and limit > 1:
        init |= {"monitor": "step", "mode": "max"}  # the newest
    if when == "steps":
        init["every_n_train_steps"] = options.number("save_steps") or 500
    else:
        init["every_n_epochs"] = 1
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init}
    draft.set("trainer.callbacks", [callback])


def _logger(options: Options, draft: Draft) -> None:
    names = options.words("report_to")
    root = draft.values.get("trainer.default_root_dir", ".")
    run_name = options.text("run_name")
    if "wandb" not in names:
        if run_name is not None:
            draft.leave(options.shown("run_name"), "a run is named by trainer.default_root_dir")
        if names == ["none"]:
            draft.set("trainer.logger", False)
        elif set(names) - {"tensorboard", "all"}:
            draft.leave(options.shown("report_to"), "name the logger's class in trainer.logger")
        return
    name = {"name": run_name} if run_name else {}
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": root, **name}}
    board = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": root, "name": "", "version": ""},
    }
    draft.set("trainer.logger", [board, wandb] if "tensorboard" in names else [wandb], "needs `pip install wandb`")
