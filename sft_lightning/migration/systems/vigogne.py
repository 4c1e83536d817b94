"""Options of Vigogne: `vigogne/train/train_sft.py`, and `vigogne/cli/train_sft.py` of version 2.2."""

from __future__ import annotations

from sft_lightning.migration.draft import Draft, keep_examples_unpacked, set_source
from sft_lightning.migration.options import Options, System, combined, copied, omitted
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_TEMPLATES = {
    "instruct": "vigogne/instruct_en",
    "chat": "vigogne/chat_v2",
    "alpaca": "vigogne/instruct_fr",
    "alpaca_seq2seq": "vigogne/instruct_fr",
    "vigogne_chat_v2": "vigogne/chat_v2",
    "vigogne_chat_v3": "vigogne/chat_v3",
}


_ONLY_IN_2_2 = (
    "adapter", "processor_style", "torch_dtype", "bnb_4bit_use_double_quant", "lora_target_modules", "eval_split_ratio",
    "lora_target_all_linear_layers", "lora_modules_to_save", "do_merge_lora", "use_flash_attention_2", "model_type",
)  # fmt: skip


def _finish(options: Options, draft: Draft) -> None:
    _template(options, draft)
    set_source(draft, "data.sources", options.text("train_file"), None)
    set_source(draft, "data.val_sources", options.text("eval_file"), None)
    _lengths(options, draft)
    for name, key in (("max_train_samples", "data.sources"), ("max_eval_samples", "data.val_sources")):
        count = options.number(name)
        if count is not None and key in draft.values:
            [source] = draft.values[key].values()
            source["max_examples"] = count
        elif count is not None:
            draft.omit(options.as_written(name), f"there is no file for it; set max_examples of a source in {key}")
    full = _trains_all_weights(options)
    quantized = not full and _quantization(options, draft)
    if full:
        draft.drop("model.adapter.")
        for name in filter(options.flag, ("load_in_4bit", "load_in_8bit")):
            draft.omit(options.as_written(name), "all weights train, so none is quantized; add --adapter qlora")
    else:
        _targets(options, draft)
    if options.text("model_type") == "seq2seq":
        draft.omit(options.as_written("model_type"), "only causal language models are supported")
    finish_training_arguments(options, draft, quantized=quantized, full=full)
    half = (options.text("compute_dtype") or options.text("torch_dtype") or "float16").removeprefix("torch.")
    if not full and half in ("float16", "bfloat16", "float32"):
        draft.set("model.dtype", half, "from --compute_dtype" if options.has("compute_dtype") else "")


def _trains_all_weights(options: Options) -> bool:
    """Whether there is no adapter: version 2.2 adds one only with --adapter, earlier versions always do."""
    is_2_2 = "cli/" in options.program or any(map(options.has, _ONLY_IN_2_2))
    return is_2_2 and options.text("adapter") not in ("lora", "qlora")


def _template(options: Options, draft: Draft) -> None:
    style = options.text("processor_style") or options.text("mode") or "instruct"
    if style in _TEMPLATES:
        draft.set("data.template", _TEMPLATES[style])
    else:
        draft.omit(f"style {style}", "not a known style; set data.template (see `preview --list_templates`)")


