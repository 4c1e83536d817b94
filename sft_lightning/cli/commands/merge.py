"""Merge adapters into their base model and verify the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.parsing import command_parser
from sft_lightning.cli.quiet import quiet_libraries
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.formats.user_format import is_dotted_path
from sft_lightning.errors import UserError
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.report import MergeReport, run_folder_of
from sft_lightning.models.adapters.trained_base import read_manifest
from sft_lightning.types import num_tokens

_DATA_KEYS = ("seed_everything", "task", "data")
_TOKENIZER_KEYS = ("model_name_or_path", "tokenizer_name_or_path", "add_tokens", "add_special_tokens")
"""Keys of a run's `config.yaml`, and of its `model`, that decide what its data is. The file may be a stranger's, so
nothing else of it is read: no class path, no folder to write, no permission to run code."""

NUM_EXAMPLES = 8
"""Number of examples of the run's data on which a merged model is compared with the trained one."""


def main(args: Sequence[str]) -> None:
    """Parse the options and run `merge`."""
    quiet_libraries()
    parser = command_parser("merge", __doc__, args)
    parser.add_argument(
        "--adapter", action="append", type=str, required=True, help="A PEFT adapter folder. Repeat it to merge several."
    )
    parser.add_argument("--output_dir", type=str, required=True, help="New folder to write.")
    parser.add_class_arguments(MergeOptions, None)
    config = parser.instantiate(parser.parse_args(list(args)))
    options = MergeOptions(**{field.name: config[field.name] for field in fields(MergeOptions)})
    merge(config["adapter"], config["output_dir"], options)


def merge(adapters: Sequence[str], output_dir: str, options: MergeOptions) -> None:
    """Merge adapters into their base model and print what was measured.

    Args:
        adapters: PEFT adapter folders, merged in order.
        output_dir: Folder to write.
        options: How to merge.

    Raises:
        UserError: If a folder is not an adapter, or if an adapter does not fit the base or the options.
    """
    last = Path(adapters[-1])
    compared = options.verify and len(adapters) == 1
    quantized = options.quantization is not None or bool(read_manifest(last).get("quantization"))
    rows = _run_examples(last, options.trust_remote_code) if compared and quantized else []
    report = merge_adapters(adapters, output_dir, options, rows=rows)
    print("\n".join(_report_lines(report, num_examples=len(rows))))


def _report_lines(report: MergeReport, num_examples: int) -> Iterator[str]:
    layout = ", in Meta's layout" if report.format == "pth" else ""
    yield f"merged model: {report.output_dir} ({report.dtype}{layout})"
    if report.unverified is not None:
        yield report.unverified
    if report.difference is None:
        yield "not verified (--verify false)"
    else:
        difference = report.difference
        yield (
            f"verified: loaded again, its logits differ from the adapted model's by at most {difference.largest:.1e} "
            f"(largest logit {difference.scale:.1f}; the adapters change logits by up to {difference.moved:.1e})"
        )
    texts = f"{num_examples} examples of the run's data" if num_examples else "a few built-in texts"
    if report.num_verified:
        yield f"verified: {report.num_verified} weights, computed again from the files, are base + alpha / r · B A"
    for base, divergence in report.divergences.items():
        written = " (written)" if base == report.base else ""
        yield f"KL(trained ‖ merged into the {base} base) on {texts}: {divergence:.3e} nats per token{written}"
    if report.whole_model_reason is not None:
        yield f"merged with the whole model in memory: {report.whole_model_reason}"
    if report.untied:
        yield "the head is no longer tied to the embeddings (tie_word_embeddings: false): training changed one of them"
    if report.left_out:
        names = f"{report.left_out[0]}{', …' if len(report.left_out) > 1 else ''}"
        yield f"left out {len(report.left_out)} tensors of the base's files that the model does not load: {names}"


def _run_examples(adapter: Path, trust_remote_code: bool) -> list[list[int]]:
    """Return the token ids of a few examples of an adapter's run; if there are none, print why."""
    folder = run_folder_of(adapter)
    if folder is None:
        print(f"{adapter} is not in a run folder; comparing on a few built-in texts")
        return []
    try:
        return list(islice(_documents(_run_data(folder / "config.yaml", trust_remote_code)), NUM_EXAMPLES))
    except UserError as error:
        print(f"cannot read the data of {folder / 'config.yaml'} ({error}); comparing on a few built-in texts")
        return []


def _run_data(config: Path, trust_remote_code: bool) -> SFTDataModule:
    """Return the data of a run from its `config.yaml`; code that it names runs only with `--trust_remote_code`."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "config.yaml"
        keys = _data_keys(yaml.safe_load(config.read_text(encoding="utf-8")), trust_remote_code)
        part.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return SFTCommandLine("merge", ["--config", str(part)]).data


def _data_keys(content: Any, trust_remote_code: bool) -> dict[str, Any]:
    """Return the keys of a run's `config.yaml` that its data is read with.

    Raises:
        UserError: If it has no keys, or a source's format is a Python function and `trust_remote_code` is off.
    """
    if not isinstance(content, dict):
        raise UserError("it is not a mapping of keys")
    keys = {key: content[key] for key in _DATA_KEYS if key in content}
    model = {key: content["model"][key] for key in _TOKENIZER_KEYS if key in content.get("model", {})}
    data = {key: value for key, value in keys.get("data", {}).items() if key not in ("store_dir", "trust_remote_code")}
    sources = [source for sources in data.values() if isinstance(sources, dict) for source in sources.values()]
    formats = [str(source.get("format")) for source in sources if isinstance(source, dict)]
    functions = [name for name in formats if is_dotted_path(name)]
    if functions and not trust_remote_code:
        raise UserError(f"its format {functions[0]!r} is Python code, which runs only with --trust_remote_code true")
    return {**keys, "model": {**model, "trust_remote_code": trust_remote_code}, "data": data}


def _documents(data: SFTDataModule) -> Iterator[list[int]]:
    """Yield the token ids of the documents of the validation rows, or of the training rows if there are none."""
    data.setup("fit")
    loaders = data.val_dataloader() if data.source_names("val") else [data.train_dataloader()]
    for batch in chain.from_iterable(loaders):
        for ids, labels, lengths in zip(batch["input_ids"], batch["labels"], batch["document_lengths"], strict=True):
            sizes = [num_tokens(length) for length in lengths]
            for document, document_labels in zip(ids.split(sizes), labels.split(sizes), strict=True):
                if bool((document_labels >= 0).any()):  # padding has no labels
                    yield document.tolist()
