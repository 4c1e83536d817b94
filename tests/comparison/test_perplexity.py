from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sft_lightning.comparison.perplexity import ReferenceLoss, mean_perplexity, reference_loss
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.models.generation.config import LoadOptions
from sft_lightning.models.generation.serving import ServedModel, load_served_model


def prompt(reference: str) -> ComparisonPrompt:
    return ComparisonPrompt([{"role": "user", "content": "Hi"}], "Human: Hi Assistant:", "here", reference)


@torch.no_grad()
def by_definition(served: ServedModel, before: str, answer: str, *, special: bool) -> float:
    ids = served.tokenizer(before, add_special_tokens=special).input_ids
    total = 0.0
    for token in served.tokenizer(answer, add_special_tokens=False).input_ids:
        total -= served.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
        ids.append(token)
    return total


def test_the_reference_is_scored_as_the_template_renders_it(tuned_dir: Path) -> None:
    served = load_served_model("--model", str(tuned_dir), None, LoadOptions())
    asked = prompt("Red is a colour.")
    loss = reference_loss(served, asked, served.encode_messages(asked.messages))
    assert loss is not None
    before = served.render(asked.messages)
    assert before.endswith("USER: Hi ASSISTANT:")
    assert loss.nats == pytest.approx(by_definition(served, before, " Red is a colour.", special=False), rel=1e-4)


def test_without_a_template_the_reference_follows_the_colon_and_a_space(model_dir: Path) -> None:
    served = load_served_model("--model", str(model_dir), None, LoadOptions())
    asked = prompt("Red")
    loss = reference_loss(served, asked, served.encode_text(asked.text))
    assert loss is not None
    assert loss.nats == pytest.approx(by_definition(served, asked.text, " Red", special=True), rel=1e-4)
    assert reference_loss(served, prompt("  "), served.encode_text(asked.text)) is None


def test_mean_perplexity_is_over_tokens_and_overflow_is_infinite() -> None:
    assert mean_perplexity([]) is None
    assert mean_perplexity([ReferenceLoss(4.0, 1), ReferenceLoss(2.0, 5)]) == pytest.approx(math.e)
    assert ReferenceLoss(1e6, 1).perplexity == math.inf
