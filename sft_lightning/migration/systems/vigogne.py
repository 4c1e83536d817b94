"""Vigogne: `vigogne/train/train_sft.py`, and its later form `vigogne/cli/train_sft.py`."""

from __future__ import annotations

from sft_lightning.migration.draft import Draft, sources, unpacked
from sft_lightning.migration.options import Options, System, joint, left, plain
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_TEMPLATES = {
    "instruct": "vigogne/instruct_en",
    "chat": "vigogne/chat_v2",
    "alpaca": "vigogne/instruct_fr",
    "alpaca_seq2seq": "vigogne/instruct_fr",
    "vigogne_chat_v2": "vigogne/chat_v2",
    "vigogne_chat_v3": "vigogne/chat_v3",
}


def _finish(options: Options, draft: Draft) -> None:
    _template(options, draft)
    sources(draft, "data.sources", options.text("train_file"), None)
    sources(draft, "data.val_sources", options.text("eval_file"), None)
    _lengths(options, draft)
    for name, key in (("max_train_samples", "data.sources"), ("max_eval_samples", "data.val_sources")):
        count = options.number(name)
        if count is not None and key in draft.values:
            [source] = draft.values[key].values()
            source["max_examples"] = count
    quantized = _quantization(options, draft)
    full = options.text("adapter") in ("None", "none")
    if full:
        draft.drop("model.adapter.")
    else:
        _targets(options, draft)
    if options.text("model_type") == "seq2seq":
        draft.leave(options.shown("model_type"), "causal language models only")
    finish_training_arguments(options, draft, quantized=quantized, full=full)
    half = (options.text("compute_dtype") or options.text("torch_dtype") or "float16").removeprefix("torch.")
    if not full and half in ("float16", "bfloat16", "float32"):
        draft.set("model.dtype", half, "--compute_dtype" if options.has("compute_dtype") else "")


def _template(options: Options, draft: Draft) -> None:
    style = options.text("processor_style") or options.text("mode") or "instruct"
    if style in _TEMPLATES:
        draft.set("data.template", _TEMPLATES[style])
    else:
        draft.leave(f"style {style}", "see `preview --list_templates`; set data.template")


def _lengths(options: Options, draft: Draft) -> None:
    longest, shortest, block = (options.number(name) for name in ("model_max_length", "model_min_length", "block_size"))
    if shortest is not None:
        draft.set("data.min_length", int(shortest) + 1, f"Vigogne keeps what is strictly longer than {shortest}")
    draft.set("data.overlong", "drop", "as there; counted and reported here")
    if options.flag("pack_into_block"):
        draft.set("data.packing", "best_fit", "packed examples saw each other there; here they do not")
        draft.set("data.max_length", block)
        if longest is not None:
            draft.leave(options.shown("model_max_length"), f"rows of {block} tokens take examples of up to {block}")
        return
    unpacked(draft)
    if longest is not None:
        draft.set("data.max_length", int(longest) - 1, f"Vigogne keeps what is strictly shorter than {longest}")
    else:
        draft.leave("no --model_max_length", "it had no limit; raise data.max_length (2048) if examples are dropped")


def _quantization(options: Options, draft: Draft) -> bool:
    if options.flag("load_in_8bit"):
        draft.set("model.quantization", {"bits": 8})
        return True
    if options.flag("load_in_4bit") or options.text("adapter") == "qlora":
        nested = options.flag("use_nested_quant")
        if options.has("bnb_4bit_use_double_quant") or options.has("adapter"):
            nested = not options.has("bnb_4bit_use_double_quant") or options.flag("bnb_4bit_use_double_quant")
        kind = options.text("bnb_4bit_quant_type")
        draft.set("model.quantization", {"bits": 4, "quant_type": kind, "double_quant": nested})
        return True
    return False


