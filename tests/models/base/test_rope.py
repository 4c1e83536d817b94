from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sft_lightning.errors import UserError
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.rope import RopeScalingConfig, check_packing, scale_rope

TINY = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip


def config(model_type: str = "llama", **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**TINY, **changes})


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_a_scaled_model_runs_at_twice_its_length_and_keeps_its_base(scaling: Any) -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(type=scaling, factor=2.0))
    assert scaled.rope_parameters["rope_type"] == scaling
    assert scaled.rope_parameters["rope_theta"] == config().rope_parameters["rope_theta"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(scaled).eval()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config()).eval()
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
        assert not torch.allclose(model(ids).logits, plain(ids).logits)


def test_dynamic_scaling_changes_nothing_within_the_models_own_length() -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(type="dynamic", factor=2.0))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(scaled).eval()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config()).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.arange(16)[None]).logits, plain(torch.arange(16)[None]).logits)


def test_linear_scaling_interpolates_positions() -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(factor=2.0))
    model, plain = AutoModelForCausalLM.from_config(scaled), AutoModelForCausalLM.from_config(config())
    assert torch.equal(model.model.rotary_emb.inv_freq * 2, plain.model.rotary_emb.inv_freq)


def test_a_linearly_scaled_model_sees_position_2p_as_its_base_sees_p() -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(factor=2.0))
    models = []
    for each in (config(), scaled):
        torch.manual_seed(0)
        models.append(AutoModelForCausalLM.from_config(each).eval())
    ids, positions = torch.arange(16)[None], torch.arange(16)[None]
    with torch.no_grad():
        plain = models[0](ids, position_ids=positions).logits
        torch.testing.assert_close(models[1](ids, position_ids=2 * positions).logits, plain)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(factor=2.0),
        RopeScalingConfig(target_length=1024),
        RopeScalingConfig(type="dynamic", target_length=1000),
        RopeScalingConfig(type="yarn", factor=2.0),
    ],
    ids=["linear by factor", "linear by length", "dynamic by length", "yarn by factor"],
)
def test_a_model_from_a_folder_is_loaded_scaled_and_runs_at_twice_its_length(
    scaling: RopeScalingConfig, model_dir: Path
) -> None:
    overrides = ConfigOverrides(rope_scaling=scaling)
    model: Any = load_model(
        str(model_dir), from_config=None, dtype="float32", attn_implementation="auto", quantization=None,
        vocab_size=320, overrides=overrides,
    )  # fmt: skip
    assert {key: model.config.rope_parameters[key] for key in ("rope_type", "factor")} == {
        "rope_type": scaling.type,
        "factor": 2.0,
    }
    plain: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.randint(320, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(ids).logits
        assert logits.isfinite().all()
        assert not torch.allclose(logits, plain(ids).logits, atol=1e-4)


@pytest.mark.parametrize(("target", "factor"), [(17, 2.0), (32, 2.0), (33, 3.0)])
def test_a_target_length_gives_the_ratio_rounded_up(target: int, factor: float) -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(target_length=target))
    assert scaled.rope_parameters["factor"] == factor


def test_yarn_stores_the_original_length_and_the_new_one() -> None:
    scaled = config()
    scale_rope(scaled, RopeScalingConfig(type="yarn", factor=4.0))
    assert scaled.rope_parameters["original_max_position_embeddings"] == 16
    assert scaled.max_position_embeddings == 64
    assert type(scaled).from_dict(scaled.to_dict()).rope_parameters == scaled.rope_parameters


def test_partial_rotary_factors_are_kept() -> None:
    scaled = config("gpt_neox", rotary_pct=0.5)
    before = scaled.rope_parameters["partial_rotary_factor"]
    scale_rope(scaled, RopeScalingConfig(factor=2.0))
    assert scaled.rope_parameters["partial_rotary_factor"] == before


def test_gemma_3_is_scaled_in_its_full_attention_layers() -> None:
    scaled = config("gemma3_text", num_key_value_heads=1, head_dim=8)
    scale_rope(scaled, RopeScalingConfig(factor=8.0))
    assert scaled.rope_parameters["full_attention"]["factor"] == 8.0
    assert scaled.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert AutoModelForCausalLM.from_config(scaled)(torch.arange(20)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "either factor or target_length"),
        ({"factor": 2.0, "target_length": 32}, "either factor or target_length"),
        ({"factor": 1.0}, "must be above 1"),
    ],
)
def test_a_scaling_out_of_range_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RopeScalingConfig(**values)


def test_a_target_length_within_the_models_context_is_refused() -> None:
    with pytest.raises(UserError, match="must be above the model's own context of 16 tokens"):
        scale_rope(config(), RopeScalingConfig(target_length=16))


def test_a_model_without_rotary_embeddings_is_refused() -> None:
    with pytest.raises(UserError, match="gpt2 models have no rotary"):
        scale_rope(AutoConfig.for_model("gpt2"), RopeScalingConfig(factor=2.0))


def test_dynamic_scaling_of_packed_rows_beyond_the_models_length_is_refused() -> None:
    dynamic, linear = RopeScalingConfig(type="dynamic", factor=2.0), RopeScalingConfig(factor=2.0)
    with pytest.raises(UserError, match="use linear or yarn"):
        check_packing(config(), dynamic, max_length=17)
    check_packing(config(), dynamic, max_length=16)
    check_packing(config(), linear, max_length=32)
