"""Covers sft_lightning.models.adapters and sft_lightning.models.export: every kind of tuning, trained and exported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import train_only, trainable_base_names
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.loading import load_model
from sft_lightning.models.export.write import export_adapter, export_model
from sft_lightning.training.optim import build_optimizer, parameter_groups

IDS = torch.arange(3, 43)[None]
LORA, EVERYTHING = r"\.lora_[AB]\.", r""


@dataclass(frozen=True)
class Mode:
    learns: str
    """A regular expression found in the names of exactly the parameters that change."""

    adapter: dict[str, Any] | None = field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    trainable: list[str] | None = None
    dtype: str = "float32"


def four_bits(**values: Any) -> QuantizationConfig:
    return QuantizationConfig(bits=4, **values)


MODES = {
    "full": Mode(EVERYTHING, None),
    "freeze": Mode(r"layers\.1\.mlp|lm_head", None, trainable=[r"layers\.1\.mlp", "lm_head"]),
    "lora": Mode(LORA),
    "lora attention": Mode(r"self_attn\..*" + LORA, {"target_modules": "attention"}),
    "lora mlp": Mode(r"mlp\..*" + LORA, {"target_modules": "mlp"}),
    "lora regex": Mode(r"layers\.0\..*" + LORA, {"target_modules": r".*layers\.0\..*_proj"}),
    "lora of one layer": Mode(r"layers\.1\..*" + LORA, {"layers_to_transform": [1]}),
    "rank pattern": Mode(LORA, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 6}}),
    "dora": Mode(LORA + "|lora_magnitude_vector", {"use_dora": True}),
    "rslora": Mode(LORA, {"use_rslora": True}),
    "gaussian": Mode(LORA, {"init": "gaussian"}),
    "pissa": Mode(LORA, {"init": "pissa"}),
    "olora": Mode(LORA, {"init": "olora"}),
    "orthogonal": Mode(LORA, {"init": "orthogonal"}),
    "lora+": Mode(LORA, {"lora_plus_ratio": 16.0}),
    "modules to save": Mode(LORA + "|modules_to_save", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules to save in bfloat16": Mode(
        LORA + "|modules_to_save", {"modules_to_save": ["embed_tokens", "lm_head"]}, dtype="bfloat16"
    ),
    "lora and the base": Mode(
        LORA + r"|embed_tokens|norm|lm_head|mlp\.",
        {"target_modules": "attention", "only_adapter": False, "base_lr": 1e-3},
    ),
    "alpha 1": Mode(LORA, {"alpha": 1}),
    "ia3": Mode(
        r"\.ia3_l\.",
        {"peft_config": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])},
    ),
    "lora by class_path": Mode(LORA, {"peft_config": LoraConfig(r=2, target_modules="all-linear")}),
    "qlora nf4 double": Mode(LORA, quantization=four_bits()),
    "qlora nf4": Mode(LORA, quantization=four_bits(double_quant=False)),
    "qlora fp4 double": Mode(LORA, quantization=four_bits(quant_type="fp4")),
    "qlora fp4": Mode(LORA, quantization=four_bits(quant_type="fp4", double_quant=False)),
    "qlora stored as uint8": Mode(LORA, quantization=four_bits(storage_dtype="uint8")),
    "qlora dora": Mode(LORA + "|lora_magnitude_vector", {"use_dora": True}, four_bits()),
    "qlora, norms too": Mode(
        LORA + "|norm|embed_tokens|lm_head", {"only_adapter": False}, four_bits(), dtype="bfloat16"
    ),
    "qlora and the head": Mode(LORA + "|modules_to_save", {"modules_to_save": ["lm_head"]}, four_bits()),
    "int8 lora": Mode(LORA, quantization=QuantizationConfig(bits=8)),
}


def build(mode: Mode, model_dir: Path) -> PreTrainedModel | PeftModel:
    torch.manual_seed(0)
    base = load_model(
        str(model_dir),
        from_config=None,
        dtype=mode.dtype,  # type: ignore[arg-type]
        attn_implementation="sdpa",
        quantization=mode.quantization,
        vocab_size=320,
    )
    if mode.adapter is not None:
        lora = {} if "peft_config" in mode.adapter else {"r": 4, "dropout": 0.0}
        return add_adapter(base, AdapterConfig(**{**lora, **mode.adapter}))
    if mode.trainable is not None:
        train_only(base, mode.trainable)
    return base


def take_steps(model: PreTrainedModel | PeftModel, mode: Mode, num_steps: int = 2) -> None:
    """Take two steps, because LoRA's A has no gradient while B is zero."""
    options = {key: (mode.adapter or {}).get(key) for key in ("base_lr", "lora_plus_ratio")}
    groups = parameter_groups(model.named_parameters(), base_names=trainable_base_names(model), **options)
    optimizer = build_optimizer(lambda given: torch.optim.AdamW(given, lr=1e-2), groups)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits: packed 4-bit weights may read as NaN in the type that they are stored as."""
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (one, other)))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", MODES)
def test_steps_change_exactly_the_intended_weights(name: str, model_dir: Path) -> None:
    mode = MODES[name]
    model = build(mode, model_dir)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    take_steps(model, mode)
    changed = {key for key, p in model.named_parameters() if not same_bits(p, before[key])}
    meant = {key for key in before if re.search(mode.learns, key) and ".original_module." not in key}
    assert changed == meant
    assert all(p.isfinite().all() for key, p in model.named_parameters() if key in changed)


RELOADED = [name for name, mode in MODES.items() if mode.adapter is not None and mode.adapter.get("only_adapter", True)]


@pytest.mark.parametrize("name", RELOADED)
def test_an_exported_adapter_loads_with_plain_peft(
    name: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mode = MODES[name]
    model = build(mode, model_dir)
    fresh = logits(model)
    take_steps(model.train(), mode)
    assert isinstance(model, PeftModel)
    export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    base = build(Mode(EVERYTHING, None, mode.quantization, dtype=mode.dtype), model_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = logits(model)
    # A base in 16 bits takes the float32 masters of modules_to_save rounded to its own type.
    tolerance = 0.05 if mode.dtype == "bfloat16" else 1e-5
    assert float((logits(loaded) - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert float((expected - fresh).abs().max()) > 2 * tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", RELOADED)
def test_an_exported_adapter_is_continued_with_the_same_logits(
    name: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mode = MODES[name]
    model = build(mode, model_dir)
    take_steps(model, mode)
    assert isinstance(model, PeftModel)
    export_adapter(model, tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    continued = build(
        Mode(mode.learns, {"path": str(tmp_path / "adapter")}, mode.quantization, dtype=mode.dtype), model_dir
    )
    assert torch.equal(logits(continued), logits(model))
    trains = [{key for key, p in m.named_parameters() if p.requires_grad} for m in (continued, model)]
    assert trains[0] == trains[1]


@pytest.mark.parametrize("name", ["full", "freeze"])
def test_an_exported_model_loads_with_plain_transformers(
    name: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build(MODES[name], model_dir)
    take_steps(model, MODES[name])
    assert isinstance(model, PreTrainedModel)
    export_model(model, tokenizer, tmp_path / "model", {}, stop_token_id=2)
    assert torch.equal(logits(build(Mode(EVERYTHING, None), tmp_path / "model")), logits(model))


def test_alpha_1_scales_as_deepspeed_chat_does(model_dir: Path) -> None:
    model = build(Mode(LORA, {"alpha": 1}), model_dir)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    scalings = {value for layer in layers for value in layer.scaling.values()}
    assert scalings == {1 / 4}


def test_a_tied_head_computes_in_the_type_of_its_trained_matrix(tokenizer: PreTrainedTokenizerFast) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = add_adapter(base, AdapterConfig(r=2, modules_to_save=["embed_tokens"]))
    logits = model(input_ids=torch.tensor([[1, 5, 7]])).logits
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "modules_to_save" in name} == {torch.float32}
