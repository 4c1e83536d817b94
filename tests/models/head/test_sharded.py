"""The loss of a sharded model is made in its head's place: the same loss and gradients, without a table of logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.batch import Batch, DocumentLengths, SupervisedPositions
from sft_lightning.models.head.sharded import find_sharded_head
from sft_lightning.models.head.whole import find_head
from sft_lightning.models.inspection import base_model
from sft_lightning.strategies.fsdp2.groups import shard_model
from sft_lightning.training import losses
from sft_lightning.training.forward import token_loss_sums

CPU = torch.device("cpu")
VOCABULARY = 50
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def build(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **changes}))
    return model


def with_lora(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    adapted: PeftModel = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )  # type: ignore[assignment]
    return adapted


def batch(supervised: bool = True) -> Batch:
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone() if supervised else torch.full_like(ids, -100)
    labels[0, :5] = labels[1, 9:] = -100
    found: Any = {
        "input_ids": ids, "labels": labels, "position_ids": torch.arange(12).expand(2, 12),
        "loss_weights": torch.linspace(0.5, 2.0, 24).view(2, 12), "document_lengths": DocumentLengths([[12], [12]]),
        "supervised": SupervisedPositions(labels),
    }  # fmt: skip
    made: Batch = found
    return made


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 8})],
    ids=["llama", "tied", "opt"],
)
def test_a_head_whose_output_is_the_models_logits_is_found(model_type: str, changes: dict[str, Any]) -> None:
    model = build(model_type, **changes)
    head = find_sharded_head(model, VOCABULARY, CPU)
    assert head is not None
    assert head.module is model.get_output_embeddings()
    assert "forward" not in vars(head.module)
    assert model.training


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_a_model_that_changes_the_output_of_its_head_uses_its_own_logits(
    model_type: str, changes: dict[str, Any]
) -> None:
    assert find_sharded_head(build(model_type, **changes), VOCABULARY, CPU) is None


def test_a_head_with_an_adapter_and_virtual_tokens_use_the_models_own_logits() -> None:
    on_head = get_peft_model(build(), LoraConfig(target_modules=["lm_head"]))
    assert find_sharded_head(on_head, VOCABULARY, CPU) is None  # type: ignore[arg-type]
    prefix = get_peft_model(build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert find_sharded_head(prefix, VOCABULARY, CPU) is None


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA with a trained head"])
@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "nothing supervised"])
def test_a_sharded_model_has_the_loss_and_gradients_of_the_whole_model(adapted: bool, supervised: bool) -> None:
    whole, sharded = build(), build()
    one, two = (with_lora(each) if adapted else each for each in (whole, sharded))
    shard_model(base_model(two), init_device_mesh("cpu", (1,)), CPU)
    expected = token_loss_sums(one, find_head(one, VOCABULARY, CPU), batch(supervised))
    head = find_sharded_head(two, VOCABULARY, CPU)
    assert head is not None
    found = token_loss_sums(two, head, batch(supervised))
    torch.testing.assert_close([*found], [*expected])
    expected.loss.backward()
    found.loss.backward()
    theirs = {name: parameter.grad for name, parameter in one.named_parameters() if parameter.requires_grad}
    for name, parameter in two.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.grad, DTensor), name
            torch.testing.assert_close(parameter.grad.full_tensor(), theirs[name], msg=name)


class LargestTable(TorchDispatchMode):
    """Notes the most rows of any tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


def test_logits_of_all_positions_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * VOCABULARY)
    model = build(hidden_size=4)
    head = find_sharded_head(model, VOCABULARY, CPU)
    with LargestTable() as tables:
        token_loss_sums(model, head, batch()).loss.backward()
    assert tables.rows == 4
    with LargestTable() as tables:
        token_loss_sums(model, None, batch()).loss.backward()
    assert tables.rows > 15
