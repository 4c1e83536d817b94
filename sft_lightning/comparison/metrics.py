"""Metrics of one answer: repetition, exact match, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

_N = 4
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
"""A word, or one character of Chinese, Japanese or Korean."""


def repetition_rate(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred earlier in the answer (seq-rep-4, Welleck et al., 2019).

    Args:
        tokens: Token ids of the answer.

    Returns:
        0 to 1; 0 for an answer of fewer than 4 tokens.
    """
    grams = [tuple(tokens[i : i + _N]) for i in range(len(tokens) - _N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal, ignoring differences in white space.

    Args:
        answer: Text of the model.
        reference: The wanted text.
    """
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L (Lin, 2004), which compares the longest common subsequence of words.

    torchmetrics computes the score from our words. Its own splitter keeps only `a-z0-9`, so that every Chinese or
    Japanese text would have no words and score 0, and accented letters would cut words in two.

    Args:
        answer: Text of the model.
        reference: The wanted text.

    Returns:
        0 to 1; 1 if neither text has a word.
    """
    from torchmetrics.functional.text import rouge_score  # takes seconds to import; only references need it

    if not _WORD.search(answer) and not _WORD.search(reference):
        return 1.0
    scores = rouge_score(answer, reference, rouge_keys="rougeL", normalizer=str.casefold, tokenizer=split_words)
    return float(scores["rougeL_fmeasure"])


def split_words(text: str) -> list[str]:
    """Return the words of a text without punctuation; each Chinese, Japanese or Korean character is a word."""
    return _WORD.findall(text)
