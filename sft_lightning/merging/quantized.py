"""The base as it was in training, quantized by bitsandbytes, and the answers of the model that was trained on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sft_lightning.compat.bitsandbytes import dequantized_weight
from sft_lightning.errors import UserError
from sft_lightning.merging.plan import MergePlan
from sft_lightning.merging.report import MergeBase
from sft_lightning.models.adapters.quantized import keep_input_dtype
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.base.vocabulary import grow_embeddings
from sft_lightning.models.inspection import max_positions
from sft_lightning.models.probing import next_token_log_probs, tokenize_texts, truncate_rows

_MAX_ROW_TOKENS = 256


class QuantizedBase:
    """The quantized base, in memory on the CPU.

    Args:
        plan: A plan with `quantization`.
    """

    def __init__(self, plan: MergePlan) -> None:
        if plan.quantization is None:
            raise ValueError("the plan has no quantization")
        # transformers would put quantized weights on a GPU if there is one; merging is done on the CPU.
        model = load_quantized(
            str(plan.folder),
            plan.quantization,
            config=copy.deepcopy(plan.config),
            dtype=plan.training_dtype,
            trust_remote_code=plan.trust_remote_code,
            device_map={"": "cpu"},
        )
        self._model = model.eval()
        self._dtype = plan.training_dtype
        compute = plan.quantization.compute_dtype
        types = {self._dtype, getattr(torch, compute) if compute else self._dtype}
        types |= {torch.float16} if plan.quantization.bits == 8 else set()  # LLM.int8 casts its inputs
        self.rounding = 2 * max(torch.finfo(dtype).eps for dtype in types)
        """Relative rounding error of the output of a quantized layer, which rounds its input and its output."""

        kinds = ("Linear4bit", "Linear8bitLt")
        self._layers = {n: module for n, module in model.named_modules() if type(module).__name__ in kinds}

    @property
    def names(self) -> list[str]:
        """Names of the quantized weights."""
        return [f"{name}.weight" for name in self._layers]

    def dequantize(self, name: str) -> torch.Tensor:
        """Return a quantized weight as float32 values, in the shape that the base stores."""
        layer: Any = self._layers[name.removesuffix(".weight")]
        weight = dequantized_weight(layer)
        transposed = getattr(layer, "source_cls", None) is Conv1D  # GPT-2 stores (in, out), bitsandbytes (out, in)
        return (weight.T if transposed else weight).float()

    @torch.no_grad()
    def columns(self, name: str, num_inputs: int) -> torch.Tensor:
        """Return the first columns of a quantized weight, as its layer computes with them, float32 (out, num_inputs).

        Each is the layer's answer to an input of zeros and a single one.

        Args:
            name: Name of the weight.
            num_inputs: The most columns to return.
        """
        layer: Any = self._layers[name.removesuffix(".weight")]
        inputs = torch.eye(min(num_inputs, layer.in_features), layer.in_features, dtype=self._dtype)
        answers: torch.Tensor = layer(inputs) - layer(torch.zeros_like(inputs[:1]))  # without the bias
        return answers.T.float()

    def put_adapter(self, plan: MergePlan) -> PeftModel:
        """Return the model that was trained: the plan's only adapter on this base, which is changed in place."""
        grow_embeddings(self._model, plan.vocab_sizes[-1])
        model = PeftModel.from_pretrained(self._model, str(plan.adapters[0])).eval()
        keep_input_dtype(model)
        return model


@dataclass
class TrainedModel:
    """The model that was trained on a quantized base, and the answers that merged models are compared with."""

    base: QuantizedBase | None = None
    """The quantized base; `None` if nothing is merged into its values."""

    rows: list[list[int]] = field(default_factory=list)
    """Token ids of the comparison; empty if nothing is compared."""

    log_probs: list[torch.Tensor] = field(default_factory=list)
    """Log-probabilities of the next token, (S, vocabulary) for each row."""


def load_trained_model(
    plan: MergePlan,
    bases: Sequence[MergeBase],
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Sequence[int]] | None,
) -> TrainedModel:
    """Load the quantized base if it is needed, and compute the trained model's answers if merges are compared by them.

    Args:
        plan: The merge plan.
        bases: What is merged into: `original`, `dequantized`, or both, which are then compared.
        tokenizer: For the built-in texts.
        rows: Token ids to compare on, instead of the built-in texts.

    Raises:
        UserError: If there is nothing to compare on.
    """
    if "dequantized" not in bases:
        return TrainedModel()
    quantized = QuantizedBase(plan)
    if len(bases) == 1:
        return TrainedModel(quantized)
    if not rows:
        if tokenizer is None:
            raise UserError(
                f"merge --base: cannot be measured, because neither {plan.adapters[-1]} nor {plan.folder} has a "
                "tokenizer; set it to original or dequantized"
            )
        rows = tokenize_texts(tokenizer)
    used = truncate_rows(rows, max_length=min(_MAX_ROW_TOKENS, max_positions(plan.config)))
    return TrainedModel(quantized, used, next_token_log_probs(quantized.put_adapter(plan), used))
