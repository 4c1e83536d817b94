from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sft_lightning.models import compile_decision
from sft_lightning.models.compile_decision import decide_compiling, obstacle_to_compiling, seconds_saved

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
SMALL = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def test_a_token_of_a_7b_model_is_predicted_to_save_what_the_trace_of_the_layers_says() -> None:
    assert seconds_saved(LLAMA_7B, 1) == pytest.approx(32 * 2.95e6 / 3.0e12, rel=0.03)


@pytest.mark.parametrize(
    ("setting", "config", "million_tokens", "num_graphs", "obstacle", "enabled"),
    [
        ("auto", LLAMA_7B, 1, 1, None, False),  # saves 32 s, takes 40
        ("auto", LLAMA_7B, 2, 1, None, False),  # saves 64 s: not twice as much
        ("auto", LLAMA_7B, 3, 1, None, True),
        ("auto", LLAMA_7B, 3, 2, None, False),
        ("auto", LLAMA_7B, 6, 2, None, True),
        ("auto", SMALL, 1000, 1, None, False),
        ("auto", LLAMA_7B, 1000, 1, "no Triton", False),
        (True, SMALL, 0, 1, "no Triton", True),
        (False, LLAMA_7B, 1000, 1, None, False),
    ],
)
def test_layers_are_compiled_if_the_run_is_long_enough_to_save_twice_the_time(
    setting: Any, config: LlamaConfig, million_tokens: int, num_graphs: int, obstacle: str | None, enabled: bool
) -> None:
    decision = decide_compiling(
        setting, config, num_tokens=million_tokens * 10**6, num_graphs=num_graphs, obstacle=obstacle
    )
    assert decision.enabled is enabled
    assert str(decision).startswith("on (" if enabled else "off (")
    assert (obstacle or "") in decision.reason or setting != "auto"


@pytest.mark.parametrize(
    ("capability", "triton", "strategy", "bits", "obstacle"),
    [
        ((8, 0), True, "ddp", None, None),
        ((9, 0), True, "ddp", 4, None),
        ((7, 5), True, "ddp", None, "compute capability 7.5"),
        ((8, 0), False, "ddp", None, "Triton is not installed"),
        ((8, 0), True, "zero", None, "sharded weights"),
        ((8, 0), True, "fsdp2", None, "sharded weights"),
        ((8, 0), True, "ddp", 8, "8-bit layers"),
    ],
)
def test_auto_compiles_only_where_the_compiler_is_known_to_work(
    capability: tuple[int, int],
    triton: bool,
    strategy: str,
    bits: int | None,
    obstacle: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compile_decision.importlib.util, "find_spec", lambda name: object() if triton else None)
    found = obstacle_to_compiling(torch.device("cuda"), strategy=strategy, bits=bits)
    assert found is None if obstacle is None else obstacle in str(found)


def test_auto_does_not_compile_on_the_cpu() -> None:
    assert "not on cpu" in str(obstacle_to_compiling(torch.device("cpu"), strategy="ddp", bits=None))
