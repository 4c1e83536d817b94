"""Full tensors from shards, and shards from full tensors, in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.strategies.full_tensors import (
    full_parameters,
    gather_optimizer_state,
    gather_parameters,
    indices_in_state,
    shard_like,
    shard_optimizer_state,
)


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(_process_group: None) -> nn.Module:
    """Two linear layers, the first frozen, sharded over one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tied_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def test_parameters_are_gathered_as_full_tensors(sharded: nn.Module) -> None:
    everything = gather_parameters(sharded, keep=True, trainable_only=False)
    assert everything.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert not any(isinstance(tensor, DTensor) for tensor in everything.values())
    assert everything["0.weight"].shape == (3, 2)
    assert gather_parameters(sharded, keep=True, trainable_only=True).keys() == {"1.weight", "1.bias"}
    assert gather_parameters(sharded, keep=False, trainable_only=False) == {}


def test_an_optimizer_state_is_the_same_after_gathering_and_sharding(sharded: nn.Module) -> None:
    optimizer = torch.optim.AdamW(sharded[1].parameters(), lr=0.1)  # type: ignore[index]
    sharded(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    gathered = gather_optimizer_state(optimizer, keep=True)
    assert not isinstance(gathered["state"][0]["exp_avg"], DTensor)
    assert gather_optimizer_state(optimizer, keep=False) == {}
    again = shard_optimizer_state(gathered, optimizer)
    assert isinstance(again["state"][0]["exp_avg"], DTensor)
    before = optimizer.state_dict()["state"]
    for index, values in again["state"].items():
        assert torch.equal(values["exp_avg"].to_local(), before[index]["exp_avg"].to_local())
        assert values["step"] == before[index]["step"]


def test_full_parameters_replace_tied_ones_in_all_their_modules_while_the_context_is_open() -> None:
    model = tied_llama()
    before = model.lm_head.weight
    full = torch.ones_like(before)
    with full_parameters(model, {"model.embed_tokens.weight": full}):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.state_dict()["lm_head.weight"], full)
    assert model.lm_head.weight is model.model.embed_tokens.weight is before


def test_a_replacement_trains_if_the_parameter_does() -> None:
    model = tied_llama()
    model.model.norm.weight.requires_grad_(False)
    full = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with full_parameters(model, full):
        assert not model.model.norm.weight.requires_grad
        assert model.lm_head.weight.requires_grad


def test_values_of_parameters_that_are_not_sharded_stay_as_they_are() -> None:
    tensor = torch.ones(2)
    assert shard_like(torch.ones(2), tensor) is tensor
    assert shard_like(torch.ones(2), 3) == 3


def test_a_state_of_another_number_of_parameters_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    state = torch.optim.AdamW(parameters).state_dict()
    assert indices_in_state(state, parameters) == {parameters[0]: 0, parameters[1]: 1}
    with pytest.raises(RuntimeError, match="the optimizer in the checkpoint has 2 parameters, but this run trains 1"):
        indices_in_state(state, parameters[:1])
