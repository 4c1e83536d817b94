from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.export.stopping import write_stop_tokens
from sft_lightning.training.checks.exported_tokenizer import check_tokenizer


@pytest.fixture
def data(model_dir: Path, alpaca_file: Path) -> SFTDataModule:
    sources = {"toy": SourceConfig(path=str(alpaca_file))}
    return SFTDataModule(DataSpec(sources=sources, template="vicuna_v1.1", tokenizer_name_or_path=str(model_dir)))


def export(data: SFTDataModule, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, stop: int = 2) -> None:
    _ = data.template  # binds the chat template
    (tokenizer or data.tokenizer).save_pretrained(folder)
    write_stop_tokens(folder, GenerationConfig(eos_token_id=1), [stop])


def test_the_exported_tokenizer_renders_as_in_training(data: SFTDataModule, tmp_path: Path) -> None:
    export(data, tmp_path)
    check = check_tokenizer(tmp_path, data)
    assert check.passed, check.figure
    assert "2 prompts of" in check.figure


def test_a_missing_template_and_another_one_are_found(data: SFTDataModule, tmp_path: Path) -> None:
    other = copy.deepcopy(data.tokenizer)
    for template, said in ((None, "0 tokens"), ("{{ bos_token }}{{ messages[-1]['content'] }}", "in training")):
        other.chat_template = template
        folder = tmp_path / str(bool(template))
        export(data, folder, other)
        check = check_tokenizer(folder, data)
        assert check.passed is False
        assert "a prompt is served as other tokens than in training" in check.figure
        assert said in check.figure


def test_a_configuration_that_does_not_stop_is_found(data: SFTDataModule, tmp_path: Path) -> None:
    export(data, tmp_path, stop=5)
    check = check_tokenizer(tmp_path, data)
    assert check.passed is False
    assert "does not end answers at '</s>' (eos_token_id [5, 1])" in check.figure


def test_a_template_that_writes_the_date_is_not_compared(data: SFTDataModule, tmp_path: Path) -> None:
    export(data, tmp_path)
    data.tokenizer.chat_template = "{{ strftime_now('%d') }}"
    assert check_tokenizer(tmp_path, data).passed is None


def test_plain_documents_are_compared_without_a_template(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    sources = {"toy": SourceConfig(path=str(alpaca_file))}
    data = SFTDataModule(DataSpec(task="pretrain", sources=sources, tokenizer_name_or_path=str(model_dir)))
    export(data, tmp_path)
    assert check_tokenizer(tmp_path, data).passed
