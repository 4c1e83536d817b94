"""The base as an adapter saw it in training: quantized by bitsandbytes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from sft_lightning.merging.base import MergePlan, grow_embeddings
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.base.quantization import load_quantized


class QuantizedBase:
    """The quantized base in memory.

    Args:
        plan: With `quantization`.
    """

    def __init__(self, plan: MergePlan) -> None:
        if plan.quantization is None:
            raise ValueError("the plan has no quantization")
        # transformers would put quantized weights on a GPU where there is one; merging is done on the CPU.
        model = load_quantized(
            str(plan.folder),
            plan.quantization,
            config=copy.deepcopy(plan.config),
            dtype=plan.training_dtype,
            trust_remote_code=plan.trust_remote_code,
            device_map={"": "cpu"},
        )
        self._model = model.eval()
        kinds = ("Linear4bit", "Linear8bitLt")
        self._layers = {n: module for n, module in model.named_modules() if type(module).__name__ in kinds}

    @property
    def names(self) -> list[str]:
        """Names of the quantized weights."""
        return [f"{name}.weight" for name in self._layers]

    def weight(self, name: str) -> torch.Tensor:
        """Return the value that a quantized weight stands for, in float32 and as the base lays it out."""
        layer: Any = self._layers[name.removesuffix(".weight")]
        if type(layer).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            from bitsandbytes.functional import int8_vectorwise_dequant

            # The first forward moves the scales from the weight to the layer's state.
            scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
            weight = int8_vectorwise_dequant(layer.weight.data, scales)
        transposed = getattr(layer, "source_cls", None) is Conv1D  # GPT-2 stores (in, out), bitsandbytes (out, in)
        return (weight.T if transposed else weight).float()

    def trained(self, plan: MergePlan) -> PeftModel:
        """Return the model that was trained: the one adapter of the plan on this base, which is changed by it."""
        grow_embeddings(self._model, plan.vocab_sizes[-1])
        model = PeftModel.from_pretrained(self._model, str(plan.adapters[0])).eval()
        keep_input_dtype(model)
        return model
