from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.models.head.whole import find_head

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **changes}))
    return model


@pytest.mark.parametrize(
    ("model_type", "changes", "scale", "softcap"),
    [
        ("llama", {}, 1.0, None),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("cohere", {"logit_scale": 0.25}, 0.25, None),
        ("granite", {"logits_scaling": 4.0}, 0.25, None),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 8}, 1.0, None),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False}, 1.0, None),
    ],
)
def test_a_familys_scale_and_cap_of_logits_are_applied(
    model_type: str, changes: dict[str, Any], scale: float, softcap: float | None
) -> None:
    model = build(model_type, **changes).eval()
    head = find_head(model, 50, CPU)
    assert head is not None
    assert (head.scale, head.softcap) == (scale, softcap)
    assert head.linear is model.get_output_embeddings()
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(head.project(head.decoder(ids).last_hidden_state), model(ids).logits)


def test_the_head_is_found_under_an_adapter() -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear"))
    head = find_head(adapted, 50, CPU)
    assert head is not None
    assert head.linear is not None


def test_a_head_in_modules_to_save_is_the_trained_copy() -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = find_head(adapted, 50, CPU)
    assert head is not None
    assert head.linear is adapted.base_model.model.lm_head.modules_to_save["default"]


def test_an_adapter_on_the_head_leaves_no_plain_linear_layer() -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    head = find_head(adapted, 50, CPU)
    assert head is not None
    assert head.linear is None


def test_a_model_that_changes_its_logits_in_an_unknown_way_uses_its_own_logits() -> None:
    class Shifted(type(build("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1e-2
            return out

    model = build("llama")
    model.__class__ = Shifted
    assert find_head(model, 50, CPU) is None


def test_virtual_tokens_require_the_models_own_forward() -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert find_head(get_peft_model(build("llama"), prefix), 50, CPU) is None


def test_routers_with_an_unknown_loss_require_the_models_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    routers = build("mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    assert find_head(routers, 50, CPU) is not None
    monkeypatch.setattr("sft_lightning.models.head.whole.find_router_loss", lambda model: None)
    assert find_head(routers, 50, CPU) is None
