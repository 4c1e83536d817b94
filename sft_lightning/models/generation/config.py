"""How answers are generated, and how the checkpoints of `chat` and `compare` are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft_lightning.errors import UserError

ServedDType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
DecodingMode = Literal["greedy", "sampling", "beam", "beam_sampling", "diverse_beam", "contrastive"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are generated.

    Raises:
        UserError: If a value is out of range, or two values cannot be combined.
    """

    max_new_tokens: int = 64
    """Most tokens per answer."""

    temperature: float = 0.0
    """0: take the most likely token; above 0: sample."""

    top_k: int = 0
    """Sample among this many most likely tokens, 0 for all; in contrastive search, the number of candidates."""

    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""

    repetition_penalty: float = 1.0
    """Penalty on tokens that have occurred (Keskar et al., 2019, arXiv:1909.05858); 1: no penalty."""

    num_beams: int = 1
    """Above 1: beam search; with a temperature above 0, beam search that samples."""

    num_beam_groups: int = 1
    """Above 1: diverse beam search in this many groups (Vijayakumar et al., 2016, arXiv:1610.02424)."""

    diversity_penalty: float = 1.0
    """Penalty on a token that an earlier group of beams has chosen at the same step; used with `num_beam_groups`."""

    penalty_alpha: float = 0.0
    """Above 0: contrastive search among `top_k` candidates (Su et al., 2022, arXiv:2202.06417)."""

    seed: int = 0
    """Seed of the sampling; the run's own random state does not change."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_beam_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"generation.{name}: must be at least 1 (got {getattr(self, name)})")
        for name in ("temperature", "top_k", "diversity_penalty"):
            if getattr(self, name) < 0:
                raise UserError(f"generation.{name}: must be at least 0 (got {getattr(self, name)})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generation.top_p: must be above 0 and at most 1 (got {self.top_p})")
        if not 0 <= self.penalty_alpha <= 1:
            raise UserError(f"generation.penalty_alpha: must be in [0, 1] (got {self.penalty_alpha})")
        if self.repetition_penalty <= 0:
            raise UserError(f"generation.repetition_penalty: must be above 0 (got {self.repetition_penalty})")
        self._check_together()

    def _check_together(self) -> None:
        mode = self.mode
        if mode in ("contrastive", "diverse_beam") and (self.temperature > 0 or self.repetition_penalty != 1):
            raise UserError(
                f"generation: {mode} search cannot be combined with temperature or repetition_penalty (got "
                f"{self.temperature} and {self.repetition_penalty}); set them to 0 and 1"
            )
        if mode == "contrastive" and (self.top_k < 2 or self.num_beams > 1 or self.num_beam_groups > 1):
            raise UserError(
                f"generation: contrastive search (penalty_alpha {self.penalty_alpha}) requires a top_k of at least 2 "
                f"(got {self.top_k}) and no beams (got {self.num_beams} in {self.num_beam_groups} groups)"
            )
        if self.num_beams % self.num_beam_groups:
            raise UserError(
                f"generation.num_beam_groups: must divide num_beams (got {self.num_beam_groups} and {self.num_beams})"
            )

    @property
    def mode(self) -> DecodingMode:
        """The decoding mode that the values select, by the same rules as in transformers."""
        if self.penalty_alpha > 0:
            return "contrastive"
        if self.num_beam_groups > 1:
            return "diverse_beam"
        if self.num_beams > 1:
            return "beam_sampling" if self.temperature > 0 else "beam"
        return "sampling" if self.temperature > 0 else "greedy"

    def max_answers(self) -> int | None:
        """Return the most answers that a prompt can have in this mode; `None` for any number."""
        return {"greedy": 1, "contrastive": 1, "sampling": None}.get(self.mode, self.num_beams)


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are loaded."""

    quantization: int | None = None
    """Load the base in 4 or 8 bits per weight; default: as it is stored."""

    dtype: ServedDType = "auto"
    """Type of the weights; `auto`: as they are stored."""

    device: Device = "auto"
    """`auto`: the GPUs, with a model that is too large for one spread over several, or the CPU if there is none."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""
