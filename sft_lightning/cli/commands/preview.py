"""Show examples as the model will see them, supervised tokens in green."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.text import Text

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.data.templates.turn_formats import TURN_FORMATS
from sft_lightning.data.tokens.examples import RenderedRecord
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.views.highlight import ShownExample, ShownSource, show_tokens
from sft_lightning.views.marked_text import FRAME, marked_text
from sft_lightning.views.preview_page import PreviewPage, render_page


def main(args: Sequence[str]) -> None:
    """Show the first examples of every source of a configuration, or the named templates."""
    quiet_libraries()
    if "--list_templates" in args:
        print("\n".join([*sorted(TURN_FORMATS), "chat_template (the tokenizer's own)", "<file>.jinja"]))
        return
    line = SFTCommandLine("preview", list(args), _add_options)
    preview(line.data, num=line.config["num"], html=line.config["html"])


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--num", type=int, default=5, help="Records to show of each source.")
    parser.add_argument("--html", type=str | None, default=None, help="Write a self-contained page to this file too.")
    parser.add_argument("--list_templates", action="store_true", help="List the named templates and stop.")


def preview(data: SFTDataModule, *, num: int, html: str | None = None) -> None:
    """Print examples: supervised tokens green, special tokens reversed, line feeds and weights other than 1 marked.

    Args:
        data: The data of a run.
        num: Records of each training and validation source.
        html: Also write them as one self-contained page to this file.

    Raises:
        UserError: If there is no source, a record is wrong, or the page cannot be written.
    """
    if num < 1:
        raise UserError(f"--num: must be at least 1 (got {num})")
    if not data.spec.sources:
        raise UserError("data.sources: no source given, so there is nothing to show")
    page = PreviewPage(
        template=data.template.name,
        stop=data.template.stop,
        loss_on=data.spec.loss_on,
        max_length=data.spec.max_length,
        # With concat no example is too long by itself; of a pair both conversations count together.
        overlong=None if data.spec.packing == "concat" or data.spec.task == "dpo" else data.spec.overlong,
        sources=[
            _show_source(data, split, name, config, num)
            for split, sources in (("train", data.spec.sources_of("train")), ("val", data.spec.sources_of("val")))
            for name, config in sources.items()
        ],
    )
    _print(page, Console())
    if html is not None:
        _write(page, Path(html))


def _show_source(data: SFTDataModule, split: str, name: str, config: SourceConfig, num: int) -> ShownSource:
    records = islice(read_records(name, config), num)
    rendered = list(data.builder.render_records(records, config.format, config.path))
    if not rendered:
        raise UserError(f"data.sources.{name}.path: {config.path!r} holds no records, so there is nothing to show")
    return ShownSource(
        f"{split}/{name}",
        config.path,
        rendered[0].format,
        len(rendered),
        [shown for each in rendered for shown in _show_record(data, each)],
        [f"{each.dropped.reason}: {each.dropped}" for each in rendered if each.dropped is not None],
    )


def _show_record(data: SFTDataModule, rendered: RenderedRecord) -> Iterator[ShownExample]:
    for conversation in rendered.conversations:
        tokenized = tokenize(conversation.examples, TextEncoder(data.tokenizer))
        for number, (segments, example) in enumerate(zip(conversation.examples, tokenized, strict=True), start=1):
            yield ShownExample(
                location=rendered.record.location,
                name=conversation.name,
                number=number,
                num_of_record=len(conversation.examples),
                repairs=rendered.repairs,
                messages=conversation.messages,
                segments=segments,
                tokens=show_tokens(example, data.tokenizer),
            )


def _write(page: PreviewPage, file: Path) -> None:
    try:
        file.write_text(render_page(page), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--html: cannot write {str(file)!r}: {error.strerror}; name a file in a folder that exists"
        ) from error
    print(f"page: {file}")


def _print(page: PreviewPage, console: Console) -> None:
    coloured = console.is_terminal and not console.no_color
    legend = "green" if coloured else "between " + " and ".join(FRAME)
    _line(console, Text(f"template {page.template}; an answer ends with {page.stop!r}; supervised text is {legend}"))
    for source in page.sources:
        share = source.num_supervised / max(1, source.num_tokens)
        counts = f"{source.num_records} records, {source.num_tokens:,} tokens, {share:.0%} of them supervised"
        _line(console, Text.assemble("\n", (source.name, "bold"), f"  {source.format}; {counts}"))
        for example in source.examples:
            _line(console, Text(f"\n{_heading(example)}", "bold"))
            _line(console, marked_text(example.tokens, colours=coloured))
        for reason in source.left_out:
            _line(console, Text(f"\nleft out: {reason}", "yellow"))


def _line(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)  # the terminal wraps, so that a copied line is the line that was printed


def _heading(example: ShownExample) -> str:
    part = f" (example {example.number} of {example.num_of_record})" if example.num_of_record > 1 else ""
    repairs = "; repaired: " + ", ".join(example.repairs) if example.repairs else ""
    roles = ", ".join(message.role for message in example.messages)
    return (
        f"{example.title}{part}: {len(example.tokens):,} tokens, {example.num_supervised:,} supervised; "
        f"messages: {roles}{repairs}"
    )
