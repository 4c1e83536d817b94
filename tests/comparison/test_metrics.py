from __future__ import annotations

import pytest

from sft_lightning.comparison.metrics import exact_match, longest_common_subsequence, repetition_rate, rouge_l, words


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 5, 0.5), ([1, 2] * 4, 3 / 5)],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(tokens: list[int], rate: float) -> None:
    assert repetition_rate(tokens) == pytest.approx(rate)


def test_exact_match_looks_past_white_space_only() -> None:
    assert exact_match(" red\n fox ", "red fox")
    assert not exact_match("Red fox", "red fox")


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin (2004), S1 and S2 of section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("The cat!", "the CAT", 1.0),
        ("one", "two", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("红色的狐狸", "红狐狸", 2 * 3 / 8),
    ],
)
def test_rouge_l_is_as_in_the_paper(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_the_common_subsequence_may_have_gaps_but_keeps_the_order() -> None:
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("Hello 世界、パン!") == ["hello", "世", "界", "パ", "ン"]
