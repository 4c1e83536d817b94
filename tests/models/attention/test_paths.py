from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lightning.models.attention.packed import packed_attention
from sft_lightning.models.attention.paths import AttentionFacts, choose_path, noting_paths

HOPPER: dict[str, Any] = {
    "device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "kernel", "width", "reason"),
    [
        ({}, "torch", 128, "bfloat16, head_dim 128"),
        ({"capability": (8, 0), "dtype": torch.float16}, "torch", 128, "float16"),
        ({"head_dim": 256, "value_dim": 256}, "torch", 256, "head_dim 256"),
        ({"device": "cpu", "capability": (0, 0)}, "per_document", 0, "CUDA device, this is cpu"),
        ({"device": "mps", "capability": (0, 0)}, "per_document", 0, "this is mps"),
        ({"capability": (7, 5)}, "per_document", 0, r"compute capability 7\.5; .* need 8\.0"),
        ({"dtype": torch.float32}, "per_document", 0, "float32, head_dim 128; .* float16 and bfloat16"),
        ({"head_dim": 512, "value_dim": 512}, "per_document", 0, "up to 256"),
        ({"head_dim": 100, "value_dim": 100}, "torch", 104, "padded to 104"),
        ({"head_dim": 192, "value_dim": 128}, "torch", 192, "value width 128, padded to 192"),
        ({"head_dim": 64, "value_dim": 320}, "per_document", 0, "value width 320"),
        ({"softcap": True}, "per_document", 0, "no softcap, and flash-attn is not installed"),
        ({"dropout": True}, "per_document", 0, "no dropout, and flash-attn is not installed"),
        ({"softcap": True, "has_flash_attn": True}, "flash_attn", 128, "torch's kernel has no softcap"),
        ({"dropout": True, "has_flash_attn": True}, "flash_attn", 128, "torch's kernel has no dropout"),
        ({"softcap": True, "has_flash_attn": True, "dtype": torch.float32}, "per_document", 0, "float32"),
        ({"has_flash_attn": True}, "torch", 128, "bfloat16"),
        ({"grouped": True, "torch_shares_heads": False}, "torch", 128, "bfloat16"),
        ({"grouped": True, "torch_shares_heads": False, "has_flash_attn": True}, "flash_attn", 128, "would repeat"),
    ],
    ids=str,
)  # fmt: skip
def test_the_path_is_the_fastest_kernel_that_computes_what_is_asked(
    facts: dict[str, Any], kernel: str, width: int, reason: str
) -> None:
    path = choose_path(AttentionFacts(**{**HOPPER, **facts}))
    assert (path.kernel, path.width) == (kernel, width)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(path)


def test_paths_are_noted_once_each_inside_the_block() -> None:
    q = torch.ones(1, 2, 4, 8)
    with noting_paths() as paths:
        for softcap in (None, None, 2.0):
            packed_attention(torch.nn.Module(), q, q, q, None, softcap=softcap)
    packed_attention(torch.nn.Module(), q, q, q, None, dropout=0.5)
    assert [str(path) for path in paths] == [
        "one call per document (variable-length kernels need a CUDA device, this is cpu)"
    ]
