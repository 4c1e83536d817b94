"""The files beside the weights of a merged model: tokenizer, generation configuration, model card, manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from sft_lightning.merging.meta_checkpoint import write_meta_checkpoint
from sft_lightning.merging.plan import MergePlan
from sft_lightning.merging.report import MergeReport, model_card
from sft_lightning.models.adapters.trained_base import MANIFEST, read_manifest
from sft_lightning.models.base.weight_files import tensor_names, weight_files
from sft_lightning.models.export.stopping import generation_config_in, stop_tokens, write_stop_tokens
from sft_lightning.tokenizer import has_tokenizer

MERGED_INTO = "merged_into"
"""Key of `run_manifest.json` that only a merge writes."""


def load_merged_tokenizer(plan: MergePlan) -> PreTrainedTokenizerBase | None:
    """Return the last adapter's tokenizer with its chat template, or the base's; `None` if neither has one."""
    for folder in (plan.adapters[-1], plan.folder):
        if has_tokenizer(folder):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=plan.trust_remote_code
            )
            return tokenizer
    return None


def write_companions(plan: MergePlan, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Save the tokenizer, and copy the base's code and its generation configuration, with the adapter's stop token.

    Args:
        plan: The merge plan.
        folder: The folder of the merged model.
        tokenizer: The tokenizer; `None` for none.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names = ["generation_config.json", *(path.name for path in plan.folder.glob("*.py"))]
    for name in names:
        if (plan.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(plan.folder / name, folder / name)
    trained = generation_config_in(plan.adapters[-1])  # `None` for adapters of other trainers
    if stop_token_ids := stop_tokens(trained):
        write_stop_tokens(folder, generation_config_in(folder) or trained, stop_token_ids)


def write_manifest_and_card(plan: MergePlan, folder: Path, report: MergeReport) -> None:
    """Write `run_manifest.json` and `README.md` beside merged weights.

    Args:
        plan: The merge plan.
        folder: The folder of the merged model.
        report: What the merge did.
    """
    manifest = {
        "base": plan.name,
        "base_fingerprint": plan.fingerprint,
        MERGED_INTO: report.base,
        "adapters": [str(adapter) for adapter in plan.adapters],
        "dtype": report.dtype,
        "num_tensors": len(tensor_names(folder)),
        "runs": [read_manifest(adapter) for adapter in plan.adapters],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, report), encoding="utf-8")


def convert_to_meta_layout(plan: MergePlan, folder: Path, config: PretrainedConfig, num_ranks: int) -> None:
    """Replace transformers' weight and configuration files by Meta's, and add the SentencePiece tokenizer.

    Args:
        plan: The merge plan.
        folder: The folder of the merged model, changed in place.
        config: The merged model's configuration.
        num_ranks: Files that the weights are divided into.
    """
    write_meta_checkpoint(folder, folder, config, num_ranks=num_ranks)
    for file in [*weight_files(folder), *folder.glob("*.index.json"), *folder.glob("*config.json")]:
        if file.name != "tokenizer_config.json":
            file.unlink()
    sentencepiece = [each / "tokenizer.model" for each in (plan.adapters[-1], plan.folder)]
    if found := next((file for file in sentencepiece if file.is_file()), None):
        shutil.copyfile(found, folder / found.name)
