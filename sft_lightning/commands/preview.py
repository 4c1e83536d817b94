"""Show examples as the model will see them, supervised tokens in green."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from sft_lightning.cli import SFTCommandLine, quiet_libraries
from sft_lightning.data.binding import encoder
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.formats import to_messages
from sft_lightning.data.sources import read_records
from sft_lightning.data.tokenization import tokenize
from sft_lightning.data.turn_formats import TURN_FORMATS
from sft_lightning.errors import UserError
from sft_lightning.types import Record, TokenizedExample

_PAGE_WIDTH = 120


def main(args: Sequence[str]) -> None:
    """Show the first examples of every source of a configuration, or the named templates."""
    quiet_libraries()
    if "--list_templates" in args:
        print("\n".join([*sorted(TURN_FORMATS), "chat_template (the tokenizer's own)", "<file>.jinja"]))
        return
    line = SFTCommandLine("preview", list(args), _add_options)
    if not isinstance(line.datamodule, SFTDataModule):
        raise TypeError(f"expected an SFTDataModule, found a {type(line.datamodule).__name__}")
    preview(line.datamodule, num=line.config["num"], html=line.config["html"])


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--num", type=int, default=5, help="Examples to show of each source.")
    parser.add_argument("--html", type=str | None, default=None, help="Write a self-contained page to this file too.")
    parser.add_argument("--list_templates", action="store_true", help="List the named templates and stop.")


def preview(data: SFTDataModule, *, num: int, html: str | None = None) -> None:
    """Print examples token by token: supervised ones green, special tokens boxed.

    Args:
        data: The data of a run.
        num: Examples of each source.
        html: Also write them as one self-contained page.

    Raises:
        UserError: If there is no source, or a record is wrong.
    """
    if not data.sources:
        raise UserError("data.sources: no source given, so there is nothing to show")
    page = Console(record=True, width=_PAGE_WIDTH, file=io.StringIO()) if html else None
    for out in filter(None, (Console(), page)):
        out.print(f"template {data.template.name}; an answer ends with {data.template.stop!r}", highlight=False)
        for name, config in data.sources.items():
            records = read_records(name, config)
            for record, example in _examples(data, records[:num], config.format):
                out.print(_heading(record, example), highlight=False)
                out.print(_coloured(data.tokenizer, example))
    if html and page:
        Path(html).write_text(page.export_html(inline_styles=True), encoding="utf-8")
        print(f"page: {html}")


def _examples(
    data: SFTDataModule, records: Sequence[Record], format_name: str | None
) -> list[tuple[Record, TokenizedExample]]:
    found = []
    for record in records:
        messages = to_messages(record, data.builder.format_of(record, format_name))
        rendered = data.builder.render(record, messages)
        found += [(record, example) for example in tokenize(rendered, encoder(data.tokenizer))]
    return found


def _heading(record: Record, example: TokenizedExample) -> str:
    supervised = int((example.loss_weights > 0).sum())
    return (
        f"\n[bold]{record.source}[/bold]  {record.location}: {len(example.input_ids)} tokens, {supervised} supervised"
    )


def _coloured(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> Text:
    """Return the example's text, each run of tokens in the colour of what happens to it."""
    ids = example.input_ids.tolist()
    special = set(tokenizer.get_added_vocab().values())
    styles = [
        ("bold green" if weight > 0 else "dim") + (" reverse" if token in special else "")
        for token, weight in zip(ids, example.loss_weights.tolist(), strict=True)
    ]
    borders = [i for i in range(1, len(ids)) if styles[i] != styles[i - 1]]
    text, shown = Text(), 0
    for start, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        # Decoded from the beginning: some tokenizers drop the leading space of what is decoded alone.
        before = str(tokenizer.decode(ids[:end]))
        text.append(before[shown:], styles[start])
        shown = len(before)
    return text
