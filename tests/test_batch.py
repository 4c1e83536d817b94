from __future__ import annotations

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins.precision import HalfPrecision

from sft_lightning.batch import DocumentLengths, SupervisedPositions, batch_to, split_shared_prompts
from sft_lightning.types import IGNORE_INDEX, SharedPrompt

X = IGNORE_INDEX


def test_documents_of_all_rows_start_one_after_the_other() -> None:
    documents = DocumentLengths([[3, 2], [1, 4]])
    assert documents == [[3, 2], [1, 4]]
    assert documents.cpu_starts.tolist() == [[0, 3, 5, 6, 10], [0, 3, 5, 6, 10]]
    assert documents.starts.dtype == torch.int32
    assert (documents.lengths, documents.longest) == (([3, 2, 1, 4], [3, 2, 1, 4]), (4, 4))
    assert documents.key_index is None
    assert {name: torch.as_tensor(value).tolist() for name, value in documents.flash_arguments.items()} == {
        "cu_seq_lens_q": [0, 3, 5, 6, 10], "cu_seq_lens_k": [0, 3, 5, 6, 10], "max_length_q": 4, "max_length_k": 4,
    }  # fmt: skip


def test_a_shared_prompt_is_among_the_keys_of_both_documents() -> None:
    lengths = [4, SharedPrompt(3, 2, 1)]
    asking, seen, pieces = split_shared_prompts(lengths)
    assert (asking, seen) == ([4, 5, 1], [4, 5, 4])
    rows = torch.arange(10)
    joined = torch.cat([rows[piece] for piece in pieces])
    assert joined.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 9]
    documents = DocumentLengths([lengths])
    assert documents.key_index is not None
    assert torch.equal(documents.key_index, joined)
    assert documents.cpu_starts.tolist() == [[0, 4, 9, 10], [0, 4, 9, 13]]
    assert documents.longest == (5, 5)


def test_on_a_device_the_lengths_stay_in_cpu_memory() -> None:
    documents = DocumentLengths([[4, SharedPrompt(3, 2, 1)]])
    moved = move_data_to_device({"documents": documents}, torch.device("meta"))["documents"]
    assert moved == documents
    assert (moved.starts.device.type, moved.key_index.device.type) == ("meta", "meta")
    assert moved.cpu_starts.device.type == documents.starts.device.type == "cpu"


def test_a_supervised_token_is_predicted_one_position_before_it_in_its_own_row() -> None:
    labels = torch.tensor([[X, X, 3, 1], [2, 2, X, 4]])
    positions = SupervisedPositions(labels)
    assert positions.flat.tolist() == [1, 2, 4, 6]
    assert positions.rows.tolist() == [0, 0, 1, 1]
    assert positions.columns.tolist() == [0, 1, 2]
    assert positions.columns[positions.column_index].tolist() == [1, 2, 0, 2]
    assert len(SupervisedPositions(torch.full((2, 3), X))) == 0


def test_a_batch_is_copied_with_everything_that_has_tensors() -> None:
    batch = {"input_ids": torch.zeros(1, 2), "document_lengths": DocumentLengths([[2]]), "denominator": 2.0}
    moved = batch_to(batch, torch.device("meta"))  # type: ignore[type-var]
    assert moved["input_ids"].device.type == moved["document_lengths"].starts.device.type == "meta"  # type: ignore[attr-defined]
    assert moved["denominator"] == 2.0
    assert batch["input_ids"].device.type == "cpu"  # type: ignore[union-attr]


def test_what_lightning_converts_to_the_precision_leaves_the_documents_as_they_are() -> None:
    documents = DocumentLengths([[3, 2], [1, 4]])
    batch = {"loss_weights": torch.ones(2, 5), "document_lengths": documents}
    converted = HalfPrecision("bf16-true").convert_input(batch)
    assert converted["loss_weights"].dtype == torch.bfloat16
    assert converted["document_lengths"] is documents
