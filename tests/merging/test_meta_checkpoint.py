from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.merging import meta_checkpoint
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.meta_checkpoint import (
    check_meta_format,
    meta_params,
    meta_tensor,
    write_meta_checkpoint,
)
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 8, 4, 8


def llama(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": 51, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


def saved(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="30KB")
    return folder


def written(folder: Path, config: LlamaConfig, num_ranks: int = 1) -> list[dict[str, torch.Tensor]]:
    """The ranks' tensors of a random Llama; its safetensors are in `source` beside them."""
    folder.mkdir(exist_ok=True)
    files = write_meta_checkpoint(saved(folder / "source", config), folder, config, num_ranks=num_ranks)
    return [torch.load(file, weights_only=True) for file in files]


def joined(ranks: list[dict[str, torch.Tensor]], config: LlamaConfig, source: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the source, joined from the ranks' slices by concatenation."""
    names = {name for file in source.glob("*.safetensors") for name in load_file(file)}
    found = {}
    for name in names:
        to = meta_tensor(name, config)
        parts = [rank[to.name] for rank in ranks]
        found[name] = parts[0] if to.dim is None else torch.cat(parts, to.dim)
    return found


def forward_as_meta(state: dict[str, torch.Tensor], params: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Llama by the rules of Meta's `llama/model.py`: adjacent rows of a head are one complex number."""
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    size, length = dim // heads, len(ids)
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(2)

    x = state["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in state.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, layer["attention_norm.weight"])
        q = turned((h @ layer["attention.wq.weight"].T).view(length, heads, size))
        k = turned((h @ layer["attention.wk.weight"].T).view(length, kv_heads, size))
        v = (h @ layer["attention.wv.weight"].T).view(length, kv_heads, size)
        k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores + torch.full((length, length), -math.inf).triu(1)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, dim)
        x = x + attended @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ layer["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_metas_own_arithmetic_gives_the_same_logits_with_fewer_key_value_heads(tied: bool, tmp_path: Path) -> None:
    config = llama(tie_word_embeddings=tied)
    (state,) = written(tmp_path, config)
    params = json.loads((tmp_path / "params.json").read_text())
    ids = torch.arange(20)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()(ids[None]).logits[0]
    torch.testing.assert_close(forward_as_meta(state, params, ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_files_joined_together_are_the_source_to_the_last_bit(num_ranks: int, tmp_path: Path) -> None:
    config = llama()
    ranks = written(tmp_path, config, num_ranks)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == num_ranks
    whole = joined(ranks, config, tmp_path / "source")
    source = {name: t for file in (tmp_path / "source").glob("*.safetensors") for name, t in load_file(file).items()}
    for name, tensor in whole.items():
        heads = {"q_proj": HEADS, "k_proj": KEY_VALUE_HEADS}.get(name.split(".")[-2])
        if heads is not None:  # row 2i of a head is its row i, row 2i + 1 the one half a head further
            order = [h * HEAD_DIM + i + half for h in range(heads) for i in range(HEAD_DIM // 2) for half in (0, 4)]
            assert torch.equal(tensor, source[name][order])
        else:
            assert torch.equal(tensor, source[name])


def test_ranks_divide_each_matrix_as_fairscale_does(tmp_path: Path) -> None:
    first, last = written(tmp_path, llama(), 2)
    shapes = {name.removeprefix("layers.0."): tuple(t.shape) for name, t in first.items() if "layers.1" not in name}
    assert shapes == {
        "tok_embeddings.weight": (51, 32), "norm.weight": (64,), "output.weight": (25, 64),
        "attention.wq.weight": (32, 64), "attention.wk.weight": (16, 64), "attention.wv.weight": (16, 64),
        "attention.wo.weight": (64, 32), "feed_forward.w1.weight": (48, 64), "feed_forward.w2.weight": (64, 48),
        "feed_forward.w3.weight": (48, 64), "attention_norm.weight": (64,), "ffn_norm.weight": (64,),
    }  # fmt: skip
    assert last["output.weight"].shape == (26, 64)  # the last rank takes the remainder
    assert torch.equal(first["norm.weight"], last["norm.weight"])


def metas_width(params: dict[str, Any]) -> int:
    """The feed-forward layers' width, as `llama/model.py` computes it."""
    width = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


@pytest.mark.parametrize(
    ("dim", "width"),
    [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (4096, 14336), (64, 96), (64, 97)],
)
def test_metas_code_computes_the_width_that_the_model_has(dim: int, width: int) -> None:
    params = meta_params(llama(hidden_size=dim, intermediate_size=width), 32_000)
    assert metas_width(params) == width
    assert params["vocab_size"] == 32_000
    assert params["rope_theta"] == 5e5


def test_llama_3s_position_scaling_is_in_the_parameters() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert meta_params(llama(rope_parameters=rope), 51)["use_scaled_rope"] is True
    assert "use_scaled_rope" not in meta_params(llama(), 51)


@pytest.mark.parametrize(
    ("config", "num_ranks", "said"),
    [
        (
            AutoConfig.for_model("mistral"),
            1,
            r"only available for Llama models \(got a mistral model\)",
        ),
        (llama(attention_bias=True), 1, "cannot represent a model with biases in linear layers"),
        (llama(head_dim=16), 1, "heads of 16 values"),
        (
            llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            1,
            "'linear' position",
        ),
        (llama(), 3, r"must divide the model's num_attention_heads of 8 \(got 3\)"),
        (llama(), 8, r"must divide the model's num_key_value_heads of 4 \(got 8\)"),
        (llama(), 0, r"must divide .* \(got 0\)"),
        (llama(vocab_size=128_256), 2, "must be 1 for Llama 3, whose embeddings are divided in another way"),
    ],
)
def test_a_model_that_metas_layout_cannot_represent_is_refused(config: Any, num_ranks: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_meta_format(config, config.vocab_size, num_ranks)


def test_a_file_that_differs_from_the_source_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_checkpoint, "_interleaved", lambda weight, heads: weight)
    with pytest.raises(RuntimeError, match=r"written values of .*wq\.weight differ from the merged"):
        written(tmp_path, llama())


def test_an_adapter_is_merged_into_metas_format(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", llama())
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    own.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), AdapterConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20)
    with torch.no_grad():
        expected = model.eval()(ids[None]).logits[0]
    options = MergeOptions(format="pth", model_parallel_size=2)
    report = merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"), options)
    assert report.difference is not None
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", "tokenizer.json",
        "tokenizer_config.json", "README.md", "run_manifest.json",
    }  # fmt: skip
    assert "library_name" not in (tmp_path / "merged/README.md").read_text()
    ranks = [torch.load(tmp_path / f"merged/consolidated.0{i}.pth", weights_only=True) for i in range(2)]
    whole = joined(ranks, llama(), base)
    state = {meta_tensor(name, llama()).name: tensor for name, tensor in whole.items()}
    params = json.loads((tmp_path / "merged/params.json").read_text())
    torch.testing.assert_close(forward_as_meta(state, params, ids), expected, atol=1e-4, rtol=1e-3)


def test_another_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = saved(tmp_path / "base", AutoConfig.for_model("qwen2", vocab_size=51, **shape, num_key_value_heads=1))
    add_adapter(AutoModelForCausalLM.from_pretrained(base), AdapterConfig(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="got a qwen2 model"):
        merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"), MergeOptions(format="pth"))
    assert not (tmp_path / "merged").exists()


def test_several_files_without_the_format_are_refused() -> None:
    with pytest.raises(UserError, match="model_parallel_size: 2 is only valid with --format pth"):
        MergeOptions(model_parallel_size=2)
