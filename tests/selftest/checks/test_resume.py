from __future__ import annotations

import torch

from sft_lightning.selftest.checks.resume import _digest, compare


def test_equal_bits_pass_if_a_weight_changed_after_the_checkpoint() -> None:
    check = compare({"weight a": "1"}, {"weight a": "1"}, {"weight a": "0"}, 4)
    assert check.passed
    assert "all 1 tensors have the same bits; 1 changed after the checkpoint" in check.figure


def test_other_bits_fail_with_the_name_of_a_tensor() -> None:
    check = compare({"weight a": "1"}, {"weight a": "2"}, {"weight a": "0"}, 4)
    assert not check.passed
    assert "1 of 1 tensors differ, such as weight a" in check.figure


def test_a_missing_tensor_fails() -> None:
    assert not compare({"weight a": "1", "optimizer 0 exp_avg": "1"}, {"weight a": "1"}, {"weight a": "0"}, 4).passed


def test_a_run_in_which_no_weight_changed_fails() -> None:
    check = compare({"weight a": "1"}, {"weight a": "1"}, {"weight a": "1"}, 4)
    assert not check.passed
    assert "no weight changed" in check.figure


def test_a_digest_tells_bits_shapes_and_types_apart() -> None:
    zero = torch.zeros(4)
    digests = [_digest(tensor) for tensor in (zero, -zero, zero.view(2, 2), zero.int())]
    assert len(set(digests)) == 4
    assert _digest(torch.arange(6).view(2, 3).t()) == _digest(torch.arange(6).view(2, 3).t().contiguous())
