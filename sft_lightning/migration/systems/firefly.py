"""Firefly, and the CS5340 project made of it: one JSON file, `train.py --train_args_file`."""

from __future__ import annotations

from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.migration.draft import Draft, sources, unpacked
from sft_lightning.migration.options import Options, System, joint, left, plain
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_PREFERENCES_ONLY = ("max_prompt_length", "beta")


def _finish(options: Options, draft: Draft) -> None:
    task, mode = options.text("task_type"), options.text("train_mode")
    if task == "pretrain":
        draft.set("task", "pretrain")
        draft.set("data.packing", "concat", "as there; the rest of each batch of 1000 is not lost here")
    else:
        _template(options, draft)
        draft.set("data.overlong", "truncate", "as there; counted and reported here")
        unpacked(draft)
    if task == "dpo":
        _preferences(options, draft)
    else:
        for name in filter(options.has, _PREFERENCES_ONLY):
            draft.leave(options.shown(name), "preference training only")
    formats = {"pretrain": "text", "dpo": "preference"}
    sources(draft, "data.sources", options.text("train_file"), formats.get(task or "", "firefly"))
    _adapter(options, draft, mode or "qlora")
    finish_training_arguments(options, draft, quantized=mode == "qlora", full=mode == "full")


def _preferences(options: Options, draft: Draft) -> None:
    """Carry over `component/dataset.py`'s DPO data set: the same tokens of the same pairs."""
    draft.set("task", "dpo")
    draft.set("model.preference", {"loss": "sigmoid", "beta": options.number("beta")})
    draft.set("data.pair_history", "chosen", "as there: earlier turns are the chosen conversation's")
    share, prompt = options.number("max_seq_length"), options.number("max_prompt_length")
    if share is not None:
        draft.set("data.max_length", 2 * int(share), f"both answers with their prompt, {share} tokens each")
    if share is not None and prompt is not None and prompt >= share:
        remark = f"{prompt} there, which leaves nothing of the answers where prompt and answer have over {share} tokens"
        draft.set("data.max_prompt_length", int(share) // 2, remark)
    elif prompt is not None:
        draft.set("data.max_prompt_length", prompt, "kept of the prompt of a pair that is too long; no cap")


def _template(options: Options, draft: Draft) -> None:
    name = f"firefly/{options.text('template_name')}"
    if name in TURN_FORMATS:
        draft.set("data.template", name)
    else:
        draft.leave(options.shown("template_name"), "not among `preview --list_templates`; set data.template")
        draft.set("data.template", "chat_template", "the tokenizer's own, instead")


def _adapter(options: Options, draft: Draft, mode: str) -> None:
    if mode == "full":
        draft.drop("model.adapter.")
        return
    if "mamba" in (options.text("model_name_or_path") or ""):
        remark = "without x_proj and out_proj, which Mamba reads past the adapter"
        draft.set("model.adapter.target_modules", "mamba", remark)
    else:
        draft.set("model.adapter.target_modules", "all-linear")
    if mode == "qlora":
        draft.set("model.quantization", {"bits": 4, "quant_type": "nf4", "double_quant": True})


SYSTEM = System(
    name="firefly",
    title="Firefly",
    source="`component/argument.py`; a JSON file for `train.py --train_args_file`",
    options=(
        plain("model_name_or_path", "model.model_name_or_path"),
        joint("train_file", "data.sources", "format firefly; pretrain: a folder, format text; dpo: format preference"),
        left("eval_file", "Firefly never reads it", key="data.val_sources"),
        plain("max_seq_length", "data.max_length", "number", note="dpo: twice as much, for a pair"),
        joint("template_name", "data.template", "firefly/<name>"),
        joint("max_prompt_length", "data.max_prompt_length", "dpo: below max_seq_length", default="512"),
        joint("beta", "model.preference.beta", "dpo", default="0.1"),
        left("tokenize_num_workers", "chosen by itself"),
        joint("task_type", "task", "sft, pretrain, dpo", default="sft"),
        joint("train_mode", "model.adapter, model.quantization", "full, lora, qlora", default="qlora"),
        plain("lora_rank", "model.adapter.r", "number", default="64"),
        plain("lora_alpha", "model.adapter.alpha", "number", default="16"),
        plain("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        left("use_unsloth", "no such backend"),
        left("train_args_file", "the file that is read"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
