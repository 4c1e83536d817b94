from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from sft_lightning.compat import dynamo as compat


def test_compilations_are_counted_and_timed_and_their_errors_have_one_class() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError

    seconds: list[float] = []
    compat.watch_compilations(seconds.append)
    before = compat.num_compiled_graphs()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert compat.num_compiled_graphs() == before + 1
    assert len(seconds) == 1
    assert 0 < seconds[0] < 60
    with pytest.raises(compat.compile_error()):
        torch.compile(lambda x: x + 2, backend=broken)(torch.ones(2))


def test_a_backward_pass_is_compiled_with_its_forward_pass() -> None:
    config = importlib.import_module("torch._functorch.config")
    with config.patch(force_non_lazy_backward_lowering=False):
        compat.compile_backward_with_forward()
        assert config.force_non_lazy_backward_lowering


def test_an_argument_is_found_by_position_by_name_or_as_the_default() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    tensors = (None,) * 3
    assert compat.argument_of(attend, "dropout_p", (*tensors, 0.1), {}) == 0.1
    assert compat.argument_of(attend, "scale", tensors, {"scale": 2.0}) == 2.0
    assert compat.argument_of(attend, "dropout_p", tensors, {}) == 0.0
    assert compat.argument_of(torch.ops.aten.mm.default, "dropout_p", tensors, {}) is None


def test_the_tensors_that_an_operation_changes_are_told_from_those_it_reads() -> None:
    x, y = torch.ones(1), torch.ones(1)
    assert compat.changed_tensors(torch.ops.aten.add_.Tensor, (x, y), {})[0] is x
    assert compat.changed_tensors(torch.ops.aten.mul.out, (x, x), {"out": y})[0] is y
    assert compat.changed_tensors(torch.ops.aten.add.Tensor, (x, y), {}) == []


def test_a_function_is_called_in_place_of_every_operation() -> None:
    names = []

    def call(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names.append(operation.overloadpacket.__name__)
        return operation(*args, **kwargs)

    with compat.calling_operations(call):
        total = (torch.ones(2) * 3).sum()
    assert total == 6
    assert names == ["ones", "mul", "sum"]
