"""Write a merged Llama for Meta's own code: `consolidated.NN.pth`, one for each model-parallel rank, and `params.json`.

Meta's layout differs from transformers' in two ways. In the query and key projections, the rows of a head alternate
between the real and the imaginary part of the rotation (Su et al., 2021, arXiv:2104.09864); transformers stores all
real parts first. And each rank's file has its slice of every matrix, divided as fairscale's layers divide it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from sft_lightning.errors import UserError
from sft_lightning.models.base.weight_files import read_tensors, weight_files

# transformers' name → Meta's name, and the dimension that is divided over the ranks; `None`: each rank has all of it.
_OUTSIDE_LAYERS: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_IN_LAYER: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
_LLAMA_3_ROWS = 128_000
"""Vocabulary size from which a model is taken for a Llama 3, whose embeddings are divided by rows."""


@dataclass(frozen=True)
class MetaTensor:
    """Name and layout of a weight in Meta's files."""

    name: str
    """Meta's name."""

    dim: int | None
    """Dimension that is divided over the ranks; `None`: each rank has all of it."""

    heads: int | None
    """Number of heads whose rows are interleaved; `None`: the rows keep their order."""


def check_meta_format(config: PretrainedConfig, vocab_size: int, num_ranks: int) -> None:
    """Check, before anything is merged, that Meta's layout can represent a model.

    Args:
        config: The merged model's configuration.
        vocab_size: Rows of its embeddings.
        num_ranks: Files that the weights are divided into.

    Raises:
        UserError: If it cannot, or the weights cannot be divided evenly.
    """
    text: Any = config.get_text_config()
    if text.model_type != "llama":
        raise UserError(
            f"merge --format: pth is only available for Llama models (got a {text.model_type} model); use huggingface"
        )
    rope = text.rope_parameters["rope_type"]
    for found, what in (
        (rope not in ("default", "llama3"), f"{rope!r} position scaling"),
        (text.attention_bias or text.mlp_bias, "biases in linear layers"),
        (text.head_dim * text.num_attention_heads != text.hidden_size, f"heads of {text.head_dim} values"),
    ):
        if found:
            raise UserError(f"merge --format: pth cannot represent a model with {what}; use huggingface")
    divided = {"num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads}
    divided |= {"intermediate_size": text.intermediate_size, "hidden_size": text.hidden_size}
    for key, value in divided.items():
        if num_ranks < 1 or value % num_ranks:
            raise UserError(
                f"merge --model_parallel_size: must divide the model's {key} of {value} (got {num_ranks}); Meta's own "
                "Llama models use 1 (7B), 2 (13B), 4 (33B) or 8 (65B, 70B)"
            )
    if num_ranks > 1 and vocab_size >= _LLAMA_3_ROWS:
        raise UserError(
            f"merge --model_parallel_size: must be 1 for Llama 3, whose embeddings are divided in another way (got "
            f"{num_ranks}, with a vocabulary of {vocab_size})"
        )


def write_meta_checkpoint(source: Path, folder: Path, config: PretrainedConfig, *, num_ranks: int) -> list[Path]:
    """Write a Llama in Meta's layout, and compare every written value with the source.

    Args:
        source: Folder with the model in transformers' layout.
        folder: The folder to write to.
        config: The model's configuration, which `check_meta_format` has accepted.
        num_ranks: Files that the weights are divided into; one rank's tensors are in memory at a time.

    Returns:
        The weight files.

    Raises:
        RuntimeError: If a written value differs from the source.
    """
    files = []
    for rank in range(num_ranks):
        state = {
            layout.name: _slice(_interleaved(tensor, layout.heads), layout.dim, rank, num_ranks)
            for layout, tensor in _meta_tensors(source, config)
        }
        files.append(folder / f"consolidated.{rank:02d}.pth")
        torch.save(state, files[-1])
    rows = _verify(files, source, config)
    (folder / "params.json").write_text(json.dumps(meta_params(config, rows), indent=2) + "\n", encoding="utf-8")
    return files


def meta_params(config: PretrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Return the contents of `params.json`.

    Args:
        config: The model's configuration.
        vocab_size: Rows of its embeddings.
    """
    text: Any = config.get_text_config()
    params = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "vocab_size": vocab_size,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
        **_feed_forward(text.hidden_size, text.intermediate_size),
    }
    return params | ({"use_scaled_rope": True} if text.rope_parameters["rope_type"] == "llama3" else {})


def _feed_forward(dim: int, width: int) -> dict[str, Any]:
    """Return the parameters from which Meta's code computes the width of the feed-forward layers."""
    plain = int(2 * 4 * dim / 3)
    for multiple in (256, 1024, 4096):
        if math.ceil(plain / multiple) * multiple == width:
            return {"multiple_of": multiple}
    # Meta's code rounds the product down, and then up to the multiple.
    return {"multiple_of": math.gcd(width, 4096), "ffn_dim_multiplier": (width + 0.5) / plain}


def meta_tensor(name: str, config: PretrainedConfig) -> MetaTensor:
    """Return the name and layout that a weight of transformers' Llama has in Meta's files.

    Args:
        name: transformers' name.
        config: The model's configuration.

    Raises:
        RuntimeError: If Meta's layout has no such weight.
    """
    text: Any = config.get_text_config()
    if name in _OUTSIDE_LAYERS:
        return MetaTensor(*_OUTSIDE_LAYERS[name], heads=None)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _IN_LAYER:
        raise RuntimeError(f"Meta's layout has no weight for {name}")
    theirs, dim = _IN_LAYER[match[2]]
    heads = {"attention.wq": text.num_attention_heads, "attention.wk": text.num_key_value_heads}.get(theirs)
    return MetaTensor(f"layers.{match[1]}.{theirs}.weight", dim, heads)


def _meta_tensors(source: Path, config: PretrainedConfig) -> Iterator[tuple[MetaTensor, torch.Tensor]]:
    """Yield every weight; tied embeddings are yielded again as the head."""
    tied = config.get_text_config().tie_word_embeddings
    for file in weight_files(source):
        for name, tensor in read_tensors(file):
            if name == "lm_head.weight" and tied:
                continue
            yield meta_tensor(name, config), tensor
            if name == "model.embed_tokens.weight" and tied:
                yield meta_tensor("lm_head.weight", config), tensor


def _interleaved(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Alternate the rows of the first and the second half of each head, (heads · 2 · n, D) in and out."""
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _halved(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo `_interleaved`."""
    if heads is None:
        return weight
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _slice(weight: torch.Tensor, dim: int | None, rank: int, num_ranks: int) -> torch.Tensor:
    """Return a rank's slice; the last rank takes the remainder, which only a vocabulary can have."""
    if dim is None:
        return weight.clone()
    size = weight.shape[dim] // num_ranks
    end = weight.shape[dim] if rank == num_ranks - 1 else (rank + 1) * size
    return weight.narrow(dim, rank * size, end - rank * size).clone()


def _verify(files: list[Path], source: Path, config: PretrainedConfig) -> int:
    """Compare the written files with the source, bit for bit; return the rows of the embeddings."""
    ranks = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    seen, rows = set(), 0
    for layout, tensor in _meta_tensors(source, config):
        parts = [rank[layout.name] for rank in ranks]
        joined = parts[0] if layout.dim is None else torch.cat(parts, layout.dim)
        if not torch.equal(_halved(joined, layout.heads), tensor):
            raise RuntimeError(f"{files[0]}: the written values of {layout.name} differ from the merged model's")
        seen.add(layout.name)
        rows = len(tensor) if layout.name == "tok_embeddings.weight" else rows
    if any(rank.keys() != seen for rank in ranks):
        raise RuntimeError(f"{files[0]}: its tensors are not those of the merged model")
    return rows
