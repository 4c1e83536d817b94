from __future__ import annotations

import subprocess
import sys

import pytest
from torchmetrics.functional.text import rouge_score

from sft_lightning.comparison.metrics import exact_match, repetition_rate, rouge_l, split_words


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 5, 0.5), ([1, 2] * 4, 3 / 5)],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(tokens: list[int], rate: float) -> None:
    assert repetition_rate(tokens) == pytest.approx(rate)


def test_exact_match_ignores_white_space_only() -> None:
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
        ("赤い狐", "赤い犬", 2 / 3),
        ("Le café fermé", "le café ouvert", 2 / 3),
        ("красная лиса", "Красная собака", 0.5),
        ("a b c b d a b", "b d c a b a", 2 * 4 / 13),  # gaps are allowed, the order counts
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_each_character_of_chinese_and_japanese_is_a_word() -> None:
    assert split_words("Hello 世界、パン!") == ["Hello", "世", "界", "パ", "ン"]


def test_torchmetrics_own_splitter_cannot_read_chinese() -> None:
    scores = rouge_score("红色的狐狸", "红狐狸", rouge_keys="rougeL")
    assert scores["rougeL_fmeasure"] == 0.0


def test_the_import_alone_does_not_load_torchmetrics() -> None:
    code = "import sys, sft_lightning.comparison.metrics; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
