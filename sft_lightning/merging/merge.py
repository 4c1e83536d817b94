"""Merge adapters into their base: a plain Hugging Face folder, verified by loading it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedTokenizerBase

from sft_lightning.errors import UserError
from sft_lightning.merging.checks.weights import verify_weights
from sft_lightning.merging.companions import (
    MERGED_INTO,
    convert_to_meta_layout,
    load_merged_tokenizer,
    write_companions,
    write_manifest_and_card,
)
from sft_lightning.merging.meta_checkpoint import check_meta_format
from sft_lightning.merging.peft_reference import compare_with_reference, load_float32, reference_logits
from sft_lightning.merging.plan import MergePlan, plan_merge
from sft_lightning.merging.quantized import TrainedModel, load_trained_model
from sft_lightning.merging.report import LogitDifference, MergeBase, MergeReport
from sft_lightning.merging.stream import MergedWeights, merge_weights
from sft_lightning.models.adapters.folder import AdapterError
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.export.fingerprint import bit_sum
from sft_lightning.models.export.target import check_target, replaced_folder
from sft_lightning.models.inspection import max_positions
from sft_lightning.models.probing import logits_of, mean_divergence, next_token_log_probs, random_ids


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How to merge.

    Raises:
        UserError: If the size cannot be read, or `model_parallel_size` does not fit the format.
    """

    model_name_or_path: str | None = None
    """Base model; default: the one that the adapters name."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """For an adapter trained on a quantized base: merge into the `original` weights, or into the `dequantized` ones
    that it was trained on; `auto` measures both and keeps the one that diverges less from the trained model."""

    quantization: QuantizationConfig | None = None
    """How the base was quantized in training; default: as the adapter's `run_manifest.json` says."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights; `auto` keeps the type that the base stores for each."""

    max_shard_size: str = "5GB"
    """Largest file of weights, such as 5GB or 500MB."""

    format: Literal["huggingface", "pth"] = "huggingface"
    """`pth`: a Llama in the layout of Meta's own code, `consolidated.NN.pth` and `params.json`."""

    model_parallel_size: int = 1
    """With `format` pth: number of files that the weights are divided into, one for each GPU that Meta's code uses."""

    verify: bool = True
    """Load the result again and compare it with the base under its adapters. This takes memory for the whole model in
    float32; merging itself does not."""

    overwrite: bool = False
    """Replace the folder of an earlier merge. Any other folder that is not empty is refused."""

    trust_remote_code: bool = False
    """Run code that comes with the model, or that the `config.yaml` of the adapter's run names."""

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)
        if self.model_parallel_size != 1 and self.format != "pth":
            raise UserError(
                f"merge --model_parallel_size: {self.model_parallel_size} is only valid with --format pth (got "
                f"{self.format}); remove it, or set the format"
            )


def parse_size(size: str) -> int:
    """Return the bytes of a size such as `5GB`, `500MB` or `2GiB`; a plain number is bytes.

    Raises:
        UserError: If it is not a size above zero.
    """
    try:
        # In upper case: for accelerate, a small b is bits.
        num_bytes = int(size) if size.isdecimal() else convert_file_size_to_int(size.upper())
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise UserError(f"merge --max_shard_size: must be a size such as 5GB or 500MB (got {size!r})")
    return num_bytes


@dataclass
class _Candidate:
    """The adapters merged into one of the bases."""

    folder: Path
    weights: MergedWeights
    num_verified: int = 0
    difference: LogitDifference | None = None
    divergence: float | None = None
    bits: list[int] = field(default_factory=list)  # of the quantized weights in the model that was measured


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
        output_dir: Folder to write, as a whole or not at all.
        options: How to merge.
        rows: Token ids of the user's data, to measure divergence on; default: a few built-in texts.

    Raises:
        UserError: If a folder is not an adapter, or does not fit its base or the options, or if writing `output_dir`
            would delete anything but an earlier merge.
        RuntimeError: If the merged model, loaded again, has other logits than the adapted one, or a merged weight is
            not that of the base plus its update.
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
    check_target(
        output_dir,
        option="merge --output_dir",
        written_by=MERGED_INTO,
        inputs=[*plan.adapters, plan.folder],
        overwrite=options.overwrite,
    )
    if options.format == "pth":
        check_meta_format(plan.config, plan.vocab_sizes[-1], options.model_parallel_size)
    bases = _bases_to_try(plan, options)
    tokenizer = load_merged_tokenizer(plan)
    with replaced_folder(output_dir) as target:
        trained = load_trained_model(plan, bases, tokenizer, rows)
        tried = {
            base: _merge_into(plan, target / base, trained, base, tokenizer, verify=options.verify) for base in bases
        }
        _check_apart(tried)
        best = min(tried, key=lambda base: tried[base].divergence or 0) if options.base == "auto" else options.base
        report = replace(_report(output_dir, options, best, tried), unverified=plan.unverified)
        _keep_only(target, tried[best].folder)
        write_manifest_and_card(plan, target, report)
        if options.format == "pth":
            convert_to_meta_layout(plan, target, tried[best].weights.config, options.model_parallel_size)
    return report


