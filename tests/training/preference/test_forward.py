from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sft_lightning.batch import SupervisedPositions
from sft_lightning.training.preference.forward import answer_log_probs
from sft_lightning.training.preference.losses import PreferenceConfig

Train = Callable[..., Any]


def test_log_probabilities_are_those_of_each_conversation_alone(train: Train) -> None:
    run = train("full", preference=PreferenceConfig(share_prompts=False))
    batch = next(iter(run.data.train_dataloader()))
    found = answer_log_probs(run.module, batch).log_probs.flatten()
    expected, start = [], 0
    for length in batch["document_lengths"][0]:
        part = slice(start, start + length)
        logits = run.module.language_model(input_ids=batch["input_ids"][:1, part]).logits[0, :-1]
        labels = batch["labels"][0, part][1:]
        if (labels != -100).any():
            expected.append(-torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        start += length
    assert len(expected) == len(found)
    assert float((torch.stack(expected) - found).abs().max()) <= 1e-4


def test_the_models_own_logits_give_the_same_log_probabilities_as_its_head(train: Train) -> None:
    run = train()
    batch = next(iter(run.data.train_dataloader()))
    run.module.eval()
    with_head = answer_log_probs(run.module, batch)
    run.module.__dict__["head"] = None
    assert torch.allclose(answer_log_probs(run.module, batch).log_probs, with_head.log_probs, atol=1e-4)
    assert with_head.router_loss is None


def test_a_batch_without_pairs_has_no_log_probabilities_and_still_a_backward_pass(train: Train) -> None:
    run = train("full", trainer={"max_steps": 1})
    batch = next(iter(run.data.train_dataloader()))
    batch = {**batch, "answer_lengths": [], "supervised": SupervisedPositions(torch.full_like(batch["labels"], -100))}
    log_probs = answer_log_probs(run.module, batch).log_probs  # type: ignore[arg-type]
    assert log_probs.shape == (0, 2)
    assert log_probs.sum().requires_grad
