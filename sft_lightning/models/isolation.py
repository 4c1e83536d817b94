"""Check on the loaded model that packed documents do not see each other.

The family's name is no evidence: the logits of a document are measured in a packed row, beside another document, and
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.compat.transformers import attention_of
from sft_lightning.errors import UserError
from sft_lightning.models.base.rope import RopeScalingConfig, check_packing
from sft_lightning.models.inspection import base_model, evaluating, max_positions

_LENGTH = 16
"""Tokens of the document whose logits are measured."""

_MAX_BEFORE = 512
"""Most tokens before it: enough to reach positions above 256, which bfloat16 rounds (ALiBi)."""


@dataclass(frozen=True)
class Isolation:
    """How much the logits of a document depend on the rest of its row."""

    leak: float
    """Largest absolute change of its logits when the document before it is replaced."""

    difference: float
    """Largest absolute difference between its logits in a packed row and alone."""

    tolerance: float
    """How much rounding may change either."""

    @property
    def verified(self) -> bool:
        """Whether neither exceeds the tolerance; false if any value is NaN."""
        return self.leak <= self.tolerance and self.difference <= self.tolerance


@torch.no_grad()
def measure_isolation(
    model: torch.nn.Module, vocab_size: int, device: torch.device, *, max_length: int = 2 * _LENGTH
) -> Isolation:
    """Measure on the loaded model whether packed documents see each other.

    Two documents share a row. Replacing the first must not change the logits of the second, and these must be the same
    as for the second document alone.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        device: The model's device.
        max_length: Tokens per row; the second document is placed near the end, at most 512 tokens into the row.
    """
    before = _length_before(model, max_length)
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randint(vocab_size, (2, 1, before), generator=generator).to(device)
    second = torch.randint(vocab_size, (1, _LENGTH), generator=generator).to(device)
    with evaluating(model), without_int8_outliers(model):
        alone = _logits(model, second, [_LENGTH])
        packed = _logits(model, torch.cat([first, second], 1), [before, _LENGTH])[:, before:]
        moved = _logits(model, torch.cat([other, second], 1), [before, _LENGTH])[:, before:]
    return Isolation(
        leak=float((packed - moved).abs().max()),
        difference=float((packed - alone).abs().max()),
        tolerance=float(alone.abs().max()) * 32 * torch.finfo(_compute_dtype(model, device)).eps,
    )


def verify_isolation(
    model: torch.nn.Module, vocab_size: int, device: torch.device, *, max_length: int = 2 * _LENGTH
) -> float:
    """Verify on the loaded model that packed documents do not see each other.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        device: The model's device.
        max_length: Tokens per row.

    Returns:
        The largest absolute difference between a document's packed and separate logits.

    Raises:
        UserError: If one document changes the logits of another by more than rounding does.
    """
    found = measure_isolation(model, vocab_size, device, max_length=max_length)
    if not found.verified:
        raise UserError(f"data.packing: {describe_leak(model, found)}; {_way_out(model)}")
    return found.difference


@torch.no_grad()
def run_once(model: torch.nn.Module, vocab_size: int, device: torch.device) -> None:
    """Run the model on a short document in evaluation mode, as the measurement does.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        device: The model's device.
    """
    with evaluating(model):
        _logits(
            model,
            torch.randint(vocab_size, (1, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device),
            [_LENGTH],
        )


def choose_packing(
    model: PreTrainedModel | PeftModel,
    vocab_size: int,
    device: torch.device,
    *,
    max_length: int,
    rope_scaling: RopeScalingConfig | None,
) -> tuple[Literal["best_fit", "none"], str]:
    """Decide `data.packing: auto` on the loaded model.

    Args:
        model: The model, adapters included.
        vocab_size: Random token ids are below it.
        device: The model's device.
        max_length: Tokens per row.
        rope_scaling: `model.rope_scaling`; `None` if it is not set.

    Returns:
        The packing, and the reason.
    """
    try:
        if rope_scaling is not None:
            check_packing(base_model(model).config, rope_scaling, max_length)
        found = measure_isolation(model, vocab_size, device, max_length=max_length)
    except UserError as error:
        return "none", str(error)
    return (
        ("best_fit", "packed documents do not see each other")
        if found.verified
        else ("none", describe_leak(model, found))
    )


def describe_leak(model: torch.nn.Module, found: Isolation) -> str:
    """Describe the measurement of a model whose documents see each other.

    Args:
        model: The model.
        found: The measurement.
    """
    return (
        f"packed documents see each other in this model ({_describe_model(model)}): replacing one changed the logits "
        f"of the other by {found.leak:.2e}, and packed logits differ from separate ones by {found.difference:.2e} "
        f"(tolerance {found.tolerance:.2e})"
    )


def _way_out(model: torch.nn.Module) -> str:
    """Return the settings that help; another attention does only if the user chose one, and if the model has one."""
    config = getattr(model, "config", None)
    chosen = None if config is None else attention_of(config)
    ways = ["set data.packing: none", "or data.packing: auto, which packs only if documents do not see each other"]
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


def _logits(model: torch.nn.Module, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    out = model(input_ids=ids, position_ids=positions, document_lengths=[lengths], use_cache=False)
    logits: torch.Tensor = out.logits
    return logits.float()


def _compute_dtype(model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """Return the coarsest type among the parameters' and autocast's, which decides the rounding of the logits."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16, torch.float32)}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
