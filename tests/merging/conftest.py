"""Small bases, adapters and quantized runs to merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.base.quantization import load_quantized
from sft_lightning.models.export.write import export_adapter

IDS = torch.arange(20)[None]


def _llama_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**values, **changes})


def _make_base(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def _make_adapter(
    base: Path, folder: Path, config: PeftConfig | AdapterConfig | None = None, seed: int = 0, vocab_size: int = 0
) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            old = AutoConfig.from_pretrained(base).vocab_size
            matrix.data[old:] = matrix.data[:old].mean(0)
    config = AdapterConfig(r=2) if config is None else config
    model = add_adapter(model, config) if isinstance(config, AdapterConfig) else get_peft_model(model, config)
    _train_a_little(model, seed).save_pretrained(folder, save_embedding_layers=False)
    return folder


def _train_a_little(model: PeftModel, seed: int = 0) -> PeftModel:
    """Move what trains as training would, further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def _load_model(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def _assert_merged(base: Path, adapter: Path, merged: Path, tolerance: float = 1e-4) -> None:
    """The merged folder answers like the base under its adapter, through plain PEFT."""
    adapted = PeftModel.from_pretrained(_load_model(base), adapter).eval()
    torch.testing.assert_close(_logits(_load_model(merged)), _logits(adapted), atol=tolerance, rtol=0)


def _make_quantized_run(base: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, bits: int) -> Path:
    model = load_quantized(str(base), QuantizationConfig(bits=bits), dtype=torch.float32)
    manifest = {"dtype": "float32", "quantization": {"bits": bits, "quant_type": "nf4", "double_quant": True}}
    export_adapter(
        _train_a_little(add_adapter(model, AdapterConfig(r=2))), tokenizer, folder, manifest, stop_token_id=2
    )
    return folder


@pytest.fixture
def llama_config() -> Callable[..., LlamaConfig]:
    return _llama_config


@pytest.fixture
def make_base() -> Callable[..., Path]:
    return _make_base


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    return _make_adapter


@pytest.fixture
def train_a_little() -> Callable[..., PeftModel]:
    return _train_a_little


@pytest.fixture
def load_model() -> Callable[..., PreTrainedModel]:
    return _load_model


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    return _logits


@pytest.fixture
def assert_merged() -> Callable[..., None]:
    return _assert_merged


@pytest.fixture
def make_quantized_run() -> Callable[..., Path]:
    return _make_quantized_run


@pytest.fixture
def adapter(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "adapter")
    return _make_adapter(model_dir, tmp_path / "adapter")
