"""Two threads stand in for the processes of a sharded model, and meet in reductions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.generate import generate_ids
from sft_lightning.models.generation.lockstep import lockstep
from sft_lightning.strategies.fsdp2.groups import decoder_layers, shard_model

STOPS = [3, 17, 22, 40, 41]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # answers differ, and end
    return model


def answers(model: PreTrainedModel, prompts: list[list[int]], most: int = 12, **options: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=most, **options)
    found = generate_ids(model, prompts, stop_token_ids=STOPS, pad_token_id=0, config=config)
    return [answer.token_ids for [answer] in found]


def counted(model: PreTrainedModel, function: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a function returns, and how many passes of the model it took."""
    passes: list[None] = []
    with model.register_forward_hook(lambda *_: passes.append(None)):
        return function(), len(passes)


class Meeting:
    """Two threads' sum of what each brings; a thread that comes too often or too seldom is waited for in vain."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=10)
        self._lock = threading.Lock()
        self._sum = torch.zeros(())

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self._barrier.wait() == 0:
            self._sum.zero_()
        self._barrier.wait()
        with self._lock:
            self._sum += tensor
        self._barrier.wait()
        tensor.copy_(self._sum)


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[PreTrainedModel, int], Any]], list[Any]]:
    """Run a function of (a model of shards, rank) in two; return what each returns, and the passes that it took."""
    monkeypatch.setattr(dist, "all_reduce", Meeting().all_reduce)

    def run(function: Callable[[PreTrainedModel, int], Any]) -> list[Any]:
        def process(rank: int) -> tuple[Any, int]:
            model = models[rank]
            next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks a partition
            return counted(model, lambda: function(model, rank))

        models = [tiny_llama(), tiny_llama()]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(process, range(2)))

    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3}, {"num_beams": 4, "num_beam_groups": 2}],
    ids=["greedy", "beam", "contrastive", "diverse_beam"],
)
def test_a_process_that_is_done_early_runs_dummy_passes_and_answers_do_not_change(
    two_processes: Callable[..., list[Any]], options: dict[str, Any]
) -> None:
    def ask(model: PreTrainedModel, rank: int) -> list[list[int]]:
        return answers(model, [PROMPTS[rank]], most=(12, 3)[rank], **options)

    whole = tiny_llama()
    (one, passes_of_one), (two, passes_of_two) = (counted(whole, partial(ask, whole, rank)) for rank in range(2))
    assert passes_of_one > passes_of_two
    assert two_processes(ask) == [(one, passes_of_one), (two, passes_of_one)]


def test_a_process_without_prompts_runs_dummy_passes(two_processes: Callable[..., list[Any]]) -> None:
    (found, passes), (nothing, same) = two_processes(lambda model, rank: answers(model, PROMPTS[: 2 - 2 * rank]))
    assert found == answers(tiny_llama(), PROMPTS)
    assert nothing == []
    assert passes == same > 1


def test_a_model_that_is_not_sharded_needs_no_lockstep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: pytest.fail("nobody shares these weights"))
    assert answers(tiny_llama(), PROMPTS)
    assert answers(tiny_llama(), []) == []


def test_a_process_that_fails_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: pytest.fail("the others may never come"))
    model = tiny_llama()
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"), lockstep(model):
        raise RuntimeError("out of memory")
    assert not model._forward_pre_hooks


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_sharded_model_answers_like_the_whole_one_and_gathers_one_layer_at_a_time() -> None:
    model = tiny_llama()
    expected = answers(model, PROMPTS)
    shard_model(model, init_device_mesh("cpu", (1,)), torch.device("cpu"))
    layers, whole = decoder_layers(model), []
    for layer in layers:  # these hooks run behind those that gather
        layer.register_forward_pre_hook(lambda *_: whole.append([not is_sharded(each) for each in layers]))
    assert answers(model, PROMPTS) == expected
    assert {sum(each) for each in whole} == {1}
    assert all(is_sharded(layer) for layer in layers)


def is_sharded(module: torch.nn.Module) -> bool:
    return isinstance(next(module.parameters()), DTensor)
