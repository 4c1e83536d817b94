from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from sft_lightning.compat.dynamo import num_compiled_graphs
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.checkpointing import Recomputation, enable_gradient_checkpointing, recomputable_layers
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


SAME_WIDTH = [[5, 7], [3, 3, 6], [12], [2, 2, 2, 6]]


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


@pytest.mark.parametrize("how", [0, 1, pytest.param(2, marks=pytest.mark.slow), "selective"])
def test_all_layers_and_rows_of_one_width_share_a_graph_recomputed_or_not(how: Recomputation) -> None:
    expected, _ = losses_and_gradients(llama(), SAME_WIDTH)
    model, lines = llama(), []
    if how:
        enable_gradient_checkpointing(model, how)
    compile_layers(model, lines.append, recomputation=how, backend="eager")
    before = num_compiled_graphs()
    losses, _ = losses_and_gradients(model, SAME_WIDTH)
    graphs = 2 if how == 2 else 1  # one each of the layers that are recomputed, and of those that are not
    assert num_compiled_graphs() - before == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [line.partition(" (")[0] for line in lines] == [f"torch_compile: graphs of 3 decoder layers: {graphs}"]
    assert losses == expected


@pytest.mark.slow
def test_selective_recomputation_keeps_less_in_compiled_layers_too_and_changes_no_gradient() -> None:
    def kept_and_gradients(how: Recomputation) -> tuple[int, list[torch.Tensor]]:
        model = llama()
        if how:
            enable_gradient_checkpointing(model, how)
        compile_layers(model, print, recomputation=how, backend="aot_eager_decomp_partition")
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _, gradients = losses_and_gradients(model, [[40]])
        return sum(kept.values()), gradients

    (everything, expected), (selective, gradients) = kept_and_gradients(0), kept_and_gradients("selective")
    assert selective < everything
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


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


def test_a_decoder_that_its_model_calls_by_another_way_is_compiled_and_reported() -> None:
    config = OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    model, lines = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED).train(), []
    compile_layers(model, lines.append, backend="eager")
    losses_and_gradients(model, SAME_WIDTH[:2])
    assert [line.partition(" (")[0] for line in lines] == ["torch_compile: graphs of 2 decoder layers: 1"]


def test_layers_are_compiled_once_however_often_a_model_is_trained() -> None:
    model, lines = llama(), []
    for _ in range(2):
        assert compile_layers(model, lines.append, backend="eager") == 3
        losses_and_gradients(model, [[12], [12]])
    assert len(lines) == 1


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


@pytest.mark.slow
@pytest.mark.parametrize("how", [0, 1, "selective"])
def test_qlora_layers_are_one_graph_each_recomputed_or_not(how: Recomputation, model_dir: Path) -> None:
    base = load_model(
        str(model_dir), from_config=None, dtype="float32", attn_implementation="auto", vocab_size=0,
        quantization=QuantizationConfig(),
    )  # fmt: skip
    model: Any = add_adapter(base, AdapterConfig(r=4, dropout=0.0)).train()
    if how:
        enable_gradient_checkpointing(base, how)
    compile_layers(base, print, recomputation=how, backend="eager")
    before = num_compiled_graphs()
    losses_and_gradients(model, SAME_WIDTH)
    # The first layer's input has no gradient unless layers are recomputed: another graph.
    assert num_compiled_graphs() - before == (1 if how else 2)