def _bases_to_try(plan: MergePlan, options: MergeOptions) -> list[MergeBase]:
    """Return the bases to merge into: both, to compare them, if the adapter was trained on a quantized base."""
    if plan.quantization is None:
        if options.base == "dequantized":
            raise UserError(
                "merge --base: dequantized requires an adapter that was trained on a quantized base, but the run "
                f"manifest of {str(plan.adapters[-1])!r} does not say how it was quantized; say so, for instance with "
                "--quantization.bits 4, or use --base original"
            )
        return ["original"]
    measured = options.verify and len(plan.adapters) == 1
    if options.base == "auto" and not measured:
        why = "no single trained model has all adapters" if options.verify else "--verify is false"
        raise UserError(f"merge --base: auto cannot compare the bases, because {why}; set original or dequantized")
    return ["original", "dequantized"] if measured or options.base == "auto" else [options.base]


def _merge_into(
    plan: MergePlan,
    folder: Path,
    trained: TrainedModel,
    base: MergeBase,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    verify: bool,
) -> _Candidate:
    """Write the model merged into one base, and measure it."""
    folder.mkdir()
    quantized = trained.base if base == "dequantized" else None
    candidate = _Candidate(folder, merge_weights(plan, folder, quantized))
    write_companions(plan, folder, tokenizer)
    if verify:
        probe = random_ids(plan.vocab_sizes[1], rows=2, length=min(32, max_positions(plan.config)))
        reference = reference_logits(plan, quantized, probe, candidate.weights.dtypes)
        model = load_float32(folder, plan)  # compares the written weights, without the rounding of a coarser type
        candidate.difference = compare_with_reference(reference, logits_of(model, probe))
        if trained.log_probs:
            candidate.divergence = mean_divergence(trained.log_probs, next_token_log_probs(model, trained.rows))
            names = [] if trained.base is None else trained.base.names
            candidate.bits = [int(bit_sum(model.get_parameter(name))) for name in names]
    candidate.num_verified = verify_weights(plan, folder, base, trained.base)
    return candidate


def _check_apart(tried: Mapping[MergeBase, _Candidate]) -> None:
    """Check that two divergences were measured on two models.

    Raises:
        RuntimeError: If all quantized weights of both are the same.
    """
    measured = [candidate.bits for candidate in tried.values() if candidate.divergence is not None]
    if len(measured) == 2 and measured[0] == measured[1]:
        raise RuntimeError(
            "the original and the dequantized base gave the same merged weights, so their divergences compare nothing; "
            "nothing was written"
        )


def _type_names(dtypes: Mapping[str, torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))


def _report(
    output_dir: Path, options: MergeOptions, best: MergeBase, tried: Mapping[MergeBase, _Candidate]
) -> MergeReport:
    chosen = tried[best]
    return MergeReport(
        output_dir=output_dir,
        base=best,
        dtype=_type_names(chosen.weights.dtypes),
        difference=chosen.difference,
        num_verified=chosen.num_verified,
        divergences={base: c.divergence for base, c in tried.items() if c.divergence is not None},
        whole_model_reason=chosen.weights.whole_model_reason,
        left_out=chosen.weights.left_out,
        untied=chosen.weights.untied,
        format=options.format,
    )


def _keep_only(target: Path, chosen: Path) -> None:
    """Move the chosen folder's files up into `target`, and delete everything else in it."""
    for path in list(target.iterdir()):
        if path != chosen:
            shutil.rmtree(path)
    for path in list(chosen.iterdir()):
        path.rename(target / path.name)
    chosen.rmdir()