def _lengths(options: Options, draft: Draft) -> None:
    longest, shortest, block = (options.number(name) for name in ("model_max_length", "model_min_length", "block_size"))
    if shortest is not None:
        draft.set(
            "data.min_length", int(shortest) + 1, f"Vigogne keeps examples strictly longer than {shortest} tokens"
        )
    draft.set("data.overlong", "drop", "as in the original; counted and reported")
    if options.flag("pack_into_block"):
        draft.set("data.packing", "best_fit", "Vigogne lets packed examples attend to each other; here they cannot")
        draft.set("data.max_length", block)
        if longest is not None:
            draft.omit(options.as_written("model_max_length"), f"with packing, --block_size {block} is the limit")
        return
    keep_examples_unpacked(draft)
    if longest is not None:
        draft.set("data.max_length", int(longest) - 1, f"Vigogne keeps examples strictly shorter than {longest} tokens")
    else:
        draft.omit(
            "no --model_max_length", "Vigogne has no limit then; raise data.max_length (2048) if examples are dropped"
        )


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
        copied("model_name_or_path", "model.model_name_or_path"),
        omitted("model_revision", "use a folder with that revision"),
        combined("model_type", "", "decoder-only; seq2seq models are not supported"),
        omitted("use_flash_attention_2", "chosen automatically", key="model.attn_implementation"),
        combined("compute_dtype", "model.dtype"),
        combined("torch_dtype", "model.dtype"),
        combined("load_in_8bit", "model.quantization.bits"),
        combined("load_in_4bit", "model.quantization.bits"),
        combined("use_nested_quant", "model.quantization.double_quant"),
        combined("bnb_4bit_use_double_quant", "model.quantization.double_quant"),
        combined("bnb_4bit_quant_type", "model.quantization.quant_type", default="nf4"),
        copied("trust_remote_code", "model.trust_remote_code", "flag"),
        combined("adapter", "model.adapter", "lora, qlora; version 2.2 without it: full fine-tuning"),
        copied("lora_r", "model.adapter.r", "number", default="8"),
        copied("lora_alpha", "model.adapter.alpha", "number", default="16"),
        copied("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        combined("target_modules", "model.adapter.target_modules", default="q_proj v_proj"),
        combined("lora_target_modules", "model.adapter.target_modules"),
        combined("lora_target_all_linear_layers", "model.adapter.target_modules", "all-linear"),
        omitted("lora_fan_in_fan_out", "found automatically"),
        copied("lora_modules_to_save", "model.adapter.modules_to_save", "words"),
        omitted("do_merge_lora", "use `merge --adapter … --output_dir …`"),
        omitted("max_shard_size", "use `merge --max_shard_size`"),
        combined("train_file", "data.sources", "the format is found from the keys of the records"),
        combined("eval_file", "data.val_sources"),
        copied("eval_split_ratio", "data.val_fraction", "number"),
        combined("model_min_length", "data.min_length", "plus 1, because Vigogne's limit is strict"),
        combined(
            "model_max_length", "data.max_length", "minus 1, because Vigogne's limit is strict; with `overlong: drop`"
        ),
        combined(
            "max_train_samples",
            "data.sources.<name>.max_examples",
            "counted before examples that are too long are dropped",
        ),
        combined("max_eval_samples", "data.val_sources.<name>.max_examples"),
        omitted("overwrite_cache", "token stores are found by their content; use `prepare --rebuild`"),
        omitted("preprocessing_num_workers", "chosen automatically"),
        omitted("preprocessing_only", "use the `prepare` command"),
        combined("mode", "data.template", "instruct: vigogne/instruct_en; chat: vigogne/chat_v2"),
        combined("processor_style", "data.template", "alpaca: vigogne/instruct_fr; vigogne_chat_v2, vigogne_chat_v3"),
        combined("pack_into_block", "data.packing", "best_fit; default: none"),
        combined("block_size", "data.max_length", "only with pack_into_block", default="1024"),
        copied("tokenizer_name_or_path", "model.tokenizer_name_or_path"),
        omitted("tokenizer_revision", "use a folder with that revision"),
        omitted("tokenizer_use_fast", "tokenizers are always fast, because exact masks need their offsets"),
        omitted("tokenizer_legacy", "taken from the tokenizer's configuration"),
        omitted("tokenizer_padding_side", "attention ignores padding"),
        omitted("add_tokens", "copy the list to model.add_tokens", key="model.add_tokens"),
        omitted("add_special_tokens", "copy the values to model.add_special_tokens", key="model.add_special_tokens"),
        omitted("config_path", "config.yaml is written to the run folder"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
