"""Show the answers of several models to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from sft_lightning.cli import quiet_libraries
from sft_lightning.comparison.modes import DecodingOptions, decoding_configs, parse_modes
from sft_lightning.comparison.page import render_page
from sft_lightning.comparison.prompts import builtin_prompts, read_prompts
from sft_lightning.comparison.results import Comparison
from sft_lightning.comparison.run import RunOptions, compare_models, model_specs
from sft_lightning.comparison.text_reports import json_lines, markdown_text, print_comparison
from sft_lightning.errors import UserError
from sft_lightning.models.serving import Device, LoadOptions, ServedDType
from sft_lightning.parsing import CommandParser

_REPEATED = {
    "finetuned": "A fine-tuned model: folder or Hub id; repeat for several.",
    "adapter": "A PEFT adapter to put on the baseline; repeat for several.",
    "mode": "greedy (the default), sampling, beam, beam_sampling, diverse_beam, contrastive, or all; repeat it.",
}


def main(args: Sequence[str]) -> None:
    """Parse the options and compare."""
    quiet_libraries()
    parser = CommandParser(prog="python -m sft_lightning compare", description=__doc__)
    for name, text in _REPEATED.items():
        parser.add_argument(f"--{name}", action="append", type=str, help=text)
    parser.add_function_arguments(compare, skip=set(_REPEATED))
    compare(**parser.parse_args(list(args)).as_dict())


def compare(
    baseline: str,
    finetuned: Sequence[str] | None = None,
    adapter: Sequence[str] | None = None,
    prompts: str = "builtin",
    language: Literal["en", "zh", "ja"] = "en",
    system: str | None = None,
    mode: Sequence[str] | None = None,
    max_new_tokens: int = 100,
    num_return_sequences: int = 1,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    num_beams: int | None = None,
    num_beam_groups: int | None = None,
    diversity_penalty: float | None = None,
    penalty_alpha: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    quantization: int | None = None,
    dtype: ServedDType = "auto",
    device: Device = "auto",
    trust_remote_code: bool = False,
    html: str | None = None,
    markdown: str | None = None,
    jsonl: str | None = None,
) -> None:
    """Ask each model in turn; every one has its own tokenizer and chat template, and only one is in memory.

    Args:
        baseline: The model to compare with: folder or Hub id.
        finetuned: Fine-tuned models.
        adapter: PEFT adapters on the baseline.
        prompts: `builtin`, or a file: .txt with a prompt a line, or records of prompt, reference and system.
        language: Language of the built-in prompts.
        system: System message of prompts that bring none.
        mode: How to generate.
        max_new_tokens: Tokens per answer at most.
        num_return_sequences: Answers to each prompt; greedy and contrastive have one.
        temperature: Of sampling and beam_sampling (default: 1).
        top_k: Sample among this many tokens (default: all); candidates of contrastive (default: 4).
        top_p: Sample among the most likely tokens that together have this probability (default: 1).
        repetition_penalty: Divides logits of tokens that have occurred (default: 1, none).
        num_beams: Beams of the beam searches (default: 4).
        num_beam_groups: Groups of diverse_beam (default: a group a beam).
        diversity_penalty: What a group pays for a token that an earlier one chose (default: 1).
        penalty_alpha: Of contrastive: 0 is greedy, 1 only avoids likeness (default: 0.6).
        seed: Seed of the sampling.
        batch_size: Prompts at a time.
        quantization: Load models in 4 or 8 bits per weight.
        dtype: Type of the weights; auto as stored.
        device: auto uses the GPUs if there are any.
        trust_remote_code: Run code that comes with a model.
        html: Write a self-contained page to this file.
        markdown: Write Markdown to this file.
        jsonl: Write a JSON object per answer to this file.
    """
    options = DecodingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        num_beam_groups=num_beam_groups,
        diversity_penalty=diversity_penalty,
        penalty_alpha=penalty_alpha,
        seed=seed,
    )
    files = {"html": html, "markdown": markdown, "jsonl": jsonl}
    for name, file in files.items():
        _check_writable(name, file)  # before hours of answering
    asked = builtin_prompts(language, system) if prompts == "builtin" else read_prompts(prompts, system)
    comparison = compare_models(
        model_specs(baseline, finetuned or [], adapter or []),
        asked,
        decoding_configs(parse_modes(mode or []), options),
        LoadOptions(quantization, dtype, device, trust_remote_code),
        RunOptions(num_return_sequences, batch_size),
    )
    print_comparison(comparison, Console(width=None if Console().is_terminal else 140))
    for name, file in files.items():
        if file is not None:
            Path(file).expanduser().write_text(_WRITERS[name](comparison), encoding="utf-8")
            print(f"{name}: {file}")


def _check_writable(name: str, file: str | None) -> None:
    if file is not None and not Path(file).expanduser().parent.is_dir():
        raise UserError(f"--{name}: the folder of {file!r} does not exist; make it, or name another")


def _json_text(comparison: Comparison) -> str:
    return "".join(f"{line}\n" for line in json_lines(comparison))


_WRITERS = {"html": render_page, "markdown": markdown_text, "jsonl": _json_text}
