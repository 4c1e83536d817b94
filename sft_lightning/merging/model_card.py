"""The model card of a merged model: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_lightning.merging.base import MergePlan, read_manifest
from sft_lightning.merging.report import MergeReport
from sft_lightning.models.adapters.folder import read_config


def model_card(plan: MergePlan, report: MergeReport) -> str:
    """Return the text of `README.md`, as the Hub reads it."""
    parts = [_front_matter(plan, report), f"# {report.output_dir.name}", _origin(plan, report), _measured(report)]
    parts += [_run(adapter) for adapter in plan.adapters]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_folder_of(adapter: Path) -> Path | None:
    """Return the folder of the run that an adapter lies in; `None` if it lies in none."""
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
    lines = [f"`{Path(plan.name).name if Path(plan.name).exists() else plan.name}`, merged into {into} in float32 and"]
    lines[0] += f" rounded once to {report.dtype}, with:"
    return "\n".join([*lines, "", *(f"- {_adapter(adapter)}" for adapter in plan.adapters)])


def _adapter(folder: Path) -> str:
    config: Any = read_config(folder)
    facts = [str(getattr(config.peft_type, "value", config.peft_type))]
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
            "The weights are in Meta's own layout (`consolidated.NN.pth`, `params.json`), moved, not computed."
        )
    if report.difference is not None:
        lines.append(
            f"Loaded again, its logits differ from those of the base under its adapters by at most "
            f"{report.difference.largest:.1e} on a probe; the largest logit is {report.difference.scale:.1f}."
        )
    for base, divergence in report.divergences.items():
        lines.append(f"KL(trained ‖ merged into the {base} base) = {divergence:.2e} nats per token.")
    return "\n".join(lines)


def _run(adapter: Path) -> str:
    """Return the adapter's run as a table, and its data as another where the run's folder is at hand."""
    manifest = read_manifest(adapter)
    if not manifest:
        return ""
    shown = ("task", "template", "optimizer_steps", "epoch", "dtype", "quantization")
    rows = [f"| {key} | {manifest[key]} |" for key in shown if manifest.get(key) is not None]
    return "\n".join([f"## Training: {adapter.name}", "", "| | |", "|---|---|", *rows, *_data(adapter)])


def _data(adapter: Path) -> list[str]:
    folder = run_folder_of(adapter)
    if folder is None or not (folder / "data_report.json").is_file():
        return []
    sources = json.loads((folder / "data_report.json").read_text(encoding="utf-8")).get("sources", {})
    columns = ("records", "examples", "tokens", "supervised_tokens")
    table = ["", f"| source | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    return [*table, *(f"| {name} | {' | '.join(str(s.get(c, '')) for c in columns)} |" for name, s in sources.items())]
