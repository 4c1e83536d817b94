"""Chinese-LLaMA-Alpaca 1 and 2: `scripts/training/run_clm_sft_with_peft.py`."""

from __future__ import annotations

from sft_lightning.migration.draft import Draft, sources, unpacked
from sft_lightning.migration.options import Options, System, joint, left, plain
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_FROM_ADAPTER = ("r", "alpha", "dropout", "target_modules", "modules_to_save")
_SECOND = ("load_in_kbits", "double_quant", "quant_type", "full_finetuning", "use_flash_attention_2")


def _finish(options: Options, draft: Draft) -> None:
    _template(options, draft)
    sources(draft, "data.sources", options.text("dataset_dir"), "alpaca")
    sources(draft, "data.val_sources", options.text("validation_file"), "alpaca")
    draft.set("data.overlong", "truncate", "as there; counted and reported here")
    unpacked(draft)
    full = options.flag("full_finetuning")
    if full:
        draft.drop("model.adapter.")
    elif options.has("peft_path"):
        for name in _FROM_ADAPTER:
            draft.values.pop(f"model.adapter.{name}", None)
        draft.remarks["model.adapter.path"] = "its own configuration has the rank, targets and modules_to_save"
    if options.has("tokenizer_name_or_path"):
        draft.set("model.resize_vocabulary", True, "the tokenizer may have more tokens than the model embeds")
    quantized = _quantization(options, draft)
    finish_training_arguments(options, draft, quantized=quantized, full=full)
    dtype = options.text("torch_dtype")
    if dtype in ("float16", "bfloat16", "float32") and not full:
        draft.set("model.dtype", dtype)


def _template(options: Options, draft: Draft) -> None:
    base = (options.text("model_name_or_path") or "").lower()
    second = any(options.has(name) for name in _SECOND) or "llama-2" in base or "llama2" in base
    other = "1" if second else "2"
    draft.set("data.template", f"chinese_alpaca/{'2' if second else '1'}", f"chinese_alpaca/{other} if it is the other")


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


_IGNORED = "the script itself ignores it"

SYSTEM = System(
    name="chinese_alpaca",
    title="Chinese-LLaMA-Alpaca",
    source="`scripts/training/run_clm_sft_with_peft.py` of versions 1 and 2",
    options=(
        plain("model_name_or_path", "model.model_name_or_path"),
        plain("tokenizer_name_or_path", "model.tokenizer_name_or_path"),
        left("tokenizer_name", "model.tokenizer_name_or_path", key="model.tokenizer_name_or_path"),
        left("config_overrides", "change the model folder's config.json"),
        left("config_name", "change the model folder's config.json"),
        left("cache_dir", "the environment variable HF_HOME"),
        left("use_fast_tokenizer", "tokenizers are always fast: exact masks need their offsets"),
        left("model_revision", "name a folder with that revision"),
        left("use_auth_token", "the environment variable HF_TOKEN"),
        joint("torch_dtype", "model.dtype"),
        joint("dataset_dir", "data.sources", "format alpaca; folders are searched recursively"),
        joint("validation_file", "data.val_sources"),
        left("validation_split_percentage", f"{_IGNORED}; to split", key="data.val_fraction"),
        left("train_file", _IGNORED, key="data.sources"),
        left("keep_linebreaks", _IGNORED),
        left("overwrite_cache", f"{_IGNORED}; `prepare --rebuild`"),
        left("data_cache_dir", _IGNORED, key="data.store_dir"),
        left("preprocessing_num_workers", "chosen by itself"),
        plain("max_seq_length", "data.max_length", "number", default="512"),
        plain("trainable", "model.adapter.target_modules", "commas", default="q_proj,v_proj"),
        plain("lora_rank", "model.adapter.r", "number", default="8"),
        plain("lora_alpha", "model.adapter.alpha", "number", default="32"),
        plain("lora_dropout", "model.adapter.dropout", "number", default="0.1"),
        plain("modules_to_save", "model.adapter.modules_to_save", "commas"),
        plain("peft_path", "model.adapter.path", note="the options of a new adapter have no part in it"),
        left("force_resize_embeddings", f"{_IGNORED}; see", key="model.resize_vocabulary"),
        left("use_flash_attention_2", "chosen by itself", key="model.attn_implementation"),
        joint("double_quant", "model.quantization.double_quant", default="True"),
        joint("quant_type", "model.quantization.quant_type", default="nf4"),
        joint("load_in_kbits", "model.quantization.bits", "16: none", default="16"),
        joint("full_finetuning", "model.adapter", "null"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
