from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from sft_lightning.checks import Check
from sft_lightning.models.attention.packed import PACKED, packed_attention
from sft_lightning.selftest.checks import isolation
from sft_lightning.selftest.short_runs import Run


def loaded_run(model_dir: Path, attn_implementation: str) -> Run:
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED)
    module: Any = SimpleNamespace(language_model=model, spec=SimpleNamespace(attn_implementation=attn_implementation))
    module.to = lambda device: module
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, precision_plugin=SimpleNamespace(forward_context=nullcontext))
    data: Any = SimpleNamespace(tokenizer=range(model.config.vocab_size), spec=SimpleNamespace(batch_size=2))
    return Run(module, data, trainer)


@pytest.fixture
def checked(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that checks the isolation of a tiny model's logits."""
    monkeypatch.setattr(isolation, "_packed_loss", lambda run, small: Check("packed loss", True, ""))

    def check(attn_implementation: str = "auto", packing: Any = "best_fit") -> list[Check]:
        small: Any = None
        return list(isolation.check_isolation(loaded_run(model_dir, attn_implementation), small, packing))

    return check


def test_isolated_documents_pass_with_their_figures(checked: Any) -> None:
    logits, loss = checked()
    assert (logits.name, logits.passed) == ("packing isolation", True)
    assert "(at most " in logits.figure
    assert loss.name == "packed loss"


@pytest.mark.parametrize(
    ("packing", "passed", "figure"),
    [
        ("best_fit", False, "set data.packing: none"),
        ("auto", None, "data.packing: auto leaves each row to one document; packed documents see each other"),
        ("none", None, "data.packing: none leaves each row to one document; packed documents see each other"),
    ],
)
def test_leaking_documents_end_the_check_and_fail_if_they_are_packed(
    checked: Any, packing: str, passed: bool | None, figure: str
) -> None:
    def leaky(*args: Any, document_lengths: Any = None, **kwargs: Any) -> Any:
        return packed_attention(*args, document_lengths=None, **kwargs)

    AttentionInterface.register(PACKED, leaky)
    try:
        (logits,) = checked(packing=packing)
    finally:
        AttentionInterface.register(PACKED, packed_attention)
    assert logits.passed is passed
    assert "packed documents see each other" in logits.figure
    assert figure in logits.figure


def test_isolation_does_not_apply_without_packing_and_packed_attention(checked: Any) -> None:
    (logits,) = checked("sdpa", "none")
    assert logits.passed is None
    assert checked("auto", "none")[0].passed
