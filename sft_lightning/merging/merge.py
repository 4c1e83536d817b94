"""Adapters into their base: a plain Hugging Face folder, proven by loading it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from sft_lightning.errors import UserError
from sft_lightning.merging.base import MergePlan, plan_merge
from sft_lightning.merging.checks import Difference, Trained, ask_trained, check_answers
from sft_lightning.merging.companions import copy_companions, describe, load_tokenizer, rearrange_for_meta
from sft_lightning.merging.meta_checkpoint import check_meta_format
from sft_lightning.merging.peft_reference import load_float32, reference_logits
from sft_lightning.merging.report import BaseName, MergeReport
from sft_lightning.merging.stream import Merged, merge_weights
from sft_lightning.models.adapters.folder import AdapterError
from sft_lightning.models.base.quantization import QuantizationConfig
from sft_lightning.models.base.weight_files import parse_size
from sft_lightning.models.export.write import replaced_folder
from sft_lightning.models.inspection import max_positions
from sft_lightning.models.probing import answers, logits_of, mean_divergence, random_ids


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge.

    Raises:
        UserError: If the size is none, or the number of files is of another format.
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

    format: Literal["huggingface", "pth"] = "huggingface"
    """`pth`: a Llama as Meta's own code reads it, `consolidated.NN.pth` and `params.json`."""

    model_parallel_size: int = 1
    """Of `pth`: into how many files the weights are divided, one for each GPU that Meta's code runs on."""

    verify: bool = True
    """Load the result again and compare it with the base under its adapters. This takes memory for the whole model in
    float32, which merging itself does not."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)
        if self.model_parallel_size != 1 and self.format != "pth":
            raise UserError(
                f"merge --model_parallel_size: {self.model_parallel_size} is of --format pth, and the format is "
                f"{self.format}; remove it, or set the format"
            )


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
    try:
        return _merge(adapters, Path(output_dir), options, rows)
    except AdapterError as error:
        raise UserError(f"merge --adapter: {error}") from error


def _merge(
    adapters: Sequence[str], output_dir: Path, options: MergeOptions, rows: Sequence[Sequence[int]] | None
) -> MergeReport:
    plan = plan_merge(
        adapters,
        model_name_or_path=options.model_name_or_path,
        quantization=options.quantization,
        dtype=None if options.dtype == "auto" else options.dtype,
        max_shard_size=parse_size(options.max_shard_size),
        trust_remote_code=options.trust_remote_code,
    )
    if options.format == "pth":
        check_meta_format(plan.config, plan.vocab_sizes[-1], options.model_parallel_size)
    choices = _choices(plan, options)
    tokenizer = load_tokenizer(plan)
    with replaced_folder(output_dir) as target:
        trained = ask_trained(plan, choices, tokenizer, rows)
        tried = {
            choice: _try(plan, target / choice, trained, choice, tokenizer, verify=options.verify) for choice in choices
        }
        best = min(tried, key=lambda choice: tried[choice].divergence or 0) if options.base == "auto" else options.base
        report = _report(output_dir, options, best, tried)
        _keep(target, tried[best].folder)
        describe(target, plan, report)
        if options.format == "pth":
            rearrange_for_meta(plan, target, tried[best].merged.config, options.model_parallel_size)
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
    copy_companions(plan, folder, tokenizer)
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


def _report(
    output_dir: Path, options: MergeOptions, best: BaseName, tried: Mapping[BaseName, _Candidate]
) -> MergeReport:
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
        format=options.format,
    )


def _keep(target: Path, chosen: Path) -> None:
    """Leave the chosen folder's files in `target`, and nothing else."""
    for path in list(target.iterdir()):
        if path != chosen:
            shutil.rmtree(path)
    for path in list(chosen.iterdir()):
        path.rename(target / path.name)
    chosen.rmdir()
