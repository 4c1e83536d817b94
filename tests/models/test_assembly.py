from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trained_base import base_fingerprint
from sft_lightning.models.assembly import assemble_model, copies_weights, load_base
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.rope import RopeScalingConfig
from sft_lightning.models.spec import ModelSpec


def assemble(model_dir: Path, tokenizer: PreTrainedTokenizerFast, **keys: Any) -> tuple[Any, list[str]]:
    log: list[str] = []
    spec = ModelSpec(model_name_or_path=str(model_dir), dtype="float32", **keys)
    return assemble_model(spec, tokenizer, log=log.append), log


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_without_adapter_all_parameters_train(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, log = assemble(model_dir, tokenizer)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert model.training
    assert log == []


def test_trainable_freezes_all_other_parameters(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = assemble(model_dir, tokenizer, trainable=["lm_head"])
    assert trained(model) == {"lm_head.weight"}


def test_an_adapter_is_all_that_trains_on_a_quantized_base(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = assemble(model_dir, tokenizer, quantization=QuantizationConfig(), adapter=AdapterConfig(r=2))
    assert isinstance(model, PeftModel)
    assert all(".lora_" in name for name in trained(model))
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())


def test_an_adapter_that_cannot_be_on_a_quantized_base_is_refused_before_loading(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(UserError, match=r"model\.adapter\.init: 'pissa' starts from the base's own weights"):
        assemble(
            Path("no/such/model"), tokenizer, quantization=QuantizationConfig(), adapter=AdapterConfig(init="pissa")
        )


def test_the_vocabulary_is_rounded_up_and_the_log_says_so(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, log = assemble(model_dir, tokenizer, pad_to_multiple_of=128)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 128 == 0
    assert log == [f"vocabulary: {len(tokenizer)} → {rows} rows; new rows start at the mean of the old ones"]


def test_attention_that_ignores_documents_gets_a_mask_and_the_log_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    log: list[str] = []
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}
    spec = ModelSpec(from_config=bloom, dtype="float32")
    assemble_model(spec, tokenizer, log=log.append)
    assert log == ["attention: bloom's own, with a mask that keeps documents apart"]


@pytest.fixture
def scaled_adapter(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """An adapter that was trained with a RoPE scaling and 8 more rows, with its manifest."""
    rope = RopeScalingConfig(factor=4.0)
    model, _ = assemble(model_dir, tokenizer, adapter=AdapterConfig(r=2), rope_scaling=rope)
    model.save_pretrained(tmp_path / "adapter")
    facts = {
        "base_fingerprint": base_fingerprint(str(model_dir)),
        "rope_parameters": model.config.rope_parameters,
        "vocab_size": len(tokenizer) + 8,
    }
    (tmp_path / "adapter" / "run_manifest.json").write_text(json.dumps(facts))
    return tmp_path / "adapter"


def test_a_continued_adapter_gets_the_rope_and_the_rows_that_it_was_trained_with(
    scaled_adapter: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, log = assemble(model_dir, tokenizer, adapter=AdapterConfig(path=str(scaled_adapter)))
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 8
    assert any(line.startswith("model.rope_scaling: rope_parameters: {'rope") for line in log)


def test_a_rope_scaling_of_the_configuration_replaces_the_continued_adapters(
    scaled_adapter: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = {"adapter": AdapterConfig(path=str(scaled_adapter)), "rope_scaling": RopeScalingConfig(factor=8.0)}
    model, log = assemble(model_dir, tokenizer, **own)
    assert model.config.rope_parameters["factor"] == 8.0
    (line,) = [line for line in log if line.startswith("model.rope_scaling")]
    assert re.search(r"'factor': 8.0.* as set; the adapter in .* was trained with .*'factor': 4.0", line)


def test_an_adapter_is_not_continued_on_another_base(scaled_adapter: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = ModelSpec(from_config={"model_type": "llama"}, adapter=AdapterConfig(path=str(scaled_adapter)))
    with pytest.raises(UserError, match=r"model\.adapter\.path: .* 'model\.from_config' has other weights"):
        assemble_model(spec, tokenizer, log=print)


@pytest.mark.parametrize("pad", [False, True])
def test_dropped_embeddings_of_an_extended_vocabulary_keep_their_values(
    pad: bool, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["<new>"])
    tokens = {"add_tokens": ["<new>"], "resize_vocabulary": True}
    first, _ = assemble(
        model_dir, extended, **tokens, adapter=AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])
    )
    torch.nn.init.normal_(first.get_input_embeddings().weight, std=0.1)
    torch.nn.init.normal_(first.get_output_embeddings().weight, std=0.1)
    first.save_pretrained(tmp_path, save_embedding_layers=False)
    if pad:  # a row that the adapter does not have, and that nothing looks at
        extended.add_special_tokens({"pad_token": "[PAD]"})
    adapter = AdapterConfig(path=str(tmp_path), drop_modules_to_save=True)
    continued, log = assemble(model_dir, extended, **tokens, adapter=adapter)
    ids, rows = torch.arange(5, 17)[None], len(tokenizer) + 1
    with torch.no_grad():
        expected = first.eval()(input_ids=ids).logits
        found = continued.eval()(input_ids=ids).logits
    assert found.shape[-1] == rows + pad
    torch.testing.assert_close(found[..., :rows], expected, atol=1e-6, rtol=0)
    assert all(".lora_" in name for name in trained(continued))
    assert any("2 weights of the base that were trained with the adapter" in line for line in log)


def test_weights_are_mapped_if_they_have_the_type_of_the_files(model_dir: Path) -> None:
    assert not copies_weights(ModelSpec(model_name_or_path=str(model_dir), dtype="float32"))
    assert copies_weights(ModelSpec(model_name_or_path=str(model_dir), dtype="bfloat16"))
    assert copies_weights(ModelSpec(from_config={"model_type": "llama"}))


def test_neither_a_name_nor_a_configuration_is_an_error() -> None:
    with pytest.raises(UserError, match="set either model_name_or_path or from_config"):
        load_base(ModelSpec(), 10)
