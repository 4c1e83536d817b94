"""Which values of `trainer.strategy` are accepted."""

from __future__ import annotations

import pytest

from sft_lightning.errors import UserError
from sft_lightning.strategies import FSDP2
from sft_lightning.strategies.names import check_name, deepspeed_name


def test_short_names_of_zero_stages_are_those_of_lightning() -> None:
    assert deepspeed_name(2) == "deepspeed_stage_2"
    assert deepspeed_name(3, offload=True) == "deepspeed_stage_3_offload"


@pytest.mark.parametrize(("name", "instead"), [("fsdp", "'fsdp2'"), ("fsdp_cpu_offload", "'fsdp2_offload'")])
def test_fsdp1_is_refused_with_the_name_of_fsdp2(name: str, instead: str) -> None:
    with pytest.raises(UserError, match=rf"trainer\.strategy: '{name}' \(FSDP1\) is not supported.*use {instead}"):
        check_name(name)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", FSDP2()])
def test_other_values_are_accepted(strategy: object) -> None:
    check_name(strategy)
