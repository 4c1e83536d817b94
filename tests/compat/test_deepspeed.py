from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sft_lightning.compat import deepspeed as compat
from sft_lightning.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra")


def partitioned(**attributes: Any) -> Any:
    """A parameter as ZeRO-3 leaves it: empty, with this process's part beside it."""
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_id = 0
    parameter.ds_shape = torch.Size([3, 2])
    parameter.ds_tensor = torch.zeros(4)
    parameter.ds_tensor.ds_numel = 4
    parameter.ds_tensor.final_location = None
    parameter.ds_process_group = None
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@pytest.mark.parametrize("supported", [True, False])
def test_float16_on_a_cpu_is_what_deepspeeds_engine_asks_for(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: supported)
    assert compat.cpu_has_float16() is supported


def test_a_backend_starts_without_the_operator_that_only_serving_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    compat.skip_serving_operator()
    assert build_shm_op() is None


def test_a_partitioned_parameter_tells_its_whole_shape_and_its_own_part() -> None:
    parameter, plain = partitioned(), nn.Parameter(torch.ones(2, 2))
    assert compat.is_partitioned(parameter)
    assert not compat.is_partitioned(plain)
    assert compat.full_shape(parameter) == (3, 2)
    assert compat.full_shape(plain) == (2, 2)
    assert compat.own_part(parameter) is parameter.ds_tensor
    assert compat.own_part(plain) is plain


@pytest.mark.parametrize(("rank", "part"), [(0, [0.0, 1, 2, 3]), (1, [4.0, 5, 0, 0])])
def test_the_last_process_gets_zeros_at_the_end(rank: int, part: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: rank)
    assert compat.cut_own_part(partitioned(), torch.arange(6.0).view(3, 2)).tolist() == part


@pytest.mark.parametrize(("location", "read"), [("nvme", ["in", "out"]), (None, [])])
def test_a_part_is_read_from_nvme_and_written_back(location: str | None, read: list[str]) -> None:
    calls: list[str] = []
    swapper = SimpleNamespace(
        swap_in=lambda parameters, async_op: calls.append("in"),
        swap_out_and_release=lambda parameters: calls.append("out"),
    )
    parameter = partitioned(nvme_swapper=swapper)
    parameter.ds_tensor.final_location = location
    with compat.own_part_in_memory(parameter) as part:
        part.fill_(1)
    assert calls == read
    assert parameter.ds_tensor.tolist() == [1.0] * 4


def test_an_optimizer_that_is_not_zeros_has_no_partitions() -> None:
    assert compat.flat_partitions(torch.optim.SGD([nn.Parameter(torch.zeros(1))])) == []


def test_partitions_under_an_unknown_name_are_refused_not_taken_for_none() -> None:
    unknown = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(
        UserError, match=r"^saving and continuing a run .*not available, because DeepSpeedZeroOptimizer"
    ):
        compat.flat_partitions(unknown())


def test_a_partition_is_read_from_nvme_once_for_all_of_its_parameters() -> None:
    calls: list[str] = []
    zero: Any = SimpleNamespace(
        fp32_partitioned_groups_flat=[torch.zeros(2), torch.ones(2)],
        grad_position={0: [0, 0, 1], 1: [1, 0, 1], 2: [0, 1, 1]},
        _swappable_optimizer_subgroup=lambda index: index == 0,
        _optimizer_states_and_gradient_swap_in=lambda index: calls.append(f"in {index}"),
        _optimizer_states_and_gradient_swap_out=lambda index: calls.append(f"out {index}"),
        _release_swap_buffers=lambda index: calls.append(f"drop {index}"),
    )
    parameters = [partitioned(ds_id=number) for number in range(3)]
    found = [
        (flats[0].tolist(), [parameter.ds_id for parameter in together])
        for flats, together in compat.partitions_in_memory(zero, parameters)
    ]
    assert found == [([0.0, 0.0], [0, 2]), ([1.0, 1.0], [1])]
    assert calls == ["in 0", "drop 0"]
    list(compat.partitions_in_memory(zero, parameters, changed=True))
    assert calls[2:] == ["in 0", "out 0"]


ZERO = """
import sys, torch, deepspeed
from torch import nn
from sft_lightning.compat import deepspeed as compat

stage = int(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
before = {name: value.detach().clone() for name, value in model.named_parameters()}
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
          "zero_allow_untested_optimizer": True}
groups = [{"params": list(layer.parameters())} for layer in model]
deepspeed.init_distributed(dist_backend="gloo")
engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=config)
parameters = dict(model.named_parameters())
assert {compat.is_partitioned(p) for p in parameters.values()} == {stage == 3}
assert [tuple(compat.full_shape(p)) for p in parameters.values()] == [(5, 3), (5,), (1, 5), (1,)]
assert compat.external_weights(model[0]) == []
if stage == 3:
    deepspeed.zero.register_external_parameter(model[0], model[1].weight)
    assert compat.external_weights(model[0]) == [model[1].weight]
    assert not compat.is_gathered(model[0].weight)
    with deepspeed.zero.GatheredParameters([model[0].weight]):
        assert compat.is_gathered(model[0].weight)
    with compat.own_part_in_memory(model[0].weight) as part:
        assert torch.equal(part[:15], compat.cut_own_part(model[0].weight, before["0.weight"])[:15])
assert len(compat.flat_partitions(zero)) == 2
for flats, together in compat.partitions_in_memory(zero, parameters.values()):
    for p in together:
        name = next(n for n, q in parameters.items() if q is p)
        assert torch.equal(compat.gather(zero, p, None).cpu(), before[name]), name
engine.backward(engine(torch.ones(1, 3)).sum())
engine.step()
compat.link_states(zero)
for flats, together in compat.partitions_in_memory(zero, parameters.values(), changed=True):
    for p in together:
        moment = compat.gather(zero, p, "exp_avg").clone()
        assert moment.shape == compat.full_shape(p) and moment.any()
        compat.scatter(zero, p, 2 * moment, "exp_avg")
        assert torch.equal(compat.gather(zero, p, "exp_avg"), 2 * moment)
        compat.scatter(zero, p, torch.ones_like(moment), None)
        assert compat.gather(zero, p, None).eq(1).all()
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_and_states_are_read_and_written_in_deepspeeds_own_engine(stage: int) -> None:
    """One process over gloo; what two processes leave behind is tested in tests/strategies/zero."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    result = subprocess.run(
        [sys.executable, "-c", ZERO, str(stage)],
        env={**os.environ, **one_process, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines()[-1:] == ["same"], result.stderr[-2000:]
