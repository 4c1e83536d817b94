"""Covers sft_lightning.models.attention: packed rows under each attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

Fit = Callable[..., Any]


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_rows_have_the_losses_of_the_cpu(name: str, batch_size: int, fit: Fit) -> None:
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if name in packages and importlib.util.find_spec(packages[name]) is None:
        pytest.skip(f"{packages[name]} is not installed")
    options = ["--model.optimizer.init_args.lr=0.002", f"--data.batch_size={batch_size}"]
    # The isolation check at the start of each run compares packed with separate documents, too.
    packed = fit("packed", f"--model.attn_implementation={name}", *options)
    reference = fit("cpu", *options, device="cpu")
    assert packed.losses == pytest.approx(reference.losses, abs=5e-2)
