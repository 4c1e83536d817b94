"""Adapters into their base: a plain Hugging Face folder, proven by loading it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_lightning.errors import UserError
from sft_lightning.models.export import MANIFEST
from sft_lightning.models.merging.base import MergePlan, plan_merge, read_manifest
from sft_lightning.models.merging.checks import Difference, Trained, ask_trained, check_answers
from sft_lightning.models.merging.folders import replaced_folder
from sft_lightning.models.merging.model_card import model_card
from sft_lightning.models.merging.probes import (
    answers,
    logits_of,
    max_positions,
    mean_divergence,
    random_ids,
)
from sft_lightning.models.merging.shards import parse_size, tensor_names
from sft_lightning.models.merging.stream import Merged, merge_weights
from sft_lightning.models.merging.whole import load_float32, reference_logits
from sft_lightning.models.quantization import QuantizationConfig

BaseName = Literal["original", "dequantized"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merging did."""

    output_dir: Path
    base: BaseName
    """What the adapters were merged into: the base as it is stored, or the values that quantization left of it."""

    dtype: str
    """Types of the written weights."""

    difference: Difference | None
    """`None` if it was not measured."""

    divergences: Mapping[BaseName, float]
    """For a quantized base, KL(trained model ‖ merged model) in nats per token, for each base that was tried."""

    whole: str | None
    """Why the whole model had to be in memory; `None`: the base was read shard by shard."""

    left_out: Sequence[str]
    """Tensors of the base's files that the model does not have."""

    untied: bool
    """Whether the head became a matrix of its own."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge.

    Raises:
        UserError: If the size is none.
    """

    model_name_or_path: str | None = None
    """Base model; default: the one that the adapters name."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """For an adapter that was trained on a quantized base: merge into the `original` weights, or into the
    `dequantized` ones that it was trained on; `auto`: what diverges less from the trained model, measured."""

    quantization: QuantizationConfig | None = None
    """How the base was quantized in training; default: as the adapter's `run_manifest.json` says."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; `auto`: as the base stores each."""

    max_shard_size: str = "5GB"
    """Largest file of weights."""

    verify: bool = True
    """Load the result again and compare it with the base under its adapters. This takes memory for the whole model in
    float32, which merging itself does not."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)


@dataclass
class _Candidate:
    folder: Path
    merged: Merged
    difference: Difference | None = None
    divergence: float | None = None


def merge_adapters(
    adapters: Sequence[str],
    output_dir: str,
    options: MergeOptions = MergeOptions(),
    *,
    rows: Sequence[Sequence[int]] | None = None,
) -> MergeReport:
    """Merge adapters into their base, in order, and verify the result.

    The update is added in float32 and rounded once. The base's files are read and written shard by shard, on the CPU.

    Args:
        adapters: PEFT adapter folders.
        output_dir: Folder to write; replaced as a whole, or not at all.
        options: How.
        rows: Token ids of the user's data, to measure divergence on; default: a few built-in texts.

    Raises:
        UserError: If a folder is not an adapter, or does not fit its base or the options.
        RuntimeError: If the merged model, loaded again, does not answer like the adapted one.
    """
    plan = plan_merge(
        adapters,
        model_name_or_path=options.model_name_or_path,
        quantization=options.quantization,
        dtype=None if options.dtype == "auto" else options.dtype,
        max_shard_size=parse_size(options.max_shard_size),
        trust_remote_code=options.trust_remote_code,
    )
    choices = _choices(plan, options)
    tokenizer = _tokenizer(plan)
    with replaced_folder(Path(output_dir)) as target:
        trained = ask_trained(plan, choices, tokenizer, rows)
        tried = {
            choice: _try(plan, target / choice, trained, choice, tokenizer, verify=options.verify) for choice in choices
        }
        best = min(tried, key=lambda choice: tried[choice].divergence or 0) if options.base == "auto" else options.base
        report = _report(Path(output_dir), best, tried)
        _keep(target, tried[best].folder)
        _describe(target, plan, report)
    return report


def _choices(plan: MergePlan, options: MergeOptions) -> list[BaseName]:
    """Return the bases to merge into: both, to be compared, where training saw another than the stored one."""
    if plan.quantization is None:
        if options.base == "dequantized":
            raise UserError(
                "merge --base: 'dequantized' is for an adapter of a quantized base, and nothing says that "
                f"{str(plan.adapters[-1])!r} is one; say how it was quantized, with --quantization.bits 4"
            )
        return ["original"]
    measured = options.verify and len(plan.adapters) == 1
    if options.base == "auto" and not measured:
        why = "several adapters have no one trained model" if options.verify else "--verify is false"
        raise UserError(f"merge --base: original or dequantized cannot be decided by measuring, because {why}; set it")
    return ["original", "dequantized"] if measured or options.base == "auto" else [options.base]


def _try(
    plan: MergePlan,
    folder: Path,
    trained: Trained,
    choice: BaseName,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    verify: bool,
) -> _Candidate:
    """Write one merged model, and measure it."""
    folder.mkdir()
    quantized = trained.quantized if choice == "dequantized" else None
    candidate = _Candidate(folder, merge_weights(plan, folder, quantized))
    _write_companions(plan, folder, tokenizer)
    if verify:
        probe = random_ids(plan.vocab_sizes[1], rows=2, length=min(32, max_positions(plan.config)))
        reference = reference_logits(plan, quantized, probe, candidate.merged.dtypes)
        model = load_float32(folder, plan)  # what was written, not what a coarse type computes
        candidate.difference = check_answers(reference, logits_of(model, probe))
        if trained.answers:
            candidate.divergence = mean_divergence(trained.answers, answers(model, trained.rows))
    return candidate


def _names(dtypes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))


def _report(output_dir: Path, best: BaseName, tried: Mapping[BaseName, _Candidate]) -> MergeReport:
    chosen = tried[best]
    return MergeReport(
        output_dir=output_dir,
        base=best,
        dtype=_names(chosen.merged.dtypes),
        difference=chosen.difference,
        divergences={name: c.divergence for name, c in tried.items() if c.divergence is not None},
        whole=chosen.merged.whole,
        left_out=chosen.merged.left_out,
        untied=chosen.merged.untied,
    )


def _tokenizer(plan: MergePlan) -> PreTrainedTokenizerBase | None:
    """Return the last adapter's tokenizer, chat template included, or the base's; `None` if neither has one."""
    for folder in (plan.adapters[-1], plan.folder):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=plan.trust_remote_code
            )
            return tokenizer
    return None


def _write_companions(plan: MergePlan, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names = ["generation_config.json", *(path.name for path in plan.folder.glob("*.py"))]
    for name in names:
        if (plan.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(plan.folder / name, folder / name)


def _keep(target: Path, chosen: Path) -> None:
    """Leave the chosen folder's files in `target`, and nothing else."""
    for path in list(target.iterdir()):
        if path != chosen:
            shutil.rmtree(path)
    for path in list(chosen.iterdir()):
        path.rename(target / path.name)
    chosen.rmdir()


def _describe(folder: Path, plan: MergePlan, report: MergeReport) -> None:
    manifest = {
        "base": plan.name,
        "merged_into": report.base,
        "adapters": [str(adapter) for adapter in plan.adapters],
        "dtype": report.dtype,
        "num_tensors": len(tensor_names(folder)),
        "runs": [read_manifest(adapter) for adapter in plan.adapters],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, report), encoding="utf-8")
