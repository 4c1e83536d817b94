"""Merge adapters into their base model and verify the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path

import yaml

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.parsing import CommandParser
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.errors import UserError
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.plan import read_manifest
from sft_lightning.merging.report import MergeReport, run_folder_of

_OF_THE_DATA = ("seed_everything", "task", "model", "data")
NUM_EXAMPLES = 8
"""Examples of the run's data that a merged model is compared on."""


def main(args: Sequence[str]) -> None:
    """Parse the options, merge, and report."""
    quiet_libraries()
    parser = CommandParser(prog="python -m sft_lightning merge", description=__doc__)
    parser.add_argument(
        "--adapter", action="append", type=str, required=True, help="A PEFT adapter folder; repeat to merge several."
    )
    parser.add_argument("--output_dir", type=str, required=True, help="Folder to write; replaced as a whole.")
    parser.add_class_arguments(MergeOptions, None)
    config = parser.instantiate(parser.parse_args(list(args)))
    options = MergeOptions(**{field.name: config[field.name] for field in fields(MergeOptions)})
    merge(config["adapter"], config["output_dir"], options)


def merge(adapters: Sequence[str], output_dir: str, options: MergeOptions) -> None:
    """Merge adapters into their base model, and say what was measured.

    Args:
        adapters: PEFT adapter folders, merged in order.
        output_dir: Folder to write; replaced as a whole.
        options: How.

    Raises:
        UserError: If a folder is not an adapter, or does not fit its base or the options.
    """
    last = Path(adapters[-1])
    measured = options.verify and len(adapters) == 1
    quantized = options.quantization is not None or bool(read_manifest(last).get("quantization"))
    rows = _examples_of_the_run(last) if measured and quantized else []
    report = merge_adapters(adapters, output_dir, options, rows=rows)
    print("\n".join(_lines(report, num_examples=len(rows))))


def _lines(report: MergeReport, num_examples: int) -> Iterator[str]:
    layout = ", in Meta's layout" if report.format == "pth" else ""
    yield f"merged into {report.output_dir} ({report.dtype}{layout})"
    if report.difference is None:
        yield "not verified, because --verify is false"
    else:
        found = report.difference
        yield (
            f"loaded again, its logits differ from the adapted model's by at most {found.largest:.1e} (the largest "
            f"logit is {found.scale:.1f}; merging moved logits by up to {found.moved:.1e})"
        )
    on = f"{num_examples} examples of the run's data" if num_examples else "a few built-in texts"
    for base, divergence in report.divergences.items():
        chosen = ", which was written" if base == report.base else ""
        yield f"KL(trained ‖ merged into the {base} base) on {on}: {divergence:.3e} nats per token{chosen}"
    if report.whole_model_reason is not None:
        yield f"the whole model was in memory: {report.whole_model_reason}"
    if report.untied:
        yield "the head is no longer tied to the embeddings, because training changed one of them (tie_word_embeddings)"
    if report.left_out:
        yield f"left out of the base's files, as loading does: {len(report.left_out)} tensors, {report.left_out[0]} …"


def _examples_of_the_run(adapter: Path) -> list[list[int]]:
    """Return the token ids of a few examples of an adapter's run; none, and why, where its data is not at hand."""
    folder = run_folder_of(adapter)
    if folder is None:
        print(f"{adapter} lies in no run's folder: comparing on a few built-in texts")
        return []
    try:
        data = _data_of(folder / "config.yaml")
        return list(islice(_documents(data), NUM_EXAMPLES))
    except UserError as error:
        print(f"the data of {folder / 'config.yaml'} is not at hand ({error}): comparing on a few built-in texts")
        return []


def _data_of(config: Path) -> SFTDataModule:
    """Return the data of a run; what its `config.yaml` says of the trainer does not matter here."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
        part = Path(folder) / "config.yaml"
        part.write_text(yaml.safe_dump({key: wanted[key] for key in _OF_THE_DATA if key in wanted}), encoding="utf-8")
        return SFTCommandLine("merge", ["--config", str(part)]).data


def _documents(data: SFTDataModule) -> Iterator[list[int]]:
    """Yield the token ids of the documents of the validation rows, or of the training rows where there are none."""
    data.setup("fit")
    loaders = data.val_dataloader() if data.val_names else [data.train_dataloader()]
    for batch in chain.from_iterable(loaders):
        for ids, labels, lengths in zip(batch["input_ids"], batch["labels"], batch["document_lengths"], strict=True):
            for document, targets in zip(ids.split(lengths), labels.split(lengths), strict=True):
                if bool((targets >= 0).any()):  # padding has no label
                    yield document.tolist()
