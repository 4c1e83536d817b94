from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention import PACKED
from sft_lightning.models.isolation import Isolation, measure_isolation, prove_isolation

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


def test_isolation_is_proven_on_a_model_that_isolates(model_dir: Path) -> None:
    assert prove_isolation(load(model_dir, PACKED), 300, CPU) < 1e-5


@pytest.mark.parametrize("max_length", [1, 32, 100, 4096])
def test_the_proof_stands_at_the_end_of_a_row_within_the_models_positions(max_length: int, model_dir: Path) -> None:
    found = measure_isolation(load(model_dir, PACKED), 300, CPU, max_length=max_length)
    assert found.proven
    assert found.difference < 1e-5


def test_isolation_is_refused_on_a_model_that_leaks(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"packed documents see each other.*data.packing: none.*data.packing: auto"):
        prove_isolation(Leaking(model_dir), 300, CPU)


def test_a_chosen_attention_that_leaks_is_named_with_the_way_out(model_dir: Path) -> None:
    class LeakingLlama(type(load(model_dir, "eager"))):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids)

    model = load(model_dir, "eager")
    model.__class__ = LeakingLlama
    with pytest.raises(UserError, match=r"llama, attention eager.*model.attn_implementation: auto"):
        prove_isolation(model, 300, CPU)


def test_what_is_not_a_number_proves_nothing() -> None:
    assert not Isolation(leak=float("nan"), difference=0.0, tolerance=1.0).proven
    assert not Isolation(leak=0.0, difference=float("nan"), tolerance=1.0).proven
    assert not Isolation(leak=0.0, difference=0.0, tolerance=float("nan")).proven


def test_the_proof_leaves_the_models_mode_as_it_was(model_dir: Path) -> None:
    model = load(model_dir, PACKED).train()
    prove_isolation(model, 300, CPU)
    assert model.training
