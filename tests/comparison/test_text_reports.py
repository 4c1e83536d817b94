from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from sft_lightning.comparison.results import Comparison
from sft_lightning.comparison.text_reports import json_lines, markdown_text, perplexity_text, print_comparison


def test_the_terminal_shows_every_answer_without_its_control_characters(comparison: Comparison) -> None:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=140))
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "␛[31m ```` | [bold]" in shown
    assert "3 tokens, ended with a stop token, 0% repeated, no exact match, ROUGE-L 0.00" in shown
    assert re.search(r"the finetuned +│ greedy +│ 2 +│ 3\.0 +│ 100% +│ 0\.0% +│ 50% +│ 2\.72", shown)


def test_a_markdown_fence_is_longer_than_any_in_the_answer(comparison: Comparison) -> None:
    text = markdown_text(comparison)
    assert "`````text\n<script>alert(1)</script> & ␛[31m ```` | [bold]\n`````" in text
    assert "| the finetuned | greedy | 2 |" in text
    assert "- greedy: max_new_tokens 9" in text


def test_json_lines_have_one_object_per_answer(comparison: Comparison) -> None:
    rows = [json.loads(line) for line in json_lines(comparison)]
    assert [(row["model"], row["answer"]) for row in rows] == [
        ("the baseline", "warm"),
        ("the finetuned", comparison.models[1].responses["greedy"][0][0].text),
        ("the baseline", "same"),
        ("the finetuned", "same"),
    ]
    assert rows[0]["reference_perplexity"] == pytest.approx(2.718, abs=1e-3)
    assert rows[0]["system"] == "Be kind."


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (12345.6, "12,345.60"), (1e9, "1.0e+09")])
def test_large_perplexities_are_in_scientific_notation(value: float, text: str) -> None:
    assert perplexity_text(value) == text
