"""Options of Chinese-LLaMA-Alpaca 1 and 2: `scripts/training/run_clm_sft_with_peft.py`."""

from __future__ import annotations

from sft_lightning.migration.draft import Draft, keep_examples_unpacked, set_source
from sft_lightning.migration.options import Options, System, combined, copied, omitted
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_NEW_ADAPTER = ("r", "alpha", "dropout", "target_modules", "modules_to_save")
_ONLY_IN_VERSION_2 = ("load_in_kbits", "double_quant", "quant_type", "full_finetuning", "use_flash_attention_2")


def _finish(options: Options, draft: Draft) -> None:
    _template(options, draft)
    set_source(draft, "data.sources", options.text("dataset_dir"), "alpaca")
    set_source(draft, "data.val_sources", options.text("validation_file"), "alpaca")
    draft.set("data.overlong", "truncate", "as in the original; counted and reported")
    keep_examples_unpacked(draft)
    full = options.flag("full_finetuning")
    if full:
        draft.drop("model.adapter.")
    elif options.has("peft_path"):
        for name in _NEW_ADAPTER:
            draft.values.pop(f"model.adapter.{name}", None)
        draft.comments["model.adapter.path"] = "rank, target modules and modules_to_save come from its configuration"
    if options.has("tokenizer_name_or_path"):
        draft.set("model.resize_vocabulary", True, "the tokenizer may have more tokens than the embeddings")
    quantized = _quantization(options, draft)
    finish_training_arguments(options, draft, quantized=quantized, full=full)
    dtype = options.text("torch_dtype")
    if dtype in ("float16", "bfloat16", "float32") and not full:
        draft.set("model.dtype", dtype)


def _template(options: Options, draft: Draft) -> None:
    base = (options.text("model_name_or_path") or "").lower()
    second = any(options.has(name) for name in _ONLY_IN_VERSION_2) or "llama-2" in base or "llama2" in base
    other = "1" if second else "2"
    draft.set(
        "data.template", f"chinese_alpaca/{'2' if second else '1'}", f"chinese_alpaca/{other} for version {other}"
    )


def _quantization(options: Options, draft: Draft) -> bool:
    bits = options.number("load_in_kbits")
    if bits not in (4, 8):
        return False
    if bits == 8:
        draft.set("model.quantization", {"bits": 8})
    else:
        kind, double = options.text("quant_type"), options.flag("double_quant")
        draft.set("model.quantization", {"bits": 4, "quant_type": kind, "double_quant": double})
    return True


_IGNORED = "the script ignores it"

SYSTEM = System(
    name="chinese_alpaca",
    title="Chinese-LLaMA-Alpaca",
    source="`scripts/training/run_clm_sft_with_peft.py` of versions 1 and 2",
    options=(
        copied("model_name_or_path", "model.model_name_or_path"),
        copied("tokenizer_name_or_path", "model.tokenizer_name_or_path"),
        omitted("tokenizer_name", "set model.tokenizer_name_or_path", key="model.tokenizer_name_or_path"),
        omitted("config_overrides", "edit config.json in the model folder"),
        omitted("config_name", "edit config.json in the model folder"),
        omitted("cache_dir", "set the environment variable HF_HOME"),
        omitted("use_fast_tokenizer", "tokenizers are always fast, because exact masks need their offsets"),
        omitted("model_revision", "use a folder with that revision"),
        omitted("use_auth_token", "set the environment variable HF_TOKEN"),
        combined("torch_dtype", "model.dtype"),
        combined("dataset_dir", "data.sources", "format alpaca; folders are searched recursively"),
        combined("validation_file", "data.val_sources"),
        omitted("validation_split_percentage", f"{_IGNORED}; to split, set data.val_fraction", key="data.val_fraction"),
        omitted("train_file", _IGNORED, key="data.sources"),
        omitted("keep_linebreaks", _IGNORED),
        omitted("overwrite_cache", f"{_IGNORED}; use `prepare --rebuild`"),
        omitted("data_cache_dir", _IGNORED, key="data.store_dir"),
        omitted("preprocessing_num_workers", "chosen automatically"),
        copied("max_seq_length", "data.max_length", "number", default="512"),
        copied("trainable", "model.adapter.target_modules", "commas", default="q_proj,v_proj"),
        copied("lora_rank", "model.adapter.r", "number", default="8"),
        copied("lora_alpha", "model.adapter.alpha", "number", default="32"),
        copied("lora_dropout", "model.adapter.dropout", "number", default="0.1"),
        copied("modules_to_save", "model.adapter.modules_to_save", "commas"),
        copied("peft_path", "model.adapter.path", note="the options of a new adapter are not used then"),
        omitted("force_resize_embeddings", f"{_IGNORED}; set model.resize_vocabulary", key="model.resize_vocabulary"),
        omitted("use_flash_attention_2", "chosen automatically", key="model.attn_implementation"),
        combined("double_quant", "model.quantization.double_quant", default="True"),
        combined("quant_type", "model.quantization.quant_type", default="nf4"),
        combined("load_in_kbits", "model.quantization.bits", "16: no quantization", default="16"),
        combined("full_finetuning", "model.adapter", "null"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
