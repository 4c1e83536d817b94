"""The first examples of each source as the model will see them, printed to the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from rich.console import Console
from rich.text import Text

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig, read_records
from sft_lightning.data.tokens.examples import RenderedRecord
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.errors import UserError
from sft_lightning.views.highlight import ShownExample, ShownSource, show_tokens
from sft_lightning.views.marked_text import FRAME, marked_text
from sft_lightning.views.preview_page import PreviewPage


def first_examples(data: SFTDataModule, num: int) -> PreviewPage:
    """Return the first examples of each training and validation source.

    Args:
        data: The data of a run.
        num: Records of each source.

    Raises:
        UserError: If there is no source, or a record is malformed and not dropped.
    """
    if not data.spec.sources:
        raise UserError("data.sources: no source given, so there is nothing to show")
    return PreviewPage(
        template=data.template.name,
        stop=data.template.stop,
        loss_on=data.spec.loss_on,
        max_length=data.spec.max_length,
        # No example is too long by itself with packing: concat, and in a pair both conversations count together.
        overlong=None if data.spec.packing == "concat" or data.spec.task == "dpo" else data.spec.overlong,
        sources=[
            _show_source(data, split, name, config, num)
            for split, sources in (("train", data.spec.sources_of("train")), ("val", data.spec.sources_of("val")))
            for name, config in sources.items()
        ],
    )


def print_examples(page: PreviewPage, console: Console) -> None:
    """Print examples: supervised tokens green, special tokens reversed, line feeds and other loss weights marked.

    Args:
        page: The examples.
        console: The console to print to.
    """
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
        for reason in source.dropped:
            _line(console, Text(f"\ndropped: {reason}", "yellow"))


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
