from __future__ import annotations

import math

import pytest

from sft_lightning.comparison.results import Comparison, make_response, summarize
from sft_lightning.models.generation.serving import Answer


def test_metrics_that_need_a_reference_are_missing_without_one() -> None:
    response = make_response(Answer("warm", [1, 2, 3], "stop"), None)
    assert (response.num_tokens, response.stop_reason) == (3, "stop")
    assert (response.exact_match, response.rouge_l) == (None, None)


def test_a_response_is_compared_with_its_reference() -> None:
    response = make_response(Answer("cold and dry", [1] * 5, "length"), "cold")
    assert response.exact_match is False
    assert response.rouge_l == pytest.approx(0.5)
    assert response.repetition == 0.5


def test_a_summary_has_the_means_and_the_share_of_changed_answers(comparison: Comparison) -> None:
    baseline, finetuned = summarize(comparison)
    assert (baseline.label, baseline.num_answers, baseline.mean_tokens) == ("the baseline", 2, 3.0)
    assert baseline.changed is None
    assert finetuned.changed == 0.5
    assert finetuned.stopped == 1.0
    assert finetuned.exact_match == 0.0
    assert finetuned.perplexity == pytest.approx(math.e)


def test_only_prompts_with_a_reference_count_as_such(comparison: Comparison) -> None:
    assert comparison.has_references
    assert not Comparison([], {}, []).has_references
