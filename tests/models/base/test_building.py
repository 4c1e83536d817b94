from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import AutoConfig, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base import building
from sft_lightning.models.base.building import build_model
from sft_lightning.models.base.config import QuantizationConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 128, "tie_word_embeddings": True},
    "gpt2": {"bos_token_id": 1, "eos_token_id": 2},  # its layers are of type Conv1D, and have biases
    "falcon": {"bias": True},
}


def built(model_type: str, bits: int | None = None, **changes: Any) -> PreTrainedModel:
    values = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **{**values, **SHAPES[model_type], **changes})
    torch.manual_seed(0)
    return build_model(
        config,
        None if bits is None else QuantizationConfig(bits=bits),
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", SHAPES)
def test_random_weights_are_quantized_and_nothing_stays_on_the_meta_device(model_type: str, bits: int) -> None:
    model = built(model_type, bits)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit if bits == 4 else Linear8bitLt)]
    assert len(layers) == 2 * {"llama": 7, "gpt2": 4, "falcon": 4}[model_type]
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert model.config.quantization_config.load_in_4bit == (bits == 4)
    with torch.no_grad():
        logits = model(torch.arange(16)[None], use_cache=False).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_quantized_weights_are_those_that_the_model_would_draw() -> None:
    model: Any = built("llama", 4, initializer_range=0.5)
    layer = model.model.layers[0].mlp.up_proj
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.shape == (128, 64)
    assert weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.norm.weight == 1).all()


def test_an_adapter_trains_on_a_random_4_bit_base() -> None:
    model = add_adapter(built("llama", 4), AdapterConfig(r=4, dropout=0.0))
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_a_model_without_layers_to_quantize_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        building,
        "bypassed_modules",
        lambda config: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    with pytest.raises(UserError, match=r"model\.quantization: transformers quantized no layer of this llama model"):
        built("llama", 4)


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The meta device stands for a GPU: weights that are drawn there need no memory."""
    device = torch.device("meta")
    monkeypatch.setattr(building, "fastest_device", lambda: device)
    return device


def test_weights_are_made_on_the_gpu_unless_a_strategy_shards_them(meta_gpu: torch.device) -> None:
    config = AutoConfig.for_model("llama", vocab_size=60, hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    assert {p.device for p in build_model(config, None).parameters()} == {meta_gpu}
    assert {p.device.type for p in build_model(config, None, on_cpu=True).parameters()} == {"cpu"}


def test_weights_are_made_on_the_device_of_a_context() -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in built("llama").parameters())
