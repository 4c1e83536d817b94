from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.checkpointing import (
    activation_gib,
    decide_checkpointing,
    enable_gradient_checkpointing,
    free_memory_gib,
    recomputable_layers,
)

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


def test_a_7b_models_activations_grow_with_tokens_as_published() -> None:
    per_token = activation_gib(LLAMA_7B, tokens=1, bytes_per_value=2) * 2**30
    assert per_token == pytest.approx(2 * 4.2e6, rel=0.1)
    assert activation_gib(LLAMA_7B, tokens=64, bytes_per_value=2) == pytest.approx(64 * per_token / 2**30)


@pytest.mark.parametrize(
    ("setting", "free", "enabled"),
    [("auto", 1000.0, False), ("auto", 1.0, True), (True, 1000.0, True), (False, 0.0, False)],
)
def test_auto_checkpoints_when_activations_do_not_fit(setting: bool, free: float, enabled: bool) -> None:
    decision = decide_checkpointing(setting, LLAMA_7B, tokens=4096, bytes_per_value=2, free_gib=free)
    assert decision.enabled is enabled
    assert decision.reason


def test_free_memory_is_a_positive_number() -> None:
    assert free_memory_gib(torch.device("cpu")) > 0


def llama(num_layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=num_layers, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (5, [0])])
def test_every_kth_layer_is_recomputed_from_the_first(every: int, recomputed: list[int]) -> None:
    model = llama(5)
    assert enable_gradient_checkpointing(model, every) == len(recomputed)
    flags = [layer.gradient_checkpointing for layer in recomputable_layers(model)]
    assert [number for number, flag in enumerate(flags) if flag] == recomputed


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputing_some_layers_keeps_fewer_activations_and_changes_no_gradient(every: int) -> None:
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))

    def gradients(model: Any) -> tuple[list[torch.Tensor], int]:
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [parameter.grad for parameter in model.parameters()], kept

    plain, kept_plain = gradients(llama(3))
    model = llama(3)
    enable_gradient_checkpointing(model, every)
    recomputed, kept = gradients(model)
    assert kept < kept_plain
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_recomputing_every_second_layer_changes_no_gradient_in_any_mode(mode: str, model_dir: Path) -> None:
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))

    def gradients(every: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = load_model(
            str(model_dir), from_config=None, dtype="float32", attn_implementation="auto", vocab_size=0,
            quantization=QuantizationConfig() if mode == "qlora" else None,
        )  # fmt: skip
        model = base if mode == "full" else add_adapter(base, AdapterConfig(r=4, dropout=0.0))
        if every:
            assert enable_gradient_checkpointing(base, every) == 1
        model.train()
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(None), gradients(2)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-9)


def test_the_states_of_a_state_space_models_scan_are_counted() -> None:
    config = MambaConfig(hidden_size=64, state_size=16, num_hidden_layers=2, vocab_size=100)
    of_the_scan = 2 * 12 * config.intermediate_size * 16
    assert activation_gib(config, tokens=1, bytes_per_value=2) * 2**30 > of_the_scan


def test_the_reason_names_which_layers_are_recomputed() -> None:
    decision = decide_checkpointing(3, LLAMA_7B, tokens=1, bytes_per_value=2, free_gib=1000.0)
    assert (decision.enabled, decision.every, decision.reason) == (True, 3, "every third decoder layer")


def test_a_number_above_the_number_of_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be at most 5, the number of decoder layers .* \(got 6\)"):
        enable_gradient_checkpointing(llama(5), 6)
