from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sft_lightning.selftest.checks.gradients import Gradient, GradientRecorder, disable_randomness


def test_gradients_are_compared_by_their_norms() -> None:
    one = Gradient([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])
    other = Gradient([torch.tensor([3.0]), torch.tensor([0.5, 4.0])])
    assert one.difference(one) == 0
    assert one.difference(other) == pytest.approx(0.1)


def test_a_zero_gradient_never_passes() -> None:
    assert Gradient([torch.zeros(2)]).difference(Gradient([torch.zeros(2)])) == float("inf")


def test_the_recorder_keeps_the_gradient_and_changes_no_weight() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    gradient = Gradient()
    recorder = GradientRecorder([used, unused], gradient)
    (used * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    recorder.step()
    assert [entries.tolist() for entries in gradient.entries] == [[1.0, 2.0, 3.0], [0.0, 0.0]]
    assert used.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("size", "entries"), [(65_536, 65_536), (100_000, 50_000), (131_073, 43_691)])
def test_at_most_65536_evenly_spaced_entries_are_kept(size: int, entries: int) -> None:
    parameter, gradient = torch.nn.Parameter(torch.ones(size)), Gradient()
    parameter.grad = torch.arange(size, dtype=torch.float32)
    GradientRecorder([parameter], gradient).step()
    assert len(gradient.entries[0]) == entries
    assert gradient.entries[0][1] == -(-size // 65_536)


def test_randomness_is_disabled_in_every_layer() -> None:
    config = MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=16, num_local_experts=2, attention_dropout=0.5, router_jitter_noise=0.5, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.extra = torch.nn.Dropout(0.5)
    module: Any = SimpleNamespace(language_model=model)
    disable_randomness(module)
    rates = [
        value for layer in model.modules() for name, value in vars(layer).items()
        if isinstance(value, float) and ("dropout" in name or "jitter" in name)
    ]  # fmt: skip
    assert rates
    assert set(rates) == {0.0}
    assert model.extra.p == 0.0
    assert model.config.output_router_logits is False
