from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PrefixTuningConfig
from safetensors.torch import load_file, save_file

from sft_lightning.errors import UserError
from sft_lightning.merging.layers import empty_model, reason_for_whole_model, tied_parameter_names
from sft_lightning.merging.merge import MergeOptions, merge_adapters

Make = Callable[..., Any]
"""A helper of conftest.py."""


def test_an_adapter_with_a_tensor_missing_or_left_over_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"missing {name}, left over none"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))
    stranger = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}
    save_file({**weights, **stranger}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"missing none, left over base_model.model.model.layers.9"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"))


def test_an_adapter_of_another_shape_is_refused(
    adapter: Path, tmp_path: Path, llama_config: Make, make_base: Make
) -> None:
    other = make_base(tmp_path / "other", llama_config(320, hidden_size=64))
    with pytest.raises(UserError, match=r"does not fit this base: .* expected"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path=str(other)))


def test_an_empty_model_takes_no_memory_and_keeps_ties(llama_config: Make) -> None:
    model = empty_model(llama_config(64, tie_word_embeddings=True), vocab_size=80)
    weight = model.get_input_embeddings().weight
    assert weight.shape == (80, 32)
    assert weight.untyped_storage().nbytes() == 4
    assert weight is model.get_output_embeddings().weight
    assert tied_parameter_names(model) == [["model.embed_tokens.weight", "lm_head.weight"]]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(), None),
        (LoHaConfig(), None),
        (LoraConfig(init_lora_weights="olora"), "init_lora_weights 'olora' changes the base"),
        (LoraConfig(target_parameters=["experts"]), "target_parameters changes more than one weight"),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PEFT merges PREFIX_TUNING adapters only",
        ),
    ],
    ids=["lora", "loha", "olora", "target_parameters", "prefix tuning"],
)
def test_an_adapter_says_why_it_needs_the_whole_model(config: PeftConfig, reason: str | None, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    found = reason_for_whole_model(tmp_path)
    assert found is None if reason is None else reason in str(found)