def _targets(options: Options, draft: Draft) -> None:
    if options.flag("lora_target_all_linear_layers"):
        draft.set("model.adapter.target_modules", "all-linear")
        return
    given = options.has("target_modules") or options.has("lora_target_modules")
    names = (
        options.words("lora_target_modules") if options.has("lora_target_modules") else options.words("target_modules")
    )
    draft.set("model.adapter.target_modules", names, "" if given else "Vigogne's default")


SYSTEM = System(
    name="vigogne",
    title="Vigogne",
    source="`vigogne/train/train_sft.py`, and version 2.2's `vigogne/cli/train_sft.py`",
    options=(
        plain("model_name_or_path", "model.model_name_or_path"),
        left("model_revision", "name a folder with that revision"),
        joint("model_type", "", "decoder-only; seq2seq models are not trained here"),
        left("use_flash_attention_2", "chosen by itself", key="model.attn_implementation"),
        joint("compute_dtype", "model.dtype"),
        joint("torch_dtype", "model.dtype"),
        joint("load_in_8bit", "model.quantization.bits"),
        joint("load_in_4bit", "model.quantization.bits"),
        joint("use_nested_quant", "model.quantization.double_quant"),
        joint("bnb_4bit_use_double_quant", "model.quantization.double_quant"),
        joint("bnb_4bit_quant_type", "model.quantization.quant_type", default="nf4"),
        plain("trust_remote_code", "model.trust_remote_code", "flag"),
        joint("adapter", "model.adapter", "lora, qlora; None: full fine-tuning"),
        plain("lora_r", "model.adapter.r", "number", default="8"),
        plain("lora_alpha", "model.adapter.alpha", "number", default="16"),
        plain("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        joint("target_modules", "model.adapter.target_modules", default="q_proj v_proj"),
        joint("lora_target_modules", "model.adapter.target_modules"),
        joint("lora_target_all_linear_layers", "model.adapter.target_modules", "all-linear"),
        left("lora_fan_in_fan_out", "found from the layers"),
        plain("lora_modules_to_save", "model.adapter.modules_to_save", "words"),
        left("do_merge_lora", "`merge --adapter … --output_dir …`"),
        left("max_shard_size", "`merge` writes the folder"),
        joint("train_file", "data.sources", "the format is found from the keys"),
        joint("eval_file", "data.val_sources"),
        plain("eval_split_ratio", "data.val_fraction", "number"),
        joint("model_min_length", "data.min_length", "plus 1: strictly longer there"),
        joint("model_max_length", "data.max_length", "minus 1: strictly shorter there; `overlong: drop`"),
        joint("max_train_samples", "data.sources.<name>.max_examples", "of records, before those too long are dropped"),
        joint("max_eval_samples", "data.val_sources.<name>.max_examples"),
        left("overwrite_cache", "the store is addressed by content; `prepare --rebuild` makes it anew"),
        left("preprocessing_num_workers", "chosen by itself"),
        left("preprocessing_only", "the `prepare` command"),
        joint("mode", "data.template", "instruct: vigogne/instruct_en; chat: vigogne/chat_v2"),
        joint("processor_style", "data.template", "alpaca: vigogne/instruct_fr; vigogne_chat_v2, vigogne_chat_v3"),
        joint("pack_into_block", "data.packing", "best_fit; without it: none"),
        joint("block_size", "data.max_length", "with pack_into_block", default="1024"),
        plain("tokenizer_name_or_path", "model.tokenizer_name_or_path"),
        left("tokenizer_revision", "name a folder with that revision"),
        left("tokenizer_use_fast", "tokenizers are always fast: exact masks need their offsets"),
        left("tokenizer_legacy", "as the tokenizer's own configuration says"),
        left("tokenizer_padding_side", "attention never sees padding"),
        left("add_tokens", "copy the list into model.add_tokens", key="model.add_tokens"),
        left("add_special_tokens", "copy its values into model.add_special_tokens", key="model.add_special_tokens"),
        left("config_path", "config.yaml in the run's folder"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
