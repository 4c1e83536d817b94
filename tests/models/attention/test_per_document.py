from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lightning.batch import DocumentLengths
from sft_lightning.models.attention.per_document import attend_each, attend_per_document
from sft_lightning.types import SharedPrompt

DOCUMENTS = DocumentLengths([[5, 3, 1, 7], [16]])
SHARED = DocumentLengths([[4, SharedPrompt(6, 5, 3)], [18]])


def inputs(documents: DocumentLengths, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    queries, keys = (sum(lengths) for lengths in documents.lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, 4, 8), (keys, 2, 8), (keys, 2, 12)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (0, 2.0), (3, 2.0)])
@pytest.mark.parametrize("documents", [DOCUMENTS, SHARED], ids=["plain", "shared"])
def test_the_operator_gives_the_bits_of_autograd(
    documents: DocumentLengths, window: int, softcap: float, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": softcap}
    qkv = inputs(documents, dtype)
    expected = attend_each(*qkv, documents.lengths, **options)  # type: ignore[misc]
    found = attend_per_document(*qkv, documents.cpu_starts, **options)
    assert torch.equal(found, expected)
    slope = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, qkv, slope) for out in (found, expected)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_operator_is_registered_as_torch_demands() -> None:
    arguments = (*inputs(DOCUMENTS), DOCUMENTS.cpu_starts, 0.3, 0, 0.0)
    torch.library.opcheck(
        attend_per_document, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_one_compilation_serves_all_documents_without_a_graph_break() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: DocumentLengths) -> torch.Tensor:
        return attend_per_document(q * 2, k, v, documents.cpu_starts, 0.3, 0, 0.0).relu()

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for rows in ([[16]], [[5, 11]], [[1, 2, 3, 4, 6]]):
        documents = DocumentLengths(rows)
        torch._dynamo.maybe_mark_dynamic(documents.cpu_starts, 1)
        qkv = inputs(documents)
        assert torch.equal(compiled(*qkv, documents), layer(*qkv, documents))
    assert len(graphs) == 1
