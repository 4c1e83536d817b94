"""Generate Alpaca-like rows of real English, as an endless, reproducible stream.

Stanford Alpaca has 52 002 rows, 40 % of them with an input. The sizes on its dataset card give about 355 characters of
instruction, input and output per row (huggingface.co/datasets/tatsu-lab/alpaca: 47.8 MB, half of it a second copy in
the prompt). These rows have the same size: about 60, 60 (if there is an input) and 270 characters with log-normal
lengths. They consist of sentences of real texts, so that the tokenizer sees real words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_WITH_INPUT = 0.4
_INSTRUCTION = (10.2, 0.35)
"""Median and spread (σ of the logarithm) of the number of words."""

_INPUT = (7.7, 0.85)
_OUTPUT = (27.0, 1.05)
_MOST_WORDS = 600
_FEWEST_WORDS = 3
_NEW_LINE = 0.1
"""Share of sentences that end with a line break."""

_FILES = (
    "raw/lf_c4_demo.jsonl",
    "raw/the_verdict.txt",
    "raw/wikitext2_valid.txt",
    "instruct/litgpt_longform_train.json",
    "instruct/mlx_wwdc25_prompt_completion_train.jsonl",
    "instruct/rasbt_instruction_data.json",
    "instruct/self_instruct_seed_tasks.jsonl",
    "instruct/self_instruct_user_oriented_252.jsonl",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WIKITEXT = (("@-@", "-"), ("@,@", ","), ("@.@", "."))


def alpaca_like(folder: Path, seed: int) -> Iterator[dict[str, str]]:
    """Yield rows `{instruction, input, output}`; the same seed yields the same rows.

    Args:
        folder: Folder of the real texts; see `_FILES`.
        seed: Random seed.
    """
    sentences = read_sentences(folder)
    generator = np.random.default_rng(seed)

    def text(median: float, spread: float) -> str:
        num_words = int(np.clip(generator.lognormal(np.log(median), spread), 1, _MOST_WORDS))
        words: list[str] = []
        while len(words) < num_words:
            words += sentences[generator.integers(len(sentences))]
            words[-1] += "\n" if generator.random() < _NEW_LINE else " "
        return "".join(word if word[-1].isspace() else word + " " for word in words[:num_words]).strip()

    while True:
        yield {
            "instruction": text(*_INSTRUCTION).replace("\n", " "),
            "input": text(*_INPUT) if generator.random() < _WITH_INPUT else "",
            "output": text(*_OUTPUT),
        }


def read_sentences(folder: Path) -> list[list[str]]:
    """Return the words of each sentence of the real texts that has at least three.

    Raises:
        FileNotFoundError: If a text is missing.
    """
    texts = [text for name in _FILES for text in _texts(folder / name)]
    sentences = [sentence.split() for text in texts for sentence in _SENTENCE_END.split(text)]
    return [words for words in sentences if len(words) >= _FEWEST_WORDS and _is_prose(words)]


def _is_prose(words: list[str]) -> bool:
    """Whether a sentence is neither a heading of WikiText nor has a word replaced by <unk>."""
    return words[0] != "=" and not any("<unk>" in word for word in words)


def _texts(file: Path) -> Iterator[str]:
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        yield from _strings(json.loads(content))
    elif file.suffix == ".jsonl":
        for line in content.splitlines():
            yield from _strings(json.loads(line))
    else:
        yield _untokenized(content)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _untokenized(text: str) -> str:
    """Remove the spaces that WikiText has around punctuation marks."""
    for mark, written in _WIKITEXT:
        text = text.replace(f" {mark} ", written)
    return re.sub(r" ([,.;:!?)])", r"\1", text).replace("( ", "(")
