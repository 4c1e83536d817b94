"""A merged Llama as Meta's own code reads it: `consolidated.NN.pth`, one for each model-parallel rank, `params.json`.

Two things are laid out otherwise than by transformers. The rows of the query and key projections of a head alternate
between the real and the imaginary parts of the rotation there (Su et al., 2021, arXiv:2104.09864), where transformers
has all real parts first. And each rank's file holds its slice of every matrix, as fairscale's layers divide them.
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

# transformers' name → Meta's, and the dimension that ranks divide; `None`: every rank has all of it.
_WHOLE: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_OF_LAYER: dict[str, tuple[str, int | None]] = {
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
"""Vocabulary from which on Meta's code is Llama 3's, whose ranks divide the embeddings by rows."""


@dataclass(frozen=True)
class MetaTensor:
    """Where a weight goes."""

    name: str
    """Meta's."""

    dim: int | None
    """Dimension that ranks divide; `None`: every rank has all of it."""

    heads: int | None
    """Heads whose rows are to be interleaved; `None`: as they are."""


def check_meta_format(config: PretrainedConfig, vocab_size: int, num_ranks: int) -> None:
    """Check that Meta's code has a place for everything that a model has, before it is merged.

    Args:
        config: The merged model's.
        vocab_size: Rows of its embeddings.
        num_ranks: Files to divide it into.

    Raises:
        UserError: If it has not, or the ranks cannot share the model.
    """
    text: Any = config.get_text_config()
    if text.model_type != "llama":
        raise UserError(
            f"merge --format: pth is Meta's format of Llama, and this is a {text.model_type} model; use huggingface"
        )
    rope = text.rope_parameters["rope_type"]
    for found, what in (
        (rope not in ("default", "llama3"), f"{rope!r} scaling of its positions"),
        (text.attention_bias or text.mlp_bias, "biases in its linear layers"),
        (text.head_dim * text.num_attention_heads != text.hidden_size, f"heads of {text.head_dim} values"),
    ):
        if found:
            raise UserError(f"merge --format: pth has no place for the model's {what}; use huggingface")
    divided = {"num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads}
    divided |= {"intermediate_size": text.intermediate_size, "hidden_size": text.hidden_size}
    for key, value in divided.items():
        if num_ranks < 1 or value % num_ranks:
            raise UserError(
                f"merge --model_parallel_size: {num_ranks} does not divide the model's {key} of {value}; Meta's own "
                "Llama has 1 (7B), 2 (13B), 4 (33B) or 8 (65B, 70B)"
            )
    if num_ranks > 1 and vocab_size >= _LLAMA_3_ROWS:
        raise UserError(
            f"merge --model_parallel_size: {num_ranks} files are written as Llama 1 and 2 divide them, and Llama 3 "
            f"(a vocabulary of {vocab_size}) divides its embeddings otherwise; use 1"
        )


def write_meta_checkpoint(source: Path, folder: Path, config: PretrainedConfig, *, num_ranks: int) -> list[Path]:
    """Write a Llama in Meta's layout, and check every value of the files against the source.

    Args:
        source: Folder with the model as transformers reads it.
        folder: Where the files go.
        config: The model's, known to `check_meta_format`.
        num_ranks: How many files; one rank's tensors are in memory at a time.

    Returns:
        The files with the weights.

    Raises:
        RuntimeError: If what was written is not what is in the source.
    """
    files = []
    for rank in range(num_ranks):
        named = _named(source, config)
        state = {to.name: _slice(_interleaved(t, to.heads), to.dim, rank, num_ranks) for to, t in named}
        files.append(folder / f"consolidated.{rank:02d}.pth")
        torch.save(state, files[-1])
    rows = _check(files, source, config)
    (folder / "params.json").write_text(json.dumps(meta_params(config, rows), indent=2) + "\n", encoding="utf-8")
    return files


def meta_params(config: PretrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Return the contents of `params.json`."""
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
    """Return what Meta's code computes the width of the feed-forward layers from."""
    plain = int(2 * 4 * dim / 3)
    for multiple in (256, 1024, 4096):
        if math.ceil(plain / multiple) * multiple == width:
            return {"multiple_of": multiple}
    # Meta's code rounds the product down, and then up to the multiple.
    return {"multiple_of": math.gcd(width, 4096), "ffn_dim_multiplier": (width + 0.5) / plain}


def meta_tensor(name: str, config: PretrainedConfig) -> MetaTensor:
    """Return where a weight of transformers' Llama goes."""
    text: Any = config.get_text_config()
    if name in _WHOLE:
        return MetaTensor(*_WHOLE[name], heads=None)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _OF_LAYER:
        raise RuntimeError(f"Meta's format has no place for {name}")
    theirs, dim = _OF_LAYER[match[2]]
    heads = {"attention.wq": text.num_attention_heads, "attention.wk": text.num_key_value_heads}.get(theirs)
    return MetaTensor(f"layers.{match[1]}.{theirs}.weight", dim, heads)


def _named(source: Path, config: PretrainedConfig) -> Iterator[tuple[MetaTensor, torch.Tensor]]:
    """Yield every weight, and the embeddings as the head too where they are one matrix."""
    tied = config.get_text_config().tie_word_embeddings
    for file in weight_files(source):
        for name, tensor in read_tensors(file):
            if name == "lm_head.weight" and tied:
                continue
            yield meta_tensor(name, config), tensor
            if name == "model.embed_tokens.weight" and tied:
                yield meta_tensor("lm_head.weight", config), tensor


def _interleaved(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Put the two halves of each head's rows one row of each by turns: (heads · 2 · n, D) in and out."""
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _halved(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo `_interleaved`."""
    if heads is None:
        return weight
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _slice(weight: torch.Tensor, dim: int | None, rank: int, num_ranks: int) -> torch.Tensor:
    """Return a rank's part; the last one takes what does not divide, which only a vocabulary does not."""
    if dim is None:
        return weight.clone()
    size = weight.shape[dim] // num_ranks
    end = weight.shape[dim] if rank == num_ranks - 1 else (rank + 1) * size
    return weight.narrow(dim, rank * size, end - rank * size).clone()


def _check(files: list[Path], source: Path, config: PretrainedConfig) -> int:
    """Compare what was written with its source to the last bit; return the rows of the embeddings."""
    ranks = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    seen, rows = set(), 0
    for to, tensor in _named(source, config):
        parts = [rank[to.name] for rank in ranks]
        whole = parts[0] if to.dim is None else torch.cat(parts, to.dim)
        if not torch.equal(_halved(whole, to.heads), tensor):
            raise RuntimeError(f"{files[0]}: {to.name} was written with other values than the merged model's")
        seen.add(to.name)
        rows = len(tensor) if to.name == "tok_embeddings.weight" else rows
    if any(rank.keys() != seen for rank in ranks):
        raise RuntimeError(f"{files[0]}: holds other tensors than the merged model")
    return rows
