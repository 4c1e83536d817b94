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
