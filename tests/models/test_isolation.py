from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.isolation import Isolation, measure_isolation, verify_isolation

CPU = torch.device("cpu")


def load(folder: Path, implementation: str) -> PreTrainedModel:
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation=implementation
    )
    return model.eval()


class Leaking(torch.nn.Module):
    """Passes neither positions nor lengths on, as a model without packed attention would."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.inner = load(folder, "sdpa")

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_model_whose_documents_do_not_see_each_other_is_verified(model_dir: Path) -> None:
    assert verify_isolation(load(model_dir, PACKED), 300, CPU) < 1e-5


@pytest.mark.parametrize("max_length", [1, 32, 100, 4096])
def test_the_measured_document_is_at_the_end_of_the_row_within_the_models_context(
    max_length: int, model_dir: Path
) -> None:
    found = measure_isolation(load(model_dir, PACKED), 300, CPU, max_length=max_length)
    assert found.verified
    assert found.difference < 1e-5


def test_a_model_whose_documents_see_each_other_is_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"packed documents see each other.*data.packing: none.*data.packing: auto"):
        verify_isolation(Leaking(model_dir), 300, CPU)


def test_a_chosen_attention_that_leaks_is_named_with_what_to_set(model_dir: Path) -> None:
    class LeakingLlama(type(load(model_dir, "eager"))):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids)

    model = load(model_dir, "eager")
    model.__class__ = LeakingLlama
    with pytest.raises(UserError, match=r"llama, attention eager.*model.attn_implementation: auto"):
        verify_isolation(model, 300, CPU)


def test_a_measurement_that_is_not_a_number_is_not_verified() -> None:
    assert not Isolation(leak=float("nan"), difference=0.0, tolerance=1.0).verified
    assert not Isolation(leak=0.0, difference=float("nan"), tolerance=1.0).verified
    assert not Isolation(leak=0.0, difference=0.0, tolerance=float("nan")).verified


def test_the_measurement_does_not_change_the_models_mode(model_dir: Path) -> None:
    model = load(model_dir, PACKED).train()
    verify_isolation(model, 300, CPU)
    assert model.training


@pytest.fixture
def with_outliers(model_dir: Path, tmp_path: Path) -> PreTrainedModel:
    """In 8 bits, with activations above LLM.int8's threshold in some columns, as every real model has them."""
    plain = load(model_dir, "eager")
    for layer in plain.model.layers:
        layer.input_layernorm.weight.data *= 2  # some tokens exceed 6 in some columns
    plain.save_pretrained(tmp_path / "outliers")
    eight = QuantizationConfig(bits=8)
    return load_quantized(str(tmp_path / "outliers"), eight, dtype=torch.float32, attn_implementation=PACKED).eval()


def test_outlier_columns_of_an_8_bit_model_do_not_count_as_a_leak(with_outliers: PreTrainedModel) -> None:
    ids = torch.randint(300, (2, 1, 64), generator=torch.Generator().manual_seed(0))
    rows = [torch.cat([row[:, :32], ids[0][:, 32:]], 1) for row in ids]
    one, other = (with_outliers(row, document_lengths=[[32, 32]]).logits[:, 32:] for row in rows)
    assert not torch.equal(one, other), "there are no outliers to choose columns by"
    assert measure_isolation(with_outliers, 300, CPU, max_length=64).verified
    thresholds = {module.state.threshold for module in with_outliers.modules() if isinstance(module, Linear8bitLt)}
    assert thresholds == {6.0}


def test_an_8_bit_model_whose_documents_see_each_other_is_refused(with_outliers: PreTrainedModel) -> None:
    class LeakingLlama(type(with_outliers)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids)

    with_outliers.__class__ = LeakingLlama
    assert not measure_isolation(with_outliers, 300, CPU, max_length=64).verified
