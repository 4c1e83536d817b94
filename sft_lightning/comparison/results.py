"""What was answered, and the numbers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from sft_lightning.comparison.metrics import exact_match, repetition_rate, rouge_l
from sft_lightning.comparison.perplexity import ReferenceLoss, mean_perplexity
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig
from sft_lightning.models.generation.serving import Answer

Role = Literal["baseline", "finetuned", "adapter"]


@dataclass(frozen=True)
class ComparedModel:
    """A model to compare."""

    role: Role
    label: str
    """What reports call it."""

    path: str
    """Folder or Hub id of the model, of the baseline for an adapter."""

    adapter: str | None = None


@dataclass(frozen=True)
class Response:
    """An answer with its numbers."""

    text: str
    num_tokens: int
    stop_reason: Literal["stop", "length"]
    repetition: float
    """Share of 4-grams that had occurred before."""

    exact_match: bool | None
    """`None` without a reference, as the next."""

    rouge_l: float | None


@dataclass(frozen=True)
class ModelResult:
    """All answers of a model."""

    model: ComparedModel
    uses_template: bool
    """Whether it was asked through a chat template of its own, or to go on with the plain prompt."""

    responses: Mapping[DecodingMode, Sequence[Sequence[Response]]]
    """By mode and prompt; several where several were asked for."""

    references: Sequence[ReferenceLoss | None]
    """How likely it finds each prompt's reference."""


@dataclass(frozen=True)
class Comparison:
    """The whole of it."""

    prompts: Sequence[ComparisonPrompt]
    configs: Mapping[DecodingMode, GenerationConfig]
    models: Sequence[ModelResult]

    @property
    def has_references(self) -> bool:
        """Whether any prompt has a reference answer."""
        return any(prompt.reference is not None for prompt in self.prompts)


@dataclass(frozen=True)
class Summary:
    """Means over the answers of a model in a mode."""

    label: str
    mode: DecodingMode
    num_answers: int
    mean_tokens: float
    stopped: float
    """Share of answers that the model ended itself."""

    repetition: float
    changed: float | None
    """Share of prompts whose first answer is not the baseline's; `None` for the baseline."""

    perplexity: float | None
    """Of the reference answers, over all their tokens."""

    exact_match: float | None
    rouge_l: float | None


def make_response(answer: Answer, reference: str | None) -> Response:
    """Return an answer with its numbers."""
    return Response(
        text=answer.text,
        num_tokens=len(answer.token_ids),
        stop_reason=answer.stop_reason,
        repetition=repetition_rate(answer.token_ids),
        exact_match=None if reference is None else exact_match(answer.text, reference),
        rouge_l=None if reference is None else rouge_l(answer.text, reference),
    )


def summarize(comparison: Comparison) -> list[Summary]:
    """Return the means of every model in every mode."""
    return [_summary(comparison, result, mode) for mode in comparison.configs for result in comparison.models]


def _summary(comparison: Comparison, result: ModelResult, mode: DecodingMode) -> Summary:
    answers = [response for responses in result.responses[mode] for response in responses]
    first = comparison.models[0]
    pairs = zip(result.responses[mode], first.responses[mode], strict=True)
    return Summary(
        label=result.model.label,
        mode=mode,
        num_answers=len(answers),
        mean_tokens=fmean(answer.num_tokens for answer in answers),
        stopped=fmean(answer.stop_reason == "stop" for answer in answers),
        repetition=fmean(answer.repetition for answer in answers),
        changed=None if result is first else fmean(own[0].text != base[0].text for own, base in pairs),
        perplexity=mean_perplexity([loss for loss in result.references if loss is not None]),
        exact_match=_mean(answer.exact_match for answer in answers),
        rouge_l=_mean(answer.rouge_l for answer in answers),
    )


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None
