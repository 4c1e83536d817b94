from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.compat.dynamo import num_compiled_graphs
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


SAME_WIDTH = [[5, 7], [3, 3, 6], [12]]


def losses_and_gradients(model: Any, documents: list[list[int]] = DOCUMENTS) -> tuple[list[float], list[torch.Tensor]]:
    losses = []
    for number, lengths in enumerate(documents):
        width = sum(lengths)
        ids = torch.randint(50, (1, width), generator=torch.Generator().manual_seed(number))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        out = model(input_ids=ids, position_ids=positions, document_lengths=[lengths], labels=ids, use_cache=False)
        out.loss.backward()
        losses.append(float(out.loss.detach()))
    return losses, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_compiled_layers_have_the_same_losses_and_gradients(mode: str, recompute: int) -> None:
    base = llama()
    model: Any = base
    if mode == "lora":
        model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=0.0))
    names = list(model.state_dict())
    expected = losses_and_gradients(copy.deepcopy(model))
    if recompute:
        enable_gradient_checkpointing(base, recompute)
    assert compile_layers(base, print) == 3
    assert list(model.state_dict()) == names
    losses, gradients = losses_and_gradients(model)
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert len(gradients) == len(expected[1]) > 0
    for one, other in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_all_layers_share_the_same_graphs_recomputed_or_not(recompute: int) -> None:
    expected, _ = losses_and_gradients(llama(), SAME_WIDTH)
    model, lines = llama(), []
    if recompute:
        enable_gradient_checkpointing(model, recompute)
    compile_layers(model, lines.append, backend="eager")
    before = num_compiled_graphs()
    losses, _ = losses_and_gradients(model, SAME_WIDTH)
    assert num_compiled_graphs() - before == (2 if recompute == 2 else 1)  # of recomputed layers, and of the others
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [line.partition(" graphs")[0][:-2] for line in lines] == ["torch_compile: 3 decoder layers share"]
    assert losses == expected


def test_a_recompilation_after_the_first_micro_batch_is_reported() -> None:
    model, lines = llama(), []
    compile_layers(model, lines.append, backend="eager")
    losses_and_gradients(model, [[12], [12]])
    recomputable_layers(model)[0].input_layernorm.weight.requires_grad_(False)
    losses_and_gradients(model, [[12], [12]])
    assert len(lines) == 2
    assert re.fullmatch(
        r"torch_compile: \d recompilations in micro-batch 3, [\d.]+ s; TORCH_LOGS=recompiles .*", lines[1]
    )


def test_evaluation_is_not_compiled() -> None:
    model, lines = llama(), []
    compile_layers(model, lines.append, backend="eager")
    before = num_compiled_graphs()
    losses_and_gradients(model.eval(), SAME_WIDTH)
    with torch.no_grad():
        model.train()(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    assert num_compiled_graphs() == before
    assert lines == []


def test_a_run_that_compiles_nothing_says_so() -> None:
    model, lines = llama(), []
    compile_layers(model, lines.append, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        losses_and_gradients(model, SAME_WIDTH)
    assert lines == ["torch_compile: nothing was compiled; TORCH_LOGS=graph_breaks says why, or set false"]


def test_a_compilation_that_fails_is_said_once_and_the_run_goes_on() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such instruction")

    expected, _ = losses_and_gradients(llama(), SAME_WIDTH)
    model, lines = llama(), []
    compile_layers(model, lines.append, backend=broken)
    losses, _ = losses_and_gradients(model, SAME_WIDTH)
    assert losses == expected
    assert len(lines) == 1
    assert re.match(r"torch_compile: failed, layers run without it \(BackendCompilerFailed: .*no such instr", lines[0])


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights() -> None:
    model = llama()
    compile_layers(model, print, backend="eager")
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    losses, _ = losses_and_gradients(copied, [[12]])
    assert losses == pytest.approx([math.log(50)])


def test_a_model_without_layers_to_compile_is_refused() -> None:
    class Bare(type(llama())):  # type: ignore[misc]
        def modules(self) -> Any:
            return iter(())

    model = llama()
    model.__class__ = Bare
    assert not recomputable_layers(model)
    with pytest.raises(UserError, match=r"model.torch_compile: not available for this llama model"):
        compile_layers(model, print)
