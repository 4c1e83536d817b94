from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from sft_lightning.models.memory import activation_gib, decide_checkpointing, free_memory_gib

LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


def test_a_7b_models_activations_grow_with_tokens_as_the_literature_says() -> None:
    per_token = activation_gib(LLAMA_7B, tokens=1, bytes_per_value=2) * 2**30
    assert per_token == pytest.approx(2 * 4.2e6, rel=0.1)
    assert activation_gib(LLAMA_7B, tokens=64, bytes_per_value=2) == pytest.approx(64 * per_token / 2**30)


@pytest.mark.parametrize(
    ("setting", "free", "enabled"),
    [("auto", 1000.0, False), ("auto", 1.0, True), (True, 1000.0, True), (False, 0.0, False)],
)
def test_auto_checkpoints_when_activations_do_not_fit(setting: bool, free: float, enabled: bool) -> None:
    decision = decide_checkpointing(setting, LLAMA_7B, tokens=4096, bytes_per_value=2, free_gib=free)
    assert decision.enabled is enabled
    assert decision.reason


def test_free_memory_is_a_positive_number() -> None:
    assert free_memory_gib(torch.device("cpu")) > 0
