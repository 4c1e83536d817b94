"""The answers of a comparison and their metrics."""

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
    """Which option named it."""

    label: str
    """Name in reports."""

    path: str
    """Folder or Hub id of the model; for an adapter, of the baseline."""

    adapter: str | None = None
    """Folder of the adapter that is put on the model."""


@dataclass(frozen=True)
class Response:
    """An answer with its metrics."""

    text: str
    """The answer without its stop token."""

    num_tokens: int
    """Tokens of the answer without its stop token."""

    stop_reason: Literal["stop", "length"]
    """`stop`: the model ended the answer; `length`: `max_new_tokens` did."""

    repetition: float
    """Share of 4-grams of tokens that occurred earlier in the answer."""

    exact_match: bool | None
    """Whether the answer equals the reference, ignoring white space; `None` without a reference."""

    rouge_l: float | None
    """F1 of ROUGE-L against the reference, 0 to 1; `None` without a reference."""


@dataclass(frozen=True)
class ModelResult:
    """All answers of a model."""

    model: ComparedModel
    """The model that answered."""

    uses_template: bool
    """Whether the prompts were rendered with the model's own chat template."""

    responses: Mapping[DecodingMode, Sequence[Sequence[Response]]]
    """For each mode, one list per prompt with all answers to it."""

    references: Sequence[ReferenceLoss | None]
    """Loss of each prompt's reference under the model."""


@dataclass(frozen=True)
class Comparison:
    """All prompts, modes and answers."""

    prompts: Sequence[ComparisonPrompt]
    """The prompts, in order."""

    configs: Mapping[DecodingMode, GenerationConfig]
    """Generation config of each mode."""

    models: Sequence[ModelResult]
    """Answers of each model, the baseline first."""

    @property
    def has_references(self) -> bool:
        """Whether any prompt has a reference answer."""
        return any(prompt.reference is not None for prompt in self.prompts)


@dataclass(frozen=True)
class Summary:
    """Means over the answers of one model in one mode."""

    label: str
    """Name of the model in reports."""

    mode: DecodingMode
    """The decoding mode."""

    num_answers: int
    """Number of answers."""

    mean_tokens: float
    """Mean tokens per answer."""

    stopped: float
    """Share of answers that the model ended itself."""

    repetition: float
    """Mean share of repeated 4-grams."""

    changed: float | None
    """Share of prompts whose first answer differs from the baseline's; `None` for the baseline."""

    perplexity: float | None
    """Perplexity of the references over all their tokens; `None` without references."""

    exact_match: float | None
    """Share of answers that equal their reference; `None` without references."""

    rouge_l: float | None
    """Mean ROUGE-L F1; `None` without references."""


def make_response(answer: Answer, reference: str | None) -> Response:
    """Return an answer with its metrics.

    Args:
        answer: The answer.
        reference: The wanted answer, if there is one.
    """
    return Response(
        text=answer.text,
        num_tokens=len(answer.token_ids),
        stop_reason=answer.stop_reason,
        repetition=repetition_rate(answer.token_ids),
        exact_match=None if reference is None else exact_match(answer.text, reference),
        rouge_l=None if reference is None else rouge_l(answer.text, reference),
    )


def summarize(comparison: Comparison) -> list[Summary]:
    """Return the means of each model in each mode."""
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
