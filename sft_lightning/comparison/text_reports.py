"""Reports of a comparison: for the terminal, as Markdown, and as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sft_lightning.comparison.results import Comparison, ModelResult, Response, Summary, summarize
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig
from sft_lightning.terminal import fenced, printable

COLUMNS = ("model", "mode", "answers", "tokens", "ended", "repetition", "changed")
REFERENCE_COLUMNS = ("reference perplexity", "exact match", "ROUGE-L")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print each prompt with the answers of all models below it, then a table of means.

    Args:
        comparison: The comparison.
        console: Where to print.
    """
    for number, prompt in enumerate(comparison.prompts, start=1):
        console.print(Rule(Text(f"prompt {number} of {len(comparison.prompts)}  {prompt.location}"), align="left"))
        _print_text(console, Text(printable(prompt.shown), "bold"))
        if prompt.reference is not None:
            _print_text(console, Text.assemble(("reference: ", "dim"), printable(prompt.reference)))
        for mode in comparison.configs:
            for result in comparison.models:
                for response in result.responses[mode][number - 1]:
                    heading = (f"\n{result.model.label}", "cyan"), f"  {mode}  ", (metrics_line(response), "dim")
                    _print_text(console, Text.assemble(*heading))
                    _print_text(console, Text(printable(response.text) or "(empty)"))
        console.print()
    table = Table(title="means", title_justify="left")
    for column in _columns(comparison):
        table.add_column(column, overflow="fold")
    for summary in summarize(comparison):
        table.add_row(*map(Text, table_row(summary, comparison.has_references)))
    console.print(table)


def markdown_text(comparison: Comparison) -> str:
    """Return the comparison as Markdown; answers are in code blocks, so that nothing in them is rendered."""
    lines = ["# Comparison", "", *_markdown_table(comparison), ""]
    lines += [f"- {mode}: {parameters(config)}" for mode, config in comparison.configs.items()]
    lines += [f"- {result.model.label}: {prompting(result)}" for result in comparison.models]
    for number, prompt in enumerate(comparison.prompts, start=1):
        lines += ["", f"## Prompt {number}", "", fenced(printable(prompt.shown), "text")]
        if prompt.reference is not None:
            lines += ["", "Reference:", "", fenced(printable(prompt.reference), "text")]
        for mode, result, response in _responses(comparison, number - 1):
            lines += [
                "",
                f"### {_escape_cell(result.model.label)}, {mode}",
                "",
                metrics_line(response),
                "",
                fenced(printable(response.text), "text"),
            ]
    return "\n".join(lines) + "\n"


def json_lines(comparison: Comparison) -> Iterator[str]:
    """Yield one JSON object per answer."""
    for index, prompt in enumerate(comparison.prompts):
        counts: dict[tuple[str, str], int] = {}
        for mode, result, response in _responses(comparison, index):
            number = counts[mode, result.model.label] = counts.get((mode, result.model.label), 0) + 1
            loss = result.references[index]
            row = {
                "location": prompt.location,
                "prompt": prompt.shown,
                **({"system": prompt.system} if prompt.system is not None else {}),
                "reference": prompt.reference,
                "model": result.model.label,
                "role": result.model.role,
                "path": result.model.adapter or result.model.path,
                "mode": mode,
                "answer_number": number,
                "answer": response.text,
                "num_tokens": response.num_tokens,
                "stop_reason": response.stop_reason,
                "repetition": response.repetition,
                "exact_match": response.exact_match,
                "rouge_l": response.rouge_l,
                "reference_perplexity": None if loss is None else loss.perplexity,
            }
            yield json.dumps(row, ensure_ascii=False)


def metrics_line(response: Response) -> str:
    """Return the metrics of an answer as one line."""
    ended = "ended with a stop token" if response.stop_reason == "stop" else "cut at max_new_tokens"
    parts = [f"{response.num_tokens} tokens", ended, f"{response.repetition:.0%} repeated"]
    if response.exact_match is not None:
        parts.append("exact match" if response.exact_match else "no exact match")
    if response.rouge_l is not None:
        parts.append(f"ROUGE-L {response.rouge_l:.2f}")
    return ", ".join(parts)


def prompting(result: ModelResult) -> str:
    """Return how the prompts were put to a model."""
    return "uses its own chat template" if result.uses_template else "has no chat template: continues plain text"


def parameters(config: GenerationConfig) -> str:
    """Return the parameters of a mode that have an effect, as one line."""
    defaults = asdict(GenerationConfig())
    shown = {
        name: value
        for name, value in asdict(config).items()
        if value != defaults[name] or name == "max_new_tokens" or (name == "seed" and config.temperature > 0)
    }
    if config.num_beam_groups > 1:
        shown["diversity_penalty"] = config.diversity_penalty
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def table_row(summary: Summary, with_references: bool) -> list[str]:
    """Return a row of the table of means.

    Args:
        summary: Means of one model in one mode.
        with_references: Whether the table has the columns that need references.
    """
    row = [
        summary.label,
        summary.mode,
        str(summary.num_answers),
        f"{summary.mean_tokens:.1f}",
        f"{summary.stopped:.0%}",
        f"{summary.repetition:.1%}",
        "–" if summary.changed is None else f"{summary.changed:.0%}",
    ]
    if with_references:
        row += [
            "–" if summary.perplexity is None else perplexity_text(summary.perplexity),
            "–" if summary.exact_match is None else f"{summary.exact_match:.0%}",
            "–" if summary.rouge_l is None else f"{summary.rouge_l:.3f}",
        ]
    return row


def perplexity_text(value: float) -> str:
    """Return a perplexity with two decimals, or in scientific notation from 1e5 on."""
    return f"{value:,.2f}" if value < 1e5 else f"{value:.1e}"


def _responses(comparison: Comparison, prompt: int) -> Iterator[tuple[DecodingMode, ModelResult, Response]]:
    for mode in comparison.configs:
        for result in comparison.models:
            for response in result.responses[mode][prompt]:
                yield mode, result, response


def _columns(comparison: Comparison) -> tuple[str, ...]:
    return COLUMNS + (REFERENCE_COLUMNS if comparison.has_references else ())


def _markdown_table(comparison: Comparison) -> list[str]:
    columns = _columns(comparison)
    rows = [table_row(summary, comparison.has_references) for summary in summarize(comparison)]
    return [_row(columns), _row(["---"] * len(columns)), *(_row([_escape_cell(cell) for cell in row]) for row in rows)]


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _print_text(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)
