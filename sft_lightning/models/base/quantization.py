"""Quantized base weights: NF4, FP4 and LLM.int8 through bitsandbytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from sft_lightning.compat.transformers import plain_falcon_layers, quantizing_on
from sft_lightning.errors import UserError
from sft_lightning.models.inspection import bypassed_modules


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base weights are stored.

    Raises:
        UserError: If `bits` is neither 4 nor 8.
    """

    bits: int = 4
    """4 (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) or 8 (LLM.int8, Dettmers et al., 2022, arXiv:2208.07339)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""

    double_quant: bool = True
    """Quantize the 4-bit quantization constants too: 0.4 bits per parameter less."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that 4-bit weights compute in; default: `model.dtype`."""

    storage_dtype: Literal["float32", "bfloat16", "float16", "uint8"] | None = None
    """Type that 4-bit weights are stored as, which strategies that shard by one uniform type look at; default: the
    type that they compute in."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"model.quantization.bits: must be 4 or 8 (got {self.bits}); null for none")
        only_of_4_bits = [key for key in ("compute_dtype", "storage_dtype") if getattr(self, key) is not None]
        if self.bits == 8 and only_of_4_bits:
            raise UserError(f"model.quantization.{only_of_4_bits[0]}: is of 4-bit weights, and bits is 8; remove it")

    def to_transformers(self, dtype: torch.dtype, *, unquantized: Collection[str] = ()) -> BitsAndBytesConfig:
        """Return the configuration that `from_pretrained` takes.

        Args:
            dtype: Type of what is not quantized.
            unquantized: Last parts of the names of modules to leave as they are, besides the head.
        """
        skipped: Any = sorted({*unquantized, "lm_head"}) if unquantized else None  # None: the head, as it is called
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        compute_dtype = getattr(torch, self.compute_dtype) if self.compute_dtype else dtype
        return BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, self.storage_dtype) if self.storage_dtype else compute_dtype,
        )


def load_quantized(
    name_or_path: str,
    quantization: QuantizationConfig,
    *,
    dtype: torch.dtype,
    config: PretrainedConfig | None = None,
    on_cpu: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a model with quantized weights, wherever its family can have them.

    What Mamba reads past its modules stays as it is: a quantized weight is only bytes there.

    Args:
        name_or_path: Folder or Hub id.
        quantization: How the weights are stored.
        dtype: Type of what is not quantized.
        config: The model's configuration; default: its own.
        on_cpu: Leave the weights in host memory. Default: the GPU, if there is one; which then must hold all of them.
        options: What else `from_pretrained` takes.

    Raises:
        UserError: If nothing in it is of a kind that transformers quantizes.
    """
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=options.get("trust_remote_code"))
    stored = quantization.to_transformers(dtype, unquantized=bypassed_modules(config))
    if on_cpu:
        options["device_map"] = {"": "cpu"}
    falcon = plain_falcon_layers() if config.model_type == "falcon" else nullcontext()
    with falcon, quantizing_on(_fastest_device()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=dtype, quantization_config=stored, **options
        )
    if not any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)} - {"Linear"})
        raise UserError(
            f"model.quantization: nothing in this {config.model_type} model was quantized, its layers "
            f"({', '.join(kinds) or 'none'}) are of a kind that transformers leaves as it is; set "
            "model.quantization: null, with a LoRA adapter on the base as it is"
        )
    _keep_weights(model)
    return model


def _fastest_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _keep_weights(model: torch.nn.Module) -> None:
    """Keep quantized weights as they are stored, whatever is done with the model on a CPU.

    With AVX512-BF16, bitsandbytes repacks a layer's 4-bit weights in place for a faster kernel when it first runs in
    evaluation mode, and training goes on with the repacked weights: a validation or a sample would change what is
    learned. The kernel also refuses widths that 32 does not divide.

    PEFT's DoRA puts a copy of an 8-bit weight in its place after each look at it, without its scales, and the layer
    then forgets them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_return_scales)


def _return_scales(layer: Any, args: Any) -> None:
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def store_4bit_as_bytes(model: torch.nn.Module) -> None:
    """Let every 4-bit layer hold its packed weights as bytes, which nobody who converts floating-point types touches.

    `trainer.precision: bf16-true` and DeepSpeed cast a model to the type that it trains in; weights packed into another
    type would be lost.
    """
    for module in model.modules():
        weight: Any = module.weight if isinstance(module, Linear4bit) else None
        if weight is not None and weight.dtype != torch.uint8:
            weight.data = weight.data.contiguous().view(torch.uint8).reshape(-1, 1)
            weight.quant_storage = torch.uint8


@contextmanager
def without_int8_outliers(model: torch.nn.Module) -> Iterator[None]:
    """Let LLM.int8 round every token for itself, whatever else is in the micro-batch.

    It keeps columns with outliers in 16 bits, and takes those in which any token of the micro-batch has one: packed or
    not, how a token is rounded depends a little on what is computed with it. Whether documents see each other can only
    be measured without that.
    """
    states = [module.state for module in model.modules() if isinstance(module, Linear8bitLt)]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
