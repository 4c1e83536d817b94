"""Options of Firefly and of the CS5340 project based on it: one JSON file, `train.py --train_args_file`."""

from __future__ import annotations

from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.migration.draft import Draft, keep_examples_unpacked, set_source
from sft_lightning.migration.options import Options, System, combined, copied, omitted
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_PREFERENCES_ONLY = ("max_prompt_length", "beta")


def _finish(options: Options, draft: Draft) -> None:
    task, mode = options.text("task_type"), options.text("train_mode")
    if task == "pretrain":
        draft.set("task", "pretrain")
        draft.set("data.packing", "concat", "as in the original, but without dropping the rest of each batch of 1000")
    else:
        _template(options, draft)
        draft.set("data.overlong", "truncate", "as in the original; counted and reported")
        keep_examples_unpacked(draft)
    if task == "dpo":
        _preferences(options, draft)
    else:
        for name in filter(options.has, _PREFERENCES_ONLY):
            draft.omit(options.as_written(name), "only for preference training")
    formats = {"pretrain": "text", "dpo": "preference"}
    set_source(draft, "data.sources", options.text("train_file"), formats.get(task or "", "firefly"))
    _adapter(options, draft, mode or "qlora")
    finish_training_arguments(options, draft, quantized=mode == "qlora", full=mode == "full")


def _preferences(options: Options, draft: Draft) -> None:
    """Translate the DPO data set of `component/dataset.py`: the same tokens of the same pairs."""
    draft.set("task", "dpo")
    draft.set("model.preference", {"loss": "sigmoid", "beta": options.number("beta")})
    draft.set(
        "data.pair_history", "chosen", "as in the original: earlier messages are those of the chosen conversation"
    )
    share, prompt = options.number("max_seq_length"), options.number("max_prompt_length")
    if share is not None:
        draft.set("data.max_length", 2 * int(share), f"{share} tokens for each answer with its prompt")
    if share is not None and prompt is not None and prompt >= share:
        comment = f"{prompt} in the original, which can leave no tokens of an answer in pairs that are truncated"
        draft.set("data.max_prompt_length", int(share) // 2, comment)
    elif prompt is not None:
        draft.set(
            "data.max_prompt_length",
            prompt,
            "tokens of the prompt to keep if a pair is too long; shorter pairs are not truncated",
        )


def _template(options: Options, draft: Draft) -> None:
    name = f"firefly/{options.text('template_name')}"
    if name in TURN_FORMATS:
        draft.set("data.template", name)
    else:
        draft.omit(
            options.as_written("template_name"),
            "not a known template (see `preview --list_templates`); set data.template",
        )
        draft.set("data.template", "chat_template", "the tokenizer's own template, as a substitute")


def _is_mamba(options: Options) -> bool:
    return "mamba" in (options.text("model_name_or_path") or "")


def _stop_token(options: Options, draft: Draft, mode: str) -> None:
    """Make one token of a stop that GPT-NeoX's tokenizer, which Mamba has, splits into several."""
    form = TURN_FORMATS.get(f"firefly/{options.text('template_name')}")
    if form is None or "{" in form.stop or not _is_mamba(options):
        return
    comment = "ends an answer; several tokens in the original, whose model could not learn to stop"
    draft.set("model.add_special_tokens", [form.stop], comment)
    if mode != "full":
        draft.set("model.adapter.trainable_token_indices", "added", "its embedding is trained")


def _adapter(options: Options, draft: Draft, mode: str) -> None:
    _stop_token(options, draft, mode)
    if mode == "full":
        draft.drop("model.adapter.")
        return
    if _is_mamba(options):
        comment = "without x_proj and out_proj, whose adapters Mamba ignores"
        draft.set("model.adapter.target_modules", "mamba", comment)
    else:
        draft.set("model.adapter.target_modules", "all-linear")
    if mode == "qlora":
        draft.set("model.quantization", {"bits": 4, "quant_type": "nf4", "double_quant": True})


SYSTEM = System(
    name="firefly",
    title="Firefly",
    source="`component/argument.py`; a JSON file for `train.py --train_args_file`",
    options=(
        copied("model_name_or_path", "model.model_name_or_path"),
        combined(
            "train_file", "data.sources", "format firefly; pretrain: a folder, format text; dpo: format preference"
        ),
        omitted("eval_file", "Firefly ignores it; set data.val_sources", key="data.val_sources"),
        copied("max_seq_length", "data.max_length", "number", note="dpo: twice as much, for two answers"),
        combined("template_name", "data.template", "firefly/<name>"),
        combined("max_prompt_length", "data.max_prompt_length", "dpo: must be below max_seq_length", default="512"),
        combined("beta", "model.preference.beta", "dpo", default="0.1"),
        omitted("tokenize_num_workers", "chosen automatically"),
        combined("task_type", "task", "sft, pretrain, dpo", default="sft"),
        combined("train_mode", "model.adapter, model.quantization", "full, lora, qlora", default="qlora"),
        copied("lora_rank", "model.adapter.r", "number", default="64"),
        copied("lora_alpha", "model.adapter.alpha", "number", default="16"),
        copied("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        omitted("use_unsloth", "not supported"),
        omitted("train_args_file", "the file that `migrate` reads"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
