from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sft_lightning.batch import Batch, DocumentLengths, SupervisedPositions
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.training.forward import decoder_inputs, find_any_head, logits_at, router_loss, token_loss_sums
from sft_lightning.types import IGNORE_INDEX

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, **sizes)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    return made


def batch(supervised: bool = True) -> Batch:
    """Two rows of two documents each; the first three tokens of each document have no loss."""
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(5)]), torch.arange(6).repeat(2)])
    labels = torch.where(positions < 3, IGNORE_INDEX, ids) if supervised else torch.full_like(ids, IGNORE_INDEX)
    weights = torch.linspace(0.5, 2.0, 24).view(2, 12)
    made: Any = {
        "input_ids": ids, "labels": labels, "loss_weights": weights, "position_ids": positions,
        "document_lengths": DocumentLengths([[7, 5], [6, 6]]), "supervised": SupervisedPositions(labels),
    }  # fmt: skip
    found: Batch = made
    return found


def test_the_loss_under_the_head_is_that_of_the_models_own_logits_in_value_and_gradient(model: PreTrainedModel) -> None:
    head = find_any_head(model, 50, CPU)
    assert head is not None
    sums, gradients = [], []
    for each in (head, None):
        model.zero_grad()
        sums.append(token_loss_sums(model, each, batch()))
        sums[-1].loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(sums[0].loss, sums[1].loss)
    assert sums[0].weight == sums[1].weight
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_loss_is_the_weighted_sum_over_supervised_tokens_of_each_document_alone(model: PreTrainedModel) -> None:
    made, expected = batch(), torch.zeros(())
    for row, lengths in enumerate(made["document_lengths"]):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            logits = model(input_ids=made["input_ids"][row : row + 1, part]).logits[0, 2:-1]  # predict tokens 3 and on
            ids, weights = (made[key][row, part][3:] for key in ("input_ids", "loss_weights"))  # type: ignore[literal-required]
            losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
            expected = expected + (losses * weights).sum()
            start += length
    torch.testing.assert_close(token_loss_sums(model, None, made).loss, expected)


def test_without_supervised_tokens_the_loss_is_zero_with_a_backward_pass(model: PreTrainedModel) -> None:
    for head in (find_any_head(model, 50, CPU), None):
        sums = token_loss_sums(model, head, batch(supervised=False))
        assert (float(sums.loss), float(sums.weight)) == (0.0, 0.0)
        sums.loss.backward()  # type: ignore[no-untyped-call]


def test_logits_are_those_of_the_positions_in_their_order(model: PreTrainedModel) -> None:
    made = batch()
    inputs, supervised = decoder_inputs(made), made["supervised"]
    everywhere = model(**inputs).logits.flatten(0, 1)
    found, _ = logits_at(model, inputs, supervised)
    assert len(found) == len(supervised) > 0
    torch.testing.assert_close(found, everywhere[supervised.flat])


def test_a_model_without_routers_has_no_loss_of_routers(model: PreTrainedModel) -> None:
    made = batch()
    assert router_loss(model, model(**decoder_inputs(made)), made) is None
