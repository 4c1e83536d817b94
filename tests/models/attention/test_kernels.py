from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_lightning.batch import DocumentLengths
from sft_lightning.models.attention import kernels, paths
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.attention.paths import AttentionPath
from sft_lightning.models.attention.per_document import attend_each
from sft_lightning.models.compiling import compile_layers


@pytest.fixture(scope="module")
def _torchs_kernel_on_the_cpu() -> None:
    """Give the operators of torch's variable-length kernel, which has none for a CPU, one that attends per document."""
    worker = ThreadPoolExecutor(1)  # autograd is off within an operator, but not in another thread

    def attended(inputs: Any, starts: Any, scale: float, window: Any) -> torch.Tensor:
        lengths = tuple(each.diff().tolist() for each in starts)
        return attend_each(*inputs, lengths, scale=scale, window=window[0] + 1, softcap=0.0)  # type: ignore[misc]

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False,
        scale: Any = None, window_size: Any = None, *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        out = attended((q, k, v), (cu_q, cu_k), scale, window_size)
        return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
        is_causal: bool, rng: Any, scale: Any = None, window_size: Any = None,
    ) -> Any:  # fmt: skip
        def gradients() -> Any:
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            found = torch.autograd.grad(attended(inputs, (cu_q, cu_k), scale, window_size), inputs, grad)
            return tuple(each.contiguous() for each in found)

        return worker.submit(gradients).result()


@pytest.mark.usefixtures("_torchs_kernel_on_the_cpu")
def test_a_compiled_layer_has_one_graph_with_torchs_kernel_whatever_the_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.bfloat16).train()
    compiled, decided = copy.deepcopy(plain), paths._decided
    compile_layers(compiled, print, backend="aot_eager")
    for rows in ([[5, 7]], [[3, 3, 6]], [[12]], [[1, 1, 1, 1, 8]]):
        documents = DocumentLengths(rows)
        ids = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(length) for length in rows[0]])[None]
        losses = []
        for model, path in ((plain, decided), (compiled, lambda *_: AttentionPath("torch", "", 8))):
            monkeypatch.setattr(paths, "_decided", path)
            out = model(ids, position_ids=positions, document_lengths=documents, labels=ids, use_cache=False)
            out.loss.backward()
            losses.append(out.loss.detach())
        assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("version", "usable"), [("2.8.3", True), ("2.6.0.post1", True), ("2.5.9", False), ("3.0", True), (None, False)]
)
def test_flash_attn_is_used_from_the_version_that_caps_scores(
    version: str | None, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", installed)
    kernels.has_flash_attn.cache_clear()
    assert kernels.has_flash_attn() is usable
    kernels.has_flash_attn.cache_clear()
