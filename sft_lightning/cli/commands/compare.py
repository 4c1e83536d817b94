"""Show the answers of several models to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sft_lightning.cli.parsing import command_parser
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.comparison.modes import DecodingOptions, decoding_configs, parse_modes
from sft_lightning.comparison.page import render_page
from sft_lightning.comparison.prompts import ComparisonPrompt, builtin_prompts, read_prompts
from sft_lightning.comparison.results import ComparedModel, Comparison
from sft_lightning.comparison.run import RunOptions, compare_models, compared_models
from sft_lightning.comparison.text_reports import json_lines, markdown_text, print_comparison
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import DecodingMode, GenerationConfig, LoadOptions
from sft_lightning.terminal import make_console

_REPEATED = {
    "finetuned": "A fine-tuned model: folder or Hub id. May be repeated.",
    "adapter": "A PEFT adapter folder, put on the baseline. May be repeated.",
    "mode": "greedy (default), sampling, beam, beam_sampling, diverse_beam, contrastive, or all. May be repeated.",
}


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The baseline, and the prompts to compare on."""

    baseline: str
    """The model to compare the others with: folder or Hub id."""

    prompts: str = "builtin"
    """`builtin`, or a file: .txt with one prompt per line, or records with prompt, reference and system."""

    language: Literal["en", "zh", "ja"] = "en"
    """Language of the built-in prompts."""

    system: str | None = None
    """System message of the prompts that have none."""

    def read(self) -> list[ComparisonPrompt]:
        """Return the prompts."""
        if self.prompts == "builtin":
            return builtin_prompts(self.language, self.system)
        return read_prompts(self.prompts, self.system)


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Files to write the answers to, besides the terminal.

    Raises:
        UserError: If a file's folder does not exist. This is checked before any model is loaded.
    """

    html: str | None = None
    """Write a self-contained page to this file."""

    markdown: str | None = None
    """Write Markdown to this file."""

    jsonl: str | None = None
    """Write one JSON object per answer to this file."""

    def __post_init__(self) -> None:
        for name, file in vars(self).items():
            if file is not None and not Path(file).expanduser().parent.is_dir():
                raise UserError(f"--{name}: the folder of {file!r} does not exist; create it, or give another path")

    def write(self, comparison: Comparison) -> None:
        """Write the files that the user wants."""
        for name, file in vars(self).items():
            if file is not None:
                Path(file).expanduser().write_text(_WRITERS[name](comparison), encoding="utf-8")
                print(f"{name}: {file}")


def main(args: Sequence[str]) -> None:
    """Parse the options and run `compare`."""
    quiet_libraries()
    parser = command_parser("compare", __doc__, args)
    for name, text in _REPEATED.items():
        parser.add_argument(f"--{name}", action="append", type=str, default=[], help=text)
    for group in _GROUPS:
        parser.add_class_arguments(group, None)
    given = parser.parse_args(list(args)).as_dict()
    prompts, files, decoding, load, run = (_parsed_group(group, given) for group in _GROUPS)
    models = compared_models(prompts.baseline, given["finetuned"], given["adapter"])
    configs = decoding_configs(parse_modes(given["mode"]), decoding)
    compare(models, prompts.read(), configs, load, run, files)


def compare(
    models: Sequence[ComparedModel],
    prompts: Sequence[ComparisonPrompt],
    configs: Mapping[DecodingMode, GenerationConfig],
    load: LoadOptions,
    run: RunOptions,
    files: ReportFiles,
) -> None:
    """Let the models answer in turn, each with its own tokenizer and chat template; only one is in memory.

    Args:
        models: The models, the baseline first.
        prompts: The prompts.
        configs: Generation config of each mode.
        load: How checkpoints are loaded.
        run: Batch size, and answers per prompt.
        files: Files to write the answers to, besides the terminal.

    Raises:
        UserError: If a model cannot be loaded, or its chat template rejects a prompt.
    """
    comparison = compare_models(models, prompts, configs, load, run)
    print_comparison(comparison, make_console())
    files.write(comparison)


_GROUPS: tuple[type, ...] = (PromptOptions, ReportFiles, DecodingOptions, LoadOptions, RunOptions)
"""Dataclasses whose fields are the command's options."""


def _parsed_group(group: type, given: Mapping[str, Any]) -> Any:
    return group(**{field.name: given[field.name] for field in fields(group)})


def _json_text(comparison: Comparison) -> str:
    return "".join(f"{line}\n" for line in json_lines(comparison))


_WRITERS = {"html": render_page, "markdown": markdown_text, "jsonl": _json_text}
