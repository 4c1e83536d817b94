from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.base.overrides import ConfigOverrides
from sft_lightning.models.base.rope import RopeScalingConfig

TINY = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def load(name: str | None, **changes: Any) -> torch.nn.Module:
    options: dict[str, Any] = {
        "from_config": None, "dtype": "float32", "attn_implementation": "auto", "quantization": None, "vocab_size": 99,
    }  # fmt: skip
    return load_model(name, **{**options, **changes})


def test_a_folder_loads_in_the_dtype_asked_for_and_in_training_mode(model_dir: Path) -> None:
    model = load(str(model_dir), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training


def test_a_config_makes_a_random_model_of_the_tokenizers_vocabulary() -> None:
    model = load(None, from_config={**TINY, "intermediate_size": 32})
    assert model.get_input_embeddings().num_embeddings == 99  # type: ignore[operator]


def test_a_config_makes_a_quantized_model() -> None:
    shape = {**TINY, "hidden_size": 64, "intermediate_size": 64}
    model = load(None, from_config=shape, quantization=QuantizationConfig(), dtype="bfloat16")
    assert model.is_loaded_in_4bit
    assert model.training


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (None, {}, "either model_name_or_path or from_config"),
        ("x", {"from_config": TINY}, "either model_name_or_path or from_config"),
        (None, {"from_config": {**TINY, "vocab_size": 9}}, "must be at least the tokenizer's 99 (got 9)"),
        (None, {"from_config": {"model_type": "lama"}}, "model.from_config"),
        ("./nowhere", {}, "does not exist"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(
    name: str | None, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as error:
        load(name, **changes)
    assert said in str(error.value)


def test_a_broken_config_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load a model"):
        load(str(tmp_path))


def test_4_bit_weights_do_not_change_when_the_model_is_evaluated(model_dir: Path) -> None:
    model = load(str(model_dir), quantization=QuantizationConfig())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.eval()(ids)
        after = model.train()(ids).logits
    assert torch.equal(before, after)


def test_a_base_loaded_in_8_bit_runs(model_dir: Path) -> None:
    model = load(str(model_dir), quantization=QuantizationConfig(bits=8))
    assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_overrides_are_applied_before_the_weights_are_loaded(model_dir: Path) -> None:
    overrides = ConfigOverrides(rope_scaling=RopeScalingConfig(type="dynamic", factor=2.0), dropout=0.5)
    for options in ({}, {"quantization": QuantizationConfig()}):
        model = load(str(model_dir), overrides=overrides, **options)
        assert model.config.rope_parameters["rope_type"] == "dynamic"  # type: ignore[union-attr]
        assert model.model.layers[0].self_attn.attention_dropout == 0.5  # type: ignore[union-attr,index]
        assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32}


def test_overrides_are_applied_to_a_model_from_a_config() -> None:
    made = load(None, from_config={**TINY, "intermediate_size": 32}, overrides=ConfigOverrides(dropout=0.25))
    assert made.config.attention_dropout == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("t5", "'t5' is an encoder-decoder"),
        ("bart", "'bart' is an encoder-decoder; FastChat and Vigogne trained T5: use transformers' Seq2SeqTrainer"),
        ("bert", "'bert' is a masked language model"),
        ("vit", "'vit' is not a language model"),
    ],
)
def test_a_model_that_is_not_a_causal_language_model_is_refused_before_its_weights_are_read(
    model_type: str, said: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(
        UserError, match=rf"model.model_name_or_path: must be a causal \(decoder-only\) language model \({said}"
    ):
        load(str(tmp_path))
    with pytest.raises(UserError, match=rf"model.from_config: must be a causal .* \({said}"):
        load(None, from_config={"model_type": model_type})


def test_attention_that_keeps_documents_apart_is_chosen_by_the_family() -> None:
    own = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    assert load(None, from_config=own).config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert load(None, from_config=TINY).config._attn_implementation == PACKED  # type: ignore[union-attr]
