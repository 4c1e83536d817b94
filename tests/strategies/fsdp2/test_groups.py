"""Which modules FSDP2 shards together, and which models it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.strategies.fsdp2.groups import (
    check_one_trainable_type,
    decoder_layers,
    mixed_precision,
    reshards_after_forward,
    shard_groups,
    shard_model,
)


def llama(**changes: object) -> PreTrainedModel:
    values = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(**values, num_key_value_heads=2, num_hidden_layers=3, **changes)
    )
    return model


def test_decoder_layers_are_found() -> None:
    model = llama()
    assert decoder_layers(model) == list(model.model.layers)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    assert decoder_layers(gpt2) == list(gpt2.transformer.h)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no list of layers; use ddp"):
        decoder_layers(nn.Linear(2, 2))


def test_an_untied_embedding_is_a_group_and_a_tied_one_is_gathered_with_the_head() -> None:
    model = llama()
    assert shard_groups(model) == [*model.model.layers, model.model.embed_tokens, model]
    tied = llama(tie_word_embeddings=True)
    assert shard_groups(tied) == [*tied.model.layers, tied]


def test_a_layer_that_trains_weights_of_two_types_is_refused_by_name() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"float32 \(0\.bias\), bfloat16 \(1\.bias\).*set model\.dtype: float32"):
        check_one_trainable_type(layer)
    layer[1].requires_grad_(False)
    check_one_trainable_type(layer)


def test_groups_are_gathered_in_the_type_of_the_precision_except_quantized_ones() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    assert mixed_precision(layer, None) == MixedPrecisionPolicy()
    policy = mixed_precision(layer, torch.bfloat16)
    assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (torch.bfloat16,) * 2 + (False,)
    quantized = nn.Sequential(nn.Linear(2, 2), Linear4bit(4, 4))
    assert mixed_precision(quantized, torch.bfloat16) == MixedPrecisionPolicy()


def test_a_model_that_takes_a_twentieth_of_a_device_stays_gathered_until_the_backward_pass() -> None:
    assert not reshards_after_forward(4.0, 100.0)
    assert reshards_after_forward(6.0, 100.0)
    assert reshards_after_forward(6.0, 0.0)  # a CPU


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("gather_dtype", [None, torch.bfloat16])
def test_a_layer_computes_in_the_gathered_type_and_learns_in_its_own(
    mesh: DeviceMesh, gather_dtype: torch.dtype | None
) -> None:
    model = llama()
    shard_model(model, mesh, torch.device("cpu"), gather_dtype=gather_dtype)
    seen: list[torch.dtype] = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(module.weight.dtype))
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=gather_dtype is not None):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert seen == [gather_dtype or torch.float32]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    if gather_dtype is None:
        torch.testing.assert_close(loss, llama_loss(model, ids))


def llama_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss of an unsharded copy of a sharded model."""
    copy = llama()
    copy.load_state_dict({name: each.full_tensor() for name, each in model.state_dict().items()})  # type: ignore[operator]
    loss: torch.Tensor = copy(ids, labels=ids).loss
    return loss


def test_each_layer_gathers_the_next_one_while_it_computes(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, nn.Module, list[Any]]] = []
    for way in ("forward", "backward"):
        name = f"set_modules_to_{way}_prefetch"
        monkeypatch.setattr(FSDPModule, name, lambda self, found, way=way: asked.append((way, self, found)))
    model = llama()
    shard_model(model, mesh, torch.device("cpu"))
    one, two, three = decoder_layers(model)
    assert asked == [
        ("forward", one, [two]), ("backward", two, [one]), ("forward", two, [three]), ("backward", three, [two]),
    ]  # fmt: skip
