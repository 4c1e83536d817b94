from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.batch import DocumentLengths, SupervisedPositions
from sft_lightning.models.checkpointing import enable_gradient_checkpointing
from sft_lightning.models.head.routers import find_router_loss, tokens_of_documents
from sft_lightning.models.head.whole import find_head
from sft_lightning.training.forward import token_loss_sums
from sft_lightning.types import IGNORE_INDEX

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
}
LENGTHS = [[13], [9, 4]]
"""Tokens of the first row's document, and of the second row's with its padding."""


def mixture(model_type: str, **changes: Any) -> PreTrainedModel:
    values = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "router_aux_loss_coef": 0.5,
        "output_router_logits": True, "attention_dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**values, **FAMILIES[model_type], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train()


def micro_batch() -> Any:
    ids = torch.randint(1, 50, (2, 13), generator=torch.Generator().manual_seed(1))
    ids[1, 9:] = 0
    labels = ids.clone()
    labels[1, 9:] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    positions = torch.stack([torch.arange(13), torch.cat([torch.arange(9), torch.arange(4)])])
    return {
        "input_ids": ids, "labels": labels, "loss_weights": (labels != IGNORE_INDEX).float(),
        "position_ids": positions, "document_lengths": DocumentLengths(LENGTHS),
        "supervised": SupervisedPositions(labels),
    }  # fmt: skip


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_loss(model: PreTrainedModel) -> torch.Tensor:
    """As transformers computes it, padding masked out."""
    batch = micro_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 9:] = 0
    loss: torch.Tensor = model(batch["input_ids"], attention_mask=mask, labels=batch["labels"], use_cache=False).loss
    return loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_chunked_loss_with_routers_is_the_models_own_in_value_and_gradient(
    model_type: str, checkpointing: bool
) -> None:
    model = mixture(model_type)
    expected = own_loss(model)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    if checkpointing:
        enable_gradient_checkpointing(model)
    head = find_head(model, 50, CPU)
    assert head is not None
    sums = token_loss_sums(model, head, micro_batch())
    loss = sums.loss / sums.weight
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)
    assert any("gate.weight" in name or "router" in name for name in found)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_of_the_models_own_logits_is_the_same(model_type: str) -> None:
    model = mixture(model_type)
    batch = micro_batch()
    chunked = token_loss_sums(model, find_head(model, 50, CPU), batch)
    own = token_loss_sums(model, None, batch)
    torch.testing.assert_close(own.loss, chunked.loss, rtol=1e-6, atol=0)


def test_an_evaluation_leaves_out_the_routers_loss() -> None:
    batch, model = micro_batch(), mixture("mixtral")
    head = find_head(model, 50, CPU)
    plain = token_loss_sums(mixture("mixtral", output_router_logits=False), None, batch).loss
    assert token_loss_sums(model, head, batch).loss > plain + 1
    torch.testing.assert_close(token_loss_sums(model.eval(), head, batch).loss, plain)


def test_an_adapted_mixture_of_experts_has_the_routers_loss_too() -> None:
    base = mixture("mixtral")
    adapted: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert find_router_loss(adapted) == find_router_loss(base)
    sums = token_loss_sums(adapted, find_head(adapted, 50, CPU), micro_batch())
    torch.testing.assert_close(sums.loss / sums.weight, own_loss(mixture("mixtral")), rtol=1e-6, atol=0)


def test_a_mixture_whose_routers_are_balanced_in_another_way_uses_its_own_logits() -> None:
    class Other(type(mixture("mixtral"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.aux_loss = 2 * out.aux_loss
            return out

    model = mixture("mixtral")
    model.__class__ = Other
    assert find_head(model, 50, CPU) is None


def test_models_without_routers_or_with_virtual_tokens_have_no_routers_loss() -> None:
    assert find_router_loss(mixture("mixtral", output_router_logits=False)) is None
    prefix: Any = get_peft_model(mixture("mixtral"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert find_router_loss(prefix) is None


def test_padding_does_not_count_as_tokens_of_a_document() -> None:
    batch = micro_batch()
    counted = tokens_of_documents(batch["labels"], LENGTHS)
    assert counted.sum(1).tolist() == [13, 9]
    assert tokens_of_documents(torch.full((1, 1), IGNORE_INDEX), [[1]]).all()  # a rank with nothing left
