"""Show examples as the model will see them, supervised tokens in green."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from sft_lightning.cli.configuration import parse_configuration
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.views.preview_page import PreviewPage


def main(args: Sequence[str]) -> None:
    """Show the first examples of every source of a configuration, or list the named templates."""
    if "--list_templates" in args:
        from sft_lightning.data.templates.turn_formats import TURN_FORMATS

        print("\n".join([*sorted(TURN_FORMATS), "chat_template (the tokenizer's own)", "<file>.jinja"]))
        return
    line = parse_configuration("preview", __doc__, args, _add_options)
    from rich.console import Console

    from sft_lightning.views.examples import first_examples, print_examples

    num, html = line.config["num"], line.config["html"]
    if num < 1:
        raise UserError(f"--num: must be at least 1 (got {num})")
    page = first_examples(line.data, num)
    print_examples(page, Console())
    if html is not None:
        _write(page, Path(html))


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--num", type=int, default=5, help="Records to show of each source.")
    parser.add_argument("--html", type=str | None, default=None, help="Write a self-contained page to this file too.")
    parser.add_argument("--list_templates", action="store_true", help="List the named templates and stop.")


def _write(page: PreviewPage, file: Path) -> None:
    from sft_lightning.views.preview_page import render_page

    try:
        file.write_text(render_page(page), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--html: cannot write {str(file)!r}: {error.strerror}; name a file in a folder that exists"
        ) from error
    print(f"page: {file}")
