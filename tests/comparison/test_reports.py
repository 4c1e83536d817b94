from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from sft_lightning.comparison.page import render_page
from sft_lightning.comparison.perplexity import ReferenceLoss
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.comparison.results import ComparedModel, Comparison, ModelResult, make_response
from sft_lightning.comparison.text_reports import fenced, json_lines, markdown_text, perplexity, print_comparison
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import Answer

EVIL = "<script>alert(1)</script> & \x1b[31m ```` | [bold]"


def result(role: str, *texts: str) -> ModelResult:
    answers = [[make_response(Answer(text, [1, 2, 3], "stop"), "cold")] for text in texts]
    spec = ComparedModel(role, f"the {role}", f"runs/{role}")  # type: ignore[arg-type]
    return ModelResult(spec, role != "baseline", {"greedy": answers}, [ReferenceLoss(2.0, 2)] * len(texts))


@pytest.fixture
def comparison() -> Comparison:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hot's opposite?"}]
    prompts = [ComparisonPrompt(turns, "", "p.jsonl, line 1", "cold"), ComparisonPrompt(turns, "", "l 2", "cold")]
    models = [result("baseline", "warm", "same"), result("finetuned", EVIL, "same")]
    return Comparison(prompts, {"greedy": GenerationConfig(max_new_tokens=9)}, models)


def test_the_terminal_shows_every_answer_and_nothing_in_it_is_obeyed(comparison: Comparison) -> None:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=140))
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "␛[31m ```` | [bold]" in shown
    assert "3 tokens, ended itself, 0% repeated, no exact match, ROUGE-L 0.00" in shown
    assert re.search(r"the finetuned +│ greedy +│ 2 +│ 3\.0 +│ 100% +│ 0\.0% +│ 50% +│ 2\.72", shown)


def test_markdown_quotes_answers_with_a_fence_longer_than_their_own(comparison: Comparison) -> None:
    text = markdown_text(comparison)
    assert "`````text\n<script>alert(1)</script> & ␛[31m ```` | [bold]\n`````" in text
    assert "| the finetuned | greedy | 2 |" in text
    assert "- greedy: max_new_tokens 9" in text
    assert fenced("plain")[0] == "```text"


def test_json_lines_have_an_object_an_answer(comparison: Comparison) -> None:
    rows = [json.loads(line) for line in json_lines(comparison)]
    assert [(row["model"], row["answer"]) for row in rows] == [
        ("the baseline", "warm"),
        ("the finetuned", EVIL),
        ("the baseline", "same"),
        ("the finetuned", "same"),
    ]
    assert rows[0]["reference_perplexity"] == pytest.approx(2.718, abs=1e-3)
    assert rows[0]["system"] == "Be kind."


def test_the_page_is_self_contained_and_escapes_what_models_say(comparison: Comparison) -> None:
    page = render_page(comparison)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("as the baseline") == 1
    assert "default-src 'none'" in page


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (12345.6, "12,345.60"), (1e9, "1.0e+09")])
def test_perplexities_are_readable(value: float, text: str) -> None:
    assert perplexity(value) == text
