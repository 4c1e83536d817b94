from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.selftest.checks.export import check_export, compare
from sft_lightning.selftest.evaluation import Evaluation
from sft_lightning.selftest.short_runs import Run
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec


def evaluation(largest: float) -> Evaluation:
    return Evaluation(torch.tensor([[1.0, largest]]), 0.5)


def test_equal_logits_pass() -> None:
    assert compare(evaluation(8.0), evaluation(8.0), 1e-4).passed


def test_the_tolerance_is_relative_to_the_largest_logit() -> None:
    assert compare(evaluation(8.0), evaluation(8.0007), 1e-4).passed
    assert not compare(evaluation(8.0), evaluation(8.0009), 1e-4).passed


def test_nan_fails() -> None:
    assert not compare(evaluation(8.0), evaluation(float("nan")), 1e-4).passed


@pytest.mark.parametrize("adapter", [True, False])
def test_a_model_with_its_own_attention_is_compared_on_documents_alone(
    adapter: bool, tokenizer: PreTrainedTokenizerFast, alpaca_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bloom"
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2, initializer_range=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sources = {"toy": SourceConfig(path=str(alpaca_file))}
    data = SFTDataModule(
        DataSpec(
            sources=sources, template="alpaca", tokenizer_name_or_path=str(folder), store_dir=str(tmp_path / "stores")
        )
    )
    module = CausalLMModule(
        TrainingSpec(
            model_name_or_path=str(folder), dtype="float32", adapter=AdapterConfig(r=2) if adapter else None,
            gradient_checkpointing=False, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-2),
        )
    )  # fmt: skip
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    check = check_export(Run(module, data, trainer), tmp_path / "export")
    assert check.passed, check.figure
