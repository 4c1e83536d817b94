"""Check on the loaded model that packed documents do not see each other.

The family's name is no evidence: the logits of a document are measured in packed rows, beside other documents, and
alone. Rows are made into a batch as training makes them, padding included, and there are as many as a micro-batch of
the run has, up to three: some kernels keep documents apart in a batch of one row only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.compat.transformers import attention_of
from sft_lightning.errors import UserError
from sft_lightning.models.inspection import base_model, evaluating, max_positions

_LENGTH = 16
"""Tokens of the document whose logits are measured."""

_MAX_BEFORE = 512
"""Most tokens before it: enough to reach positions above 256, which bfloat16 rounds (ALiBi)."""

_MAX_ROWS = 3
"""Rows of the largest batch that is measured."""

MakeInputs = Callable[[Sequence[Sequence[torch.Tensor]]], Mapping[str, Any]]
"""Token ids of each document of each row, (L,) → the arguments of the model's forward pass, as training makes them."""


@dataclass(frozen=True)
class Isolation:
    """How much the logits of a document depend on the rest of its row."""

    leak: float
    """Largest absolute change of its logits when the document before it is replaced."""

    difference: float
    """Largest absolute difference between its logits in a packed row and alone."""

    tolerance: float
    """How much rounding may change either."""

    num_rows: int = 1
    """Rows of the batch that was measured."""

    @property
    def verified(self) -> bool:
        """Whether neither exceeds the tolerance; false if any value is NaN."""
        return self.leak <= self.tolerance and self.difference <= self.tolerance


@torch.no_grad()
def measure_isolation(
    model: torch.nn.Module,
    vocab_size: int,
    inputs_of: MakeInputs,
    *,
    max_length: int = 2 * _LENGTH,
    batch_size: int = 1,
) -> Isolation:
    """Measure on the loaded model whether packed documents see each other, in batches of one, two and three rows.

    Each row ends with the same document, after another one that is shorter in each further row. Replacing all others
    must not change the logits of the last ones, and these must be the same as for the document alone.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        inputs_of: Makes the arguments of the forward pass.
        max_length: Tokens per row; the measured document is at the end of a row of up to 512 tokens.
        batch_size: Rows per micro-batch of the run; no batch of more rows is measured.

    Returns:
        The measurement of the batch in which documents depend on each other most.
    """
    generator = torch.Generator().manual_seed(0)
    longest = _length_before(model, max_length)
    before = [max(1, longest // (row + 1)) for row in range(min(batch_size, _MAX_ROWS))]
    firsts, others = ([_random_document(vocab_size, generator, n) for n in before] for _ in range(2))
    measured = _random_document(vocab_size, generator)
    with evaluating(model), without_int8_outliers(model):
        alone = _last_logits(model, inputs_of([[measured]]), [0])
        tolerance = float(alone.abs().max()) * 32 * torch.finfo(_compute_dtype(model, alone.device)).eps
        found = []
        for rows in range(1, len(before) + 1):
            packed, moved = (
                _last_logits(model, inputs_of([[each, measured] for each in firsts_of[:rows]]), before[:rows])
                for firsts_of in (firsts, others)
            )
            leak, difference = (float((packed - other).abs().max()) for other in (moved, alone))
            found.append(Isolation(leak, difference, tolerance, rows))
    return max(found, key=lambda each: (not each.verified, each.leak, each.difference))


def verify_isolation(
    model: torch.nn.Module,
    vocab_size: int,
    inputs_of: MakeInputs,
    *,
    max_length: int = 2 * _LENGTH,
    batch_size: int = 1,
) -> float:
    """Verify on the loaded model that packed documents do not see each other.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        inputs_of: Makes the arguments of the forward pass.
        max_length: Tokens per row.
        batch_size: Rows per micro-batch.

    Returns:
        The largest absolute difference between a document's packed and separate logits.

    Raises:
        UserError: If one document changes the logits of another by more than rounding does.
    """
    found = measure_isolation(model, vocab_size, inputs_of, max_length=max_length, batch_size=batch_size)
    if not found.verified:
        raise UserError(f"data.packing: {describe_leak(model, found)}; {_way_out(model, found)}")
    return found.difference


@torch.no_grad()
def run_once(model: torch.nn.Module, vocab_size: int, inputs_of: MakeInputs) -> None:
    """Run the model on a short document in evaluation mode, as the measurement does.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        inputs_of: Makes the arguments of the forward pass.
    """
    with evaluating(model):
        model(**inputs_of([[_random_document(vocab_size, torch.Generator().manual_seed(0))]]))


def describe_leak(model: torch.nn.Module, found: Isolation) -> str:
    """Describe the measurement of a model whose documents see each other.

    Args:
        model: The model.
        found: The measurement.
    """
    rows = f", in a batch of {found.num_rows} rows" if found.num_rows > 1 else ""
    return (
        f"packed documents see each other in this model ({_describe_model(model)}{rows}): replacing one changed the "
        f"logits of the other by {found.leak:.2e}, and packed logits differ from separate ones by "
        f"{found.difference:.2e} (tolerance {found.tolerance:.2e})"
    )


def _way_out(model: torch.nn.Module, found: Isolation) -> str:
    """Return the settings that help; another attention does only if the user chose one, and if the model has one."""
    config = getattr(model, "config", None)
    chosen = None if config is None else attention_of(config)
    ways = ["set data.packing: none", "or data.packing: auto, which packs only if documents do not see each other"]
    if found.num_rows > 1:
        ways.append("or data.batch_size: 1, with trainer.accumulate_grad_batches for the same global batch")
    if chosen in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
        ways.append("or model.attn_implementation: auto, which keeps documents apart if the model supports it")
    return ", ".join(ways)


def _describe_model(model: torch.nn.Module) -> str:
    if not isinstance(model, PreTrainedModel | PeftModel):
        return type(model).__name__
    config = base_model(model).config
    return f"{config.model_type}, attention {attention_of(config)}"


def _length_before(model: torch.nn.Module, max_length: int) -> int:
    """Return the length of the document before the measured one."""
    config = getattr(model, "config", None)
    limit = max_length if config is None else min(max_length, max_positions(config))
    return max(_LENGTH, min(_MAX_BEFORE, limit - _LENGTH))


def _random_document(vocab_size: int, generator: torch.Generator, length: int = _LENGTH) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=generator)


def _last_logits(model: torch.nn.Module, inputs: Mapping[str, Any], before: Sequence[int]) -> torch.Tensor:
    """Return the logits of the measured document in each row, (B, 16, V) float32; `before`: tokens before it."""
    logits: torch.Tensor = model(**inputs).logits
    return torch.stack([logits[row, start : start + _LENGTH] for row, start in enumerate(before)]).float()


def _compute_dtype(model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """Return the coarsest type among the parameters' and autocast's, which decides the rounding of the logits."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16, torch.float32)}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
