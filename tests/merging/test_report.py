from __future__ import annotations

import json
from pathlib import Path

from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.report import run_folder_of


def test_the_model_card_describes_adapters_verification_run_and_data(
    adapter: Path, model_dir: Path, tmp_path: Path
) -> None:
    (adapter / "run_manifest.json").write_text(json.dumps({"template": "alpaca", "optimizer_steps": 7}))
    (tmp_path / "config.yaml").touch()
    sources = {"train/toy": {"records": 24, "examples": 23, "tokens": 99, "supervised_tokens": 9}}
    (tmp_path / "data_report.json").write_text(json.dumps({"sources": sources}))
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    card = (tmp_path / "merged/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{model_dir.name}`, merged into its original weights in float32 and rounded once to float32" in card
    assert "LORA, r 2, lora_alpha 32" in card
    assert report.difference is not None
    assert f"at most {report.difference.largest:.1e}" in card
    assert "| template | alpaca |" in card
    assert "| train/toy | 24 | 23 | 99 | 9 |" in card
    assert str(model_dir) not in card


def test_without_verification_the_card_claims_none(adapter: Path, tmp_path: Path) -> None:
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(verify=False))
    assert report.difference is None
    assert "Loaded again" not in (tmp_path / "merged/README.md").read_text()


def test_the_run_of_an_adapter_is_found_one_or_two_folders_up(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert run_folder_of(tmp_path / "run" / "adapter") == tmp_path / "run"
    assert run_folder_of(tmp_path / "run" / "checkpoints" / "adapter") == tmp_path / "run"
    assert run_folder_of(tmp_path / "run" / "a" / "b" / "adapter") is None
