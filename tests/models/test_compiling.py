from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.checkpointing import enable_gradient_checkpointing, recomputable_layers
from sft_lightning.models.compiling import compile_layers

DOCUMENTS = [[5, 7], [3, 3, 6], [12], [2, 8, 2], [20], [1, 2, 3, 4, 5], [4, 9], [6, 6, 6], [30], [31], [9, 9, 2]]
"""Rows of more shapes than torch compiles before it gives up (8)."""


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    return model.train()


def losses_and_gradients(model: Any) -> tuple[list[float], list[torch.Tensor]]:
    losses = []
    for number, lengths in enumerate(DOCUMENTS):
        width = sum(lengths)
        ids = torch.randint(50, (1, width), generator=torch.Generator().manual_seed(number))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        out = model(input_ids=ids, position_ids=positions, document_lengths=[lengths], labels=ids, use_cache=False)
        out.loss.backward()
        losses.append(float(out.loss))
    return losses, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_compiled_layers_have_the_same_losses_and_gradients(mode: str, recompute: int) -> None:
    torch._dynamo.reset()
    base = llama()
    model: Any = base
    if mode == "lora":
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=0.0))
    names = list(model.state_dict())
    expected = losses_and_gradients(copy.deepcopy(model))
    if recompute:
        enable_gradient_checkpointing(base, recompute)
    assert compile_layers(base) == 3
    assert list(model.state_dict()) == names
    losses, gradients = losses_and_gradients(model)
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert len(gradients) == len(expected[1]) > 0
    for one, other in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_layers_and_rows_share_one_compilation() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llama()
    compile_layers(model)
    losses_and_gradients(model)
    # Before and after attention, each perhaps once more for a shape that is special.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_a_model_without_layers_to_compile_is_refused() -> None:
    class Bare(type(llama())):  # type: ignore[misc]
        def modules(self) -> Any:
            return iter(())

    model = llama()
    model.__class__ = Bare
    assert not recomputable_layers(model)
    with pytest.raises(UserError, match=r"model.torch_compile: not available for this llama model"):
        compile_layers(model)
