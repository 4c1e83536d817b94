"""Options of FastChat and its fork for LLaMA (Q)LoRA: `fastchat/train/{train_lora,train}.py`."""

from __future__ import annotations

from pathlib import Path

from sft_lightning.migration.draft import Draft, keep_examples_unpacked, set_source
from sft_lightning.migration.options import Options, System, combined, copied, omitted
from sft_lightning.migration.training_arguments import TRAINING_ARGUMENTS, finish_training_arguments

_TARGETS = "q_proj k_proj v_proj o_proj down_proj gate_proj up_proj"


def _finish(options: Options, draft: Draft) -> None:
    quantized = options.flag("q_lora")
    full = Path(options.program).name in ("train.py", "train_mem.py", "train_xformers.py")
    draft.set("data.template", "vicuna_v1.1", "the only template that FastChat trains with")
    draft.set("data.loss_on", "assistant")
    set_source(draft, "data.sources", options.text("data_path"), "sharegpt")
    set_source(draft, "data.val_sources", options.text("eval_data_path"), "sharegpt")
    draft.set("data.overlong", "truncate", "as in the original; counted and reported")
    keep_examples_unpacked(draft)
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
        draft.omit(
            "RoPE scaling, which train.py sets if --model_max_length exceeds the model's context",
            f"if yours does, set model.rope_scaling: {{type: linear, target_length: {length}}}",
        )


SYSTEM = System(
    name="fastchat",
    title="FastChat",
    source="`fastchat/train/train_lora.py` and `train.py`",
    options=(
        copied("model_name_or_path", "model.model_name_or_path", default="facebook/opt-125m"),
        combined("data_path", "data.sources", "format sharegpt, template vicuna_v1.1"),
        combined("eval_data_path", "data.val_sources"),
        omitted("lazy_preprocess", "tokens are always stored in a memory-mapped file"),
        omitted("cache_dir", "set the environment variable HF_HOME"),
        copied("model_max_length", "data.max_length", "number", default="512"),
        omitted(
            "flash_attn", "packed attention is chosen automatically for the device", key="model.attn_implementation"
        ),
        copied("lora_r", "model.adapter.r", "number", default="8"),
        copied("lora_alpha", "model.adapter.alpha", "number", default="16"),
        copied("lora_dropout", "model.adapter.dropout", "number", default="0.05"),
        copied("lora_target_modules", "model.adapter.target_modules", "words", default=_TARGETS),
        omitted(
            "lora_weight_path",
            "FastChat ignores it; to continue an adapter, set model.adapter.path",
            key="model.adapter.path",
        ),
        copied("lora_bias", "model.adapter.bias"),
        combined("q_lora", "model.quantization", "4 bits, nf4, double_quant"),
        combined("rope_scaling_type", "model.rope_scaling.type"),
        combined("rope_scaling_factor", "model.rope_scaling.factor", "default: target_length from model_max_length"),
        copied("trust_remote_code", "model.trust_remote_code", "flag"),
        omitted("padding_side", "rows are padded on the right, and attention ignores padding"),
        omitted("gradient_checkpoint", "not an option of FastChat; use gradient_checkpointing"),
        *TRAINING_ARGUMENTS,
    ),
    finish=_finish,
)
