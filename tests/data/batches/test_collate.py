from __future__ import annotations

import numpy as np

from sft_lightning.data.batches.collate import collate
from sft_lightning.types import IGNORE_INDEX, TokenizedExample


def document(ids: list[int], weights: list[float]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, np.int32), np.array(weights, np.float32))


FIRST, SECOND, THIRD = document([5, 6, 7], [1, 0, 1]), document([8, 9], [0, 2]), document([3], [1])
X = IGNORE_INDEX


def test_documents_stand_one_after_the_other_with_restarting_positions() -> None:
    batch = collate([[FIRST, SECOND], [THIRD]], pad_token_id=0, denominator=3.0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[X, X, 7, X, 9], [X, X, X, X, X]]
    assert batch["loss_weights"].tolist() == [[0, 0, 1, 0, 2], [0, 0, 0, 0, 0]]


def test_lengths_add_up_to_the_width_with_padding_as_a_document_of_its_own() -> None:
    batch = collate([[FIRST, SECOND], [THIRD]], pad_token_id=0, denominator=3.0)
    assert batch["document_lengths"] == [[3, 2], [1, 4]]
    assert (batch["num_tokens"], batch["num_supervised"], batch["denominator"]) == (6, 2, 3.0)


def test_a_pad_token_that_is_the_end_token_masks_no_end_token() -> None:
    batch = collate([[document([4, 2], [0, 1])], [document([4, 4, 2], [0, 0, 1])]], pad_token_id=2, denominator=1.0)
    assert batch["labels"].tolist() == [[X, 2, X], [X, X, 2]]


def test_a_rank_without_rows_still_has_a_batch_without_weight() -> None:
    batch = collate([], pad_token_id=0, denominator=1.0)
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["document_lengths"] == [[1]]
    assert batch["loss_weights"].sum() == 0


def test_a_batch_is_padded_to_a_shape_with_rows_of_padding() -> None:
    batch = collate([[FIRST, SECOND]], pad_token_id=0, denominator=3.0, shape=(2, 6))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["document_lengths"] == [[3, 2, 1], [6]]
    assert (batch["num_tokens"], batch["num_supervised"]) == (5, 2)
    assert batch["supervised"].flat.tolist() == [1, 3]
    empty = collate([], pad_token_id=0, denominator=1.0, shape=(2, 6))
    assert empty["document_lengths"] == [[6], [6]]
    assert empty["loss_weights"].sum() == 0
