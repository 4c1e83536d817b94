from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.attention.document_mask import use_document_mask
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.checkpointing import (
    Recomputation,
    describe_recomputation,
    enable_gradient_checkpointing,
    free_memory_bytes,
    is_kept,
    recomputable_layers,
)
from sft_lightning.training.memory.tracker import StorageTracker

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
FAMILIES: dict[str, Any] = importlib.import_module("family_models").FAMILIES
sys.path.pop(0)


def test_free_memory_is_a_positive_number() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 0


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


def gradients_and_kept(how: Recomputation, num_layers: int = 3) -> tuple[list[torch.Tensor], int]:
    """The gradients of a model, and the bytes that its forward pass leaves for the backward pass."""
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    model = llama(num_layers)
    if how:
        enable_gradient_checkpointing(model, how)
    with StorageTracker(model.parameters()) as tracker:
        loss = model(ids, labels=ids, use_cache=False).loss
        kept = tracker.live
        loss.backward()
    return [parameter.grad for parameter in model.parameters()], kept


@pytest.mark.parametrize("how", [1, 2, 3, "selective"])
def test_recomputing_keeps_fewer_activations_and_changes_no_gradient(how: Recomputation) -> None:
    (plain, kept_plain), (recomputed, kept) = gradients_and_kept(0), gradients_and_kept(how)
    assert kept < kept_plain
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_selective_recomputation_keeps_more_than_a_layers_input() -> None:
    (_, everything), (_, selective), (_, inputs) = (gradients_and_kept(how) for how in (0, "selective", 1))
    assert inputs < selective < 0.8 * everything


@pytest.mark.parametrize("how", [2, "selective"])
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_recomputing_changes_no_gradient_in_any_mode(mode: str, how: Recomputation, model_dir: Path) -> None:
    ids = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))

    def gradients(how: Recomputation) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = load_model(
            str(model_dir), from_config=None, dtype="float32", attn_implementation="auto", vocab_size=0,
            quantization=QuantizationConfig() if mode == "qlora" else None,
        )  # fmt: skip
        model = base if mode == "full" else add_adapter(base, AdapterConfig(r=4, dropout=0.1))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if how:
            assert enable_gradient_checkpointing(base, how) == (2 if how == "selective" else 1)
        model.train()
        torch.manual_seed(1)
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(0), gradients(how)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-9)


def test_what_is_recomputed_is_described() -> None:
    words = [describe_recomputation(how) for how in (0, 1, 3, 7, "selective")]
    assert words[:4] == ["off", "every decoder layer", "every third decoder layer", "every 7th decoder layer"]
    assert words[4] == "selective, keeping matrix products and attention"


def test_a_number_above_the_number_of_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be at most 5, the number of decoder layers .* \(got 6\)"):
        enable_gradient_checkpointing(llama(5), 6)


def test_attention_with_dropout_is_computed_again_so_that_later_random_numbers_are_the_same() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    tensors = (torch.zeros(1),) * 3
    assert is_kept(attend, tensors, {"scale": 0.5})
    assert is_kept(attend, (*tensors, 0.0, True), {})
    assert not is_kept(attend, (*tensors, 0.1, True), {})


@pytest.mark.parametrize(
    ("name", "left", "right", "kept"),
    [
        ("mm", (9, 64), (64, 172), True),
        ("mm", (9, 64), (64, 4), True),
        ("mm", (9, 4), (4, 64), False),  # a low-rank update
        ("bmm", (2, 50, 8), (2, 8, 100), False),  # the scores of attention
        ("bmm", (2, 50, 100), (2, 100, 8), True),
        ("addmm", (9, 64), (64, 172), True),
        ("addmm", (9, 4), (4, 64), False),
        ("addmm_", (9, 4), (4, 64), True),  # in place, on an output that is kept
    ],
)
def test_products_are_kept_if_they_are_dear_for_the_size_of_their_output(
    name: str, left: tuple[int, ...], right: tuple[int, ...], kept: bool
) -> None:
    added = (torch.zeros(9, right[-1]),) if "add" in name else ()
    assert is_kept(getattr(torch.ops.aten, name).default, (*added, torch.zeros(left), torch.zeros(right)), {}) is kept


@pytest.mark.parametrize(
    "operation", [torch.ops.aten.mul.Tensor, torch.ops.aten.silu.default, torch.ops.aten.cat.default]
)
def test_what_is_cheap_is_computed_again(operation: Any) -> None:
    assert not is_kept(operation, (torch.zeros(2), torch.zeros(2)), {})


def test_a_model_that_changes_a_kept_output_in_place_is_refused() -> None:
    model = llama(1)
    recomputable_layers(model)[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: out.mul_(2))
    enable_gradient_checkpointing(model, "selective")
    with pytest.raises(UserError, match=r"selective is not available for this model, .*\(aten.mul_.*set true"):
        model(torch.ones(1, 4, dtype=torch.int64), use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=4, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_selective_recomputation_changes_no_gradient_of_any_family_or_is_refused(
    family: str, adapter: AdapterConfig | None
) -> None:
    def gradients(how: Recomputation) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = load_model(
            None, from_config=FAMILIES[family], dtype="float32", attn_implementation="auto", vocab_size=300,
            quantization=None,
        )  # fmt: skip
        model = base if adapter is None else add_adapter(base, adapter)
        use_document_mask(model)
        if how:
            enable_gradient_checkpointing(base, how)
        ids = torch.randint(100, (1, 24), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
        torch.manual_seed(1)
        out = model.train()(input_ids=ids, position_ids=positions, document_lengths=[[10, 14]], use_cache=False)
        out.logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(0)
    if family == "Falcon":  # divides the scores of attention in place
        with pytest.raises(UserError, match="selective is not available for this model"):
            gradients("selective")
        return
    found = gradients("selective")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)
