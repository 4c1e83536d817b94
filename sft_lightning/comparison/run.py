"""Let the models answer, one after the other, so that only one is in memory."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sft_lightning.comparison.modes import answers_per_prompt
from sft_lightning.comparison.perplexity import reference_loss
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.comparison.results import ComparedModel, Comparison, ModelResult, Response, Role, make_response
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.trained_base import read_manifest
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig, LoadOptions
from sft_lightning.models.generation.serving import ServedModel, base_named_by_adapter, load_served_model


@dataclass(frozen=True)
class RunOptions:
    """How the models are asked."""

    num_return_sequences: int = 1
    """Answers per prompt; greedy and contrastive give one."""

    batch_size: int = 8
    """Prompts per batch."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch_size: must be at least 1 (got {self.batch_size})")


def compared_models(baseline: str, finetuned: Sequence[str], adapters: Sequence[str]) -> list[ComparedModel]:
    """Return the models to compare: the baseline, fine-tuned models, and adapters on the baseline.

    A model's label is the name of its folder, with as many parent folders as it takes to tell the models apart.

    Args:
        baseline: Folder or Hub id of the baseline.
        finetuned: Folders or Hub ids of fine-tuned models.
        adapters: Adapter folders.
    """
    named: list[tuple[Role, str]] = [
        ("baseline", baseline),
        *(("finetuned", path) for path in finetuned),
        *(("adapter", path) for path in adapters),
    ]
    labels = _labels([path for _, path in named])
    return [
        ComparedModel(role, label, baseline if role == "adapter" else path, path if role == "adapter" else None)
        for (role, path), label in zip(named, labels, strict=True)
    ]


def compare_models(
    models: Sequence[ComparedModel],
    prompts: Sequence[ComparisonPrompt],
    configs: Mapping[DecodingMode, GenerationConfig],
    load: LoadOptions,
    options: RunOptions,
) -> Comparison:
    """Let every model answer every prompt in every mode.

    Args:
        models: The models, the baseline first.
        prompts: The prompts.
        configs: Generation config of each mode.
        load: How checkpoints are loaded.
        options: Batch size, and answers per prompt.

    Raises:
        UserError: If a model cannot be loaded, or its chat template rejects a prompt.
    """
    results = []
    for number, model in enumerate(models, start=1):
        _print_status(f"model {number} of {len(models)}: {model.adapter or model.path}")
        _report_other_base(model)
        served = load_served_model(f"--{'baseline' if model.adapter else model.role}", model.path, model.adapter, load)
        results.append(_result_of(served, model, prompts, configs, options))
        del served
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Comparison(prompts, configs, results)


def _result_of(
    served: ServedModel,
    model: ComparedModel,
    prompts: Sequence[ComparisonPrompt],
    configs: Mapping[DecodingMode, GenerationConfig],
    options: RunOptions,
) -> ModelResult:
    ids = [
        served.encode_messages(prompt.messages)
        if served.has_template and not prompt.is_plain
        else served.encode_text(prompt.text)
        for prompt in prompts
    ]
    return ModelResult(
        model=model,
        uses_template=served.has_template,
        responses={mode: _responses(served, prompts, ids, config, options) for mode, config in configs.items()},
        references=[
            None if prompt.reference is None else reference_loss(served, prompt, row)
            for prompt, row in zip(prompts, ids, strict=True)
        ],
    )


def _responses(
    served: ServedModel,
    prompts: Sequence[ComparisonPrompt],
    ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    options: RunOptions,
) -> list[list[Response]]:
    num_answers = answers_per_prompt(config, options.num_return_sequences)
    answers = []
    for start in range(0, len(ids), options.batch_size):
        batch = ids[start : start + options.batch_size]
        answers += served.answer(batch, config, num_return_sequences=num_answers)
    return [
        [make_response(answer, prompt.reference) for answer in group]
        for group, prompt in zip(answers, prompts, strict=True)
    ]


def _labels(paths: Sequence[str]) -> list[str]:
    parts = [Path(path).expanduser().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    labels = ["/".join(own[-depth:]) for own in parts]
    seen: Counter[str] = Counter()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return unique


def _report_other_base(model: ComparedModel) -> None:
    if model.adapter is not None:
        trained_on = base_named_by_adapter("--baseline", model.adapter)
        if trained_on != model.path and not read_manifest(model.adapter).get("base_fingerprint"):
            _print_status(f"note: {model.adapter} was trained on {trained_on}, but is put on the baseline {model.path}")


def _print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
