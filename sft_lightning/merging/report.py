"""What a merge did and measured: the report, and the model card that is written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_lightning.merging.plan import MergePlan
from sft_lightning.models.adapters.folder import method_name, read_config
from sft_lightning.models.adapters.trained_base import read_manifest

MergeBase = Literal["original", "dequantized"]
"""What adapters are merged into: the base as it is stored, or the values that were left after quantization."""


@dataclass(frozen=True)
class LogitDifference:
    """How the merged folder, loaded again, answers a probe."""

    largest: float
    """Largest absolute difference between the logits of the merged and of the adapted model."""

    scale: float
    """Largest absolute logit of the adapted model."""

    moved: float
    """Largest absolute difference between the logits of the merged and of the base model: the adapters' effect."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    output_dir: Path
    """The folder that was written."""

    base: MergeBase
    """What the adapters were merged into."""

    dtype: str
    """Types of the written weights, separated by commas."""

    difference: LogitDifference | None
    """The verification; `None` if it was switched off."""

    num_verified: int = 0
    """Weights that were computed again from the files of base and adapters; 0 for methods other than plain LoRA."""

    divergences: Mapping[MergeBase, float]
    """For a base that was quantized in training: KL(trained ‖ merged) in nats per token, for each base tried."""

    whole_model_reason: str | None
    """Why the whole model had to be in memory; `None` if the base was read shard by shard."""

    left_out: Sequence[str]
    """Tensors of the base's files that the model does not have."""

    untied: bool
    """Whether the head is no longer tied to the input embedding."""

    format: Literal["huggingface", "pth"]
    """Layout of the folder."""

    unverified: str | None = None
    """Why it is not known whether this is the base that the adapter was trained on; `None` if it is."""


def model_card(plan: MergePlan, report: MergeReport) -> str:
    """Return the text of the merged model's `README.md`, with the Hub's front matter.

    Args:
        plan: The merge plan.
        report: What the merge did.
    """
    parts = [_front_matter(plan, report), f"# {report.output_dir.name}", _origin(plan, report), _measured(report)]
    parts += [_training_run(adapter) for adapter in plan.adapters]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_folder_of(adapter: Path) -> Path | None:
    """Return the run folder that contains an adapter folder, one or two levels up; `None` if there is none."""
    parents = adapter.resolve().parents
    return next((folder for folder in parents[:2] if (folder / "config.yaml").is_file()), None)


def _front_matter(plan: MergePlan, report: MergeReport) -> str:
    library = [] if report.format == "pth" else ["library_name: transformers"]
    lines = ["---", *library, "pipeline_tag: text-generation"]
    if not Path(plan.name).exists() and plan.name.count("/") == 1:
        lines.append(f"base_model: {plan.name}")
    return "\n".join([*lines, "tags:", "- sft_lightning", "- merged", "---"])


def _origin(plan: MergePlan, report: MergeReport) -> str:
    into = "its original weights" if report.base == "original" else "its weights as quantized in training"
    name = Path(plan.name).name if Path(plan.name).exists() else plan.name
    first = f"`{name}`, merged into {into} in float32 and rounded once to {report.dtype}, with:"
    return "\n".join([first, "", *(f"- {_describe_adapter(adapter)}" for adapter in plan.adapters)])


def _describe_adapter(folder: Path) -> str:
    config: Any = read_config(folder)
    facts = [method_name(config)]
    facts += [f"{key} {getattr(config, key)}" for key in ("r", "lora_alpha") if getattr(config, key, None) is not None]
    facts += [key for key in ("use_dora", "use_rslora") if getattr(config, key, False)]
    targets = getattr(config, "target_modules", None)
    if targets:
        facts.append("on " + (targets if isinstance(targets, str) else ", ".join(sorted(targets))))
    if getattr(config, "modules_to_save", None):
        facts.append("with " + ", ".join(sorted(config.modules_to_save)) + " trained in full")
    return f"{folder.name}: {', '.join(facts)}"


def _measured(report: MergeReport) -> str:
    lines = []
    if report.format == "pth":
        lines.append(
            "The weights are in Meta's own layout (`consolidated.NN.pth`, `params.json`); their values are unchanged."
        )
    if report.difference is not None:
        lines.append(
            f"Loaded again, its logits differ from those of the base under its adapters by at most "
            f"{report.difference.largest:.1e} on a probe; the largest logit is {report.difference.scale:.1f}."
        )
    if report.num_verified:
        lines.append(f"{report.num_verified} weights, computed again from the files, are base + alpha / r · B A.")
    for base, divergence in report.divergences.items():
        lines.append(f"KL(trained ‖ merged into the {base} base) = {divergence:.2e} nats per token.")
    return "\n".join(lines)


def _training_run(adapter: Path) -> str:
    """Return the adapter's run as a table, and its data as another if the run's folder is there."""
    manifest = read_manifest(adapter)
    if not manifest:
        return ""
    shown = ("task", "template", "optimizer_steps", "epoch", "dtype", "quantization")
    rows = [f"| {key} | {manifest[key]} |" for key in shown if manifest.get(key) is not None]
    return "\n".join([f"## Training: {adapter.name}", "", "| | |", "|---|---|", *rows, *_data_table(adapter)])


def _data_table(adapter: Path) -> list[str]:
    folder = run_folder_of(adapter)
    if folder is None or not (folder / "data_report.json").is_file():
        return []
    sources = json.loads((folder / "data_report.json").read_text(encoding="utf-8")).get("sources", {})
    columns = ("records", "examples", "tokens", "supervised_tokens")
    table = ["", f"| source | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    return [*table, *(f"| {name} | {' | '.join(str(s.get(c, '')) for c in columns)} |" for name, s in sources.items())]
