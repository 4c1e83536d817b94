"""Numbers of an answer: repetition, exact match, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

_N = 4
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
"""A word, or one character of a script that writes no spaces between words."""


def repetition_rate(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams of tokens that occurred before in the answer (seq-rep-4, Welleck et al., 2019).

    0 says that nothing is repeated; an answer of fewer than 4 tokens repeats nothing.
    """
    grams = [tuple(tokens[i : i + _N]) for i in range(len(tokens) - _N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two are the same but for white space."""
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L (Lin, 2004): how long a sequence of words the two have in common.

    Words are compared without case and punctuation; Chinese and Japanese characters count as words.

    Returns:
        0 to 1; 1 also if neither has a word.
    """
    first, second = words(answer), words(reference)
    if not first and not second:
        return 1.0
    return 2 * longest_common_subsequence(first, second) / (len(first) + len(second))


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest sequence that both contain in order, gaps allowed."""
    row = [0] * (len(second) + 1)
    for item in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if item == other else max(row[j], row[j - 1])
    return row[-1]
