from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.models.adapters import AdapterConfig, add_adapter


def adapted(model_dir: Path, **config: Any) -> torch.nn.Module:
    return add_adapter(AutoModelForCausalLM.from_pretrained(model_dir), AdapterConfig(**config))


def trainable(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_adapts_every_linear_layer_but_the_head(model_dir: Path) -> None:
    names = trainable(adapted(model_dir, r=2))
    assert len(names) == 2 * 7 * 2
    assert not any("lm_head" in name for name in names)


def test_the_number_of_weights_is_that_of_the_formula(model_dir: Path) -> None:
    sizes = trainable(adapted(model_dir, r=2, target_modules=["q_proj", "v_proj"]))
    assert sum(sizes.values()) == 2 * (2 * (32 + 32) + 2 * (32 + 16))


def test_modules_to_save_train_in_full(model_dir: Path) -> None:
    names = trainable(adapted(model_dir, modules_to_save=["lm_head"]))
    assert any("lm_head.modules_to_save" in name for name in names)


def test_adapter_weights_are_float32_on_a_bfloat16_base(model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = add_adapter(base, AdapterConfig(r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("config", [{"use_dora": True}, {"use_rslora": True}, {"init": "pissa"}, {"bias": "all"}])
def test_pefts_variants_pass_through(config: dict[str, Any], model_dir: Path) -> None:
    assert trainable(adapted(model_dir, r=2, **config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["q_proj", "queries"]}, "'queries' matches no module"),
        ({"target_modules": "nothing.*"}, "PEFT refuses"),
        ({"modules_to_save": ["lm_haed"]}, "Did you mean 'lm_head'"),
        ({"path": "nowhere"}, "cannot load an adapter"),
    ],
)
def test_what_matches_nothing_is_an_error(config: dict[str, Any], said: str, model_dir: Path) -> None:
    with pytest.raises(UserError, match=said):
        adapted(model_dir, **config)


def test_an_adapter_is_continued_with_its_own_configuration(model_dir: Path, tmp_path: Path) -> None:
    adapted(model_dir, r=2).save_pretrained(str(tmp_path))  # type: ignore[operator]
    continued = adapted(model_dir, r=16, path=str(tmp_path))
    assert continued.peft_config["default"].r == 2  # type: ignore[index,union-attr]
    assert trainable(continued)
