"""The state of ZeRO's optimizer in the form of a single process's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sft_lightning.strategies.zero.state import gather_state, load_state


class FakeZero:
    """ZeRO's optimizer over one flat partition that holds all of two parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.single_partition_of_fp32_groups = [self.flat]
        self.optimizer = torch.optim.AdamW([nn.Parameter(self.flat)], lr=0.5)


def test_a_state_of_another_number_of_parameters_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    state = torch.optim.AdamW(parameters[:1]).state_dict()
    with pytest.raises(RuntimeError, match="has 1 parameters, but this run trains 2"):
        load_state(FakeZero(parameters), [parameters], state)


def test_before_the_first_step_the_state_is_empty_and_groups_have_their_values() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    found = gather_state(FakeZero(parameters), [parameters], keep=True)
    assert found["state"] == {}
    assert found["param_groups"][0]["lr"] == 0.5
    assert found["param_groups"][0]["params"] == [0, 1]
