"""FastChat's fork for LLaMA (Q)LoRA, and FastChat itself: `fastchat/train/{train_lora,train}.py`."""

from __future__ import annotations

from pathlib import Path

from sft_lightning.migration.draft import Draft, sources, unpacked
from sft_lightning.migration.options import Options, System, joint, left, plain
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_TARGETS = "q_proj k_proj v_proj o_proj down_proj gate_proj up_proj"


def _finish(options: Options, draft: Draft) -> None:
    quantized = options.flag("q_lora")
    full = Path(options.program).name in ("train.py", "train_mem.py", "train_xformers.py")
    draft.set("data.template", "vicuna_v1.1", "the only one that FastChat trains with")
    draft.set("data.loss_on", "assistant")
    sources(draft, "data.sources", options.text("data_path"), "sharegpt")
    sources(draft, "data.val_sources", options.text("eval_data_path"), "sharegpt")
    draft.set("data.overlong", "truncate", "as there; counted and reported here")
    unpacked(draft)
    if full:
        draft.drop("model.adapter.")
    if quantized:
        draft.set("model.quantization", {"bits": 4, "quant_type": "nf4", "double_quant": True})
    _rope(options, draft, full=full)
    finish_training_arguments(options, draft, quantized=quantized, full=full)


def _rope(options: Options, draft: Draft, *, full: bool) -> None:
    length = options.number("model_max_length")
    if options.has("rope_scaling_type") or options.has("rope_scaling_factor"):
        draft.set("model.rope_scaling.type", options.text("rope_scaling_type") or "linear")
        factor = options.number("rope_scaling_factor")
        draft.set(f"model.rope_scaling.{'target_length' if factor is None else 'factor'}", factor or length)
    elif full:
        draft.leave(
            "RoPE scaling that train.py sets itself for a --model_max_length beyond the model's own",
            f"set model.rope_scaling: {{type: linear, target_length: {length}}} if yours is beyond",
        )


SYSTEM = System(
    name="fastchat",
    title="FastChat",
    source="`fastchat/train/train_lora.py` and `train.py`",
    options=(
        plain("model_name_or_path", "model.model_name_or_path", default="facebook/opt-125m"),
        joint("data_path", "data.sources", "format sharegpt, template vicuna_v1.1"),
        joint("eval_data_path", "data.val_sources"),
        left("lazy_preprocess", "tokens are stored once, in a memory-mapped file"),
        left("cache_dir", "the environment variable HF_HOME"),
        plain("model_max_length", "data.max_length", "number", default="512"),
        left("flash_attn", "chosen by itself: packed attention for the device", key="model.attn_implementation"),
        plain("lora_r", "model.adapter.r", "number", default="8"),
        plain("lora_alpha", "model.adapter.alpha", "number", default="16"),
        plain("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        plain("lora_target_modules", "model.adapter.target_modules", "words", default=_TARGETS),
        left("lora_weight_path", "FastChat never reads it; to continue an adapter", key="model.adapter.path"),
        plain("lora_bias", "model.adapter.bias"),
        joint("q_lora", "model.quantization", "4 bits, nf4, double_quant"),
        joint("rope_scaling_type", "model.rope_scaling.type"),
        joint("rope_scaling_factor", "model.rope_scaling.factor", "without it: target_length, from model_max_length"),
        plain("trust_remote_code", "model.trust_remote_code", "flag"),
        left("padding_side", "rows are filled on the right, and attention never sees padding"),
        left("gradient_checkpoint", "FastChat has no such option; it is gradient_checkpointing"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
