from __future__ import annotations

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from sft_lightning.types import SharedPrompt, TokenizedExample, num_tokens


def test_a_shared_prompt_counts_its_beginning_once() -> None:
    shared = SharedPrompt(common=3, first=2, second=1)
    assert shared.num_tokens == num_tokens(shared) == 6
    assert num_tokens(6) == 6


def test_a_shared_prompt_reaches_the_device_as_it_is() -> None:
    shared = SharedPrompt(common=3, first=2, second=1)
    batch = {"input_ids": torch.zeros(1, 10), "document_lengths": [[4, shared]]}
    assert move_data_to_device(batch, torch.device("cpu"))["document_lengths"] == [[4, shared]]


def test_a_plain_document_has_one_length_and_counted_positions() -> None:
    example = TokenizedExample(np.array([5, 6, 7], np.int32), np.ones(3, np.float32))
    assert example.document_length == 3
    assert example.positions.tolist() == [0, 1, 2]
