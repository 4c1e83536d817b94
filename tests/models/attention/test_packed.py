from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED, packed_attention, split_shared_prompts
from sft_lightning.types import SharedPrompt

LENGTHS = [[5, 3, 8], [16]]


def load(folder: Path, implementation: str) -> PreTrainedModel:
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation=implementation
    )
    return model.eval()


def qkv(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return q, k, v


def block_mask(window: int | None = None) -> torch.Tensor:
    """The same isolation as one boolean mask, (2, 1, 16, 16)."""
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
    mask = (documents[:, :, None] == documents[:, None, :]).tril()
    return (mask.triu(1 - window) if window else mask)[:, None]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_equals_a_block_diagonal_mask_in_value_and_gradient(window: int | None) -> None:
    q, k, v = qkv()
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, document_lengths=LENGTHS, sliding_window=window)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=block_mask(window)).transpose(1, 2)
    expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_softcapping_is_applied_to_the_scores() -> None:
    q, k, v = qkv()
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, document_lengths=LENGTHS, softcap=2.0)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = 2.0 * torch.tanh(q @ keys.transpose(2, 3) * 8**-0.5 / 2.0)
    expected = scores.masked_fill(~block_mask(), float("-inf")).softmax(-1) @ values
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_attention_sinks_are_refused() -> None:
    with pytest.raises(UserError, match="sinks"):
        packed_attention(torch.nn.Module(), *qkv(), None, s_aux=torch.zeros(4))


def test_without_document_lengths_every_row_is_one_document(model_dir: Path) -> None:
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load(model_dir, PACKED)(ids).logits, load(model_dir, "sdpa")(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_the_varlen_kernel_equals_the_cpu_path(window: int | None) -> None:
    q, k, v = qkv(torch.bfloat16, "cuda")
    options = {"document_lengths": LENGTHS, "sliding_window": window}
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    reference = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    expected, _ = packed_attention(torch.nn.Module(), *reference, None, **options)  # type: ignore[misc,arg-type]
    expected_grads = torch.autograd.grad(expected.square().sum(), reference)
    torch.testing.assert_close(out.float().cpu(), expected, atol=2e-2, rtol=2e-2)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.float().cpu(), expected_grad, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 5.0}, {"scaling": 0.3}], ids=str)
def test_documents_with_a_shared_prompt_attend_as_if_each_had_its_own(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    common, first, second = 6, 5, 3
    length = SharedPrompt(common, first, second)
    q, k, v = (torch.randn(1, heads, length.num_tokens, 8, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    together, _ = packed_attention(module, q, k, v, None, document_lengths=[[length]], **options)
    rows, end = torch.arange(length.num_tokens), common + first
    for kept, own in ((rows[:end], rows[:end]), (torch.cat([rows[:common], rows[end:]]), rows[end:])):
        alone, _ = packed_attention(module, *(x[:, :, kept] for x in (q, k, v)), None, **options)
        assert torch.allclose(alone[:, -len(own) :], together[:, own], atol=1e-6)


def test_a_shared_prompt_is_among_the_keys_of_both_documents() -> None:
    asking, seen, pieces = split_shared_prompts([4, SharedPrompt(3, 2, 1)])
    assert (asking, seen) == ([4, 5, 1], [4, 5, 4])
    rows = torch.arange(10)
    assert torch.cat([rows[piece] for piece in pieces]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 9]
