from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sft_lightning.batch import DocumentLengths
from sft_lightning.errors import UserError
from sft_lightning.models.attention import kernels, packed, paths
from sft_lightning.models.attention.packed import PACKED, packed_attention
from sft_lightning.models.attention.paths import AttentionFacts, AttentionPath, choose_path
from sft_lightning.models.attention.per_document import attend_each
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


Kernel = list[dict[str, Any]]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Take the branch of an H100 on this CPU; returns the arguments of each call of torch's variable-length kernel."""
    calls: Kernel = []

    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor,
        longest_q: int, longest_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert query.shape[2] % 8 == 0
        assert starts_q.diff().max() == longest_q
        assert starts_k.diff().max() == longest_k
        calls.append({"dtype": query.dtype, "width": query.shape[2], "gqa": enable_gqa, "heads": key.shape[1]})
        lengths = (starts_q.diff().tolist(), starts_k.diff().tolist())
        return attend_each(query, key, value, lengths, scale=scale, window=window_size[0] + 1, softcap=0.0)

    def on_an_h100(
        device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, grouped: bool, *asked: bool
    ) -> AttentionPath:
        return choose_path(
            AttentionFacts(
                device="cuda", capability=(9, 0), dtype=dtype, head_dim=head_dim, value_dim=value_dim, grouped=grouped,
                softcap=asked[0], dropout=asked[1],
            )
        )  # fmt: skip

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(paths, "_decided", on_an_h100)
    monkeypatch.setattr(kernels, "KERNELS", {})
    monkeypatch.setattr(packed, "KERNELS", kernels.KERNELS)
    return calls


def test_float32_weights_under_autocast_reach_the_kernel_in_bfloat16(on_cuda: Kernel, model_dir: Path) -> None:
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])  # rotary embeddings are in float32
    model = load(model_dir, PACKED)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, position_ids=positions, document_lengths=DocumentLengths([[5, 7]]), use_cache=False)
    assert [call["dtype"] for call in on_cuda] == [torch.bfloat16] * model.config.num_hidden_layers


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (12, 12), (24, 16), (8, 12)])
def test_every_width_is_padded_for_the_kernel_and_gives_the_result_of_the_cpu(
    head_dim: int, value_dim: int, window: int | None, on_cuda: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 16, head_dim), (2, 2, 16, head_dim), (2, 2, 16, value_dim)]
    inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_() for shape in shapes]
    options: dict[str, Any] = {"document_lengths": DocumentLengths(LENGTHS), "sliding_window": window}
    out, _ = packed_attention(torch.nn.Module(), *inputs, None, **options)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert on_cuda[0]["heads"] == 2
    assert on_cuda[0]["gqa"]
    monkeypatch.undo()
    expected, _ = packed_attention(torch.nn.Module(), *inputs, None, **options)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), inputs)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"dropout": 0.0, "softcap": 2.0, "sliding_window": 4}], ids=str)
def test_what_the_kernel_lacks_is_computed_document_by_document(options: dict[str, Any], on_cuda: Kernel) -> None:
    inputs = qkv(torch.bfloat16)
    out, _ = packed_attention(torch.nn.Module(), *inputs, None, document_lengths=LENGTHS, **options)
    other = [torch.cat([x[:, :, :5] + 1, x[:, :, 5:]], 2) for x in inputs]
    moved, _ = packed_attention(torch.nn.Module(), *other, None, document_lengths=LENGTHS, **options)  # type: ignore[misc]
    assert not on_cuda
    assert torch.equal(out[0, 5:], moved[0, 5:])
    assert not torch.equal(out[0, :5], moved[0, :5])


def test_dropout_drops_weights_of_every_document(on_cuda: Kernel) -> None:
    inputs = qkv(torch.bfloat16)
    whole, _ = packed_attention(torch.nn.Module(), *inputs, None, document_lengths=LENGTHS)
    dropped, _ = packed_attention(torch.nn.Module(), *inputs, None, document_lengths=LENGTHS, dropout=0.5)
    assert len(on_cuda) == 1
    assert not torch.equal(whole, dropped)


def test_the_kernel_of_flash_attn_gets_softcap_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *starts: Any, **options: Any) -> Any:
        seen.update(options, heads=(q.shape[1], k.shape[1]), longest=starts[2:])
        return q

    path = AttentionPath("flash_attn", "", 8)
    monkeypatch.setattr(paths, "_decided", lambda *_: path)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.delitem(kernels.KERNELS, "flash_attn", raising=False)
    options = {"document_lengths": LENGTHS, "softcap": 5.0, "dropout": 0.1, "sliding_window": 3, "scaling": 0.5}
    packed_attention(torch.nn.Module(), *qkv(), None, **options)  # type: ignore[arg-type]
    del kernels.KERNELS["flash_attn"]
    assert seen == {
        "heads": (4, 2), "longest": (16, 16), "softcap": 5.0, "dropout_p": 0.1, "window_size": (2, 0),
        "softmax_scale": 0.5, "causal": True,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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
