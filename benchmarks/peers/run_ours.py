"""Ours: `python -m sft_lightning prepare` on the raw rows, timed after everything is imported.

`seconds` is from the raw rows to store and plan, with the tokenizer loaded, as for the peers; `command_seconds` is all
that the command does: parsing the configuration and loading the tokenizer, too.
"""

from __future__ import annotations

import contextlib
import io
import re

from job import Answer, Job, peak_memory, run, seconds_of, versions

import sft_lightning.data.datamodule
from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.commands import prepare
from sft_lightning.cli.quiet import quiet_libraries

_STORE = re.compile(r"^train/\w+: ([\d,]+) tokens in .*, (built now|found)$", re.MULTILINE)
"""What `prepare` says of a source at its end."""


def measure(job: Job) -> Answer:
    """Prepare the job's `config`; `built` says whether the store was made now or found.

    Peak memory is in bytes above the peak of the imports. It counts the tokenizer, and the store's pages,
    which are mapped.
    """
    imported = peak_memory()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        quiet_libraries()
        before, data = seconds_of(lambda: _loaded(job["config"]))
        seconds, _ = seconds_of(lambda: prepare.prepare(data))
    peak = peak_memory() - imported
    said = _STORE.search(printed.getvalue())
    if said is None:
        raise ValueError(f"prepare did not say what it stored, but: {printed.getvalue()[-500:]!r}")
    return {
        "seconds": seconds,
        "command_seconds": before + seconds,
        "tokens": int(said[1].replace(",", "")),
        "built": said[2] == "built now",
        "peak_bytes_above_imports": peak,
        "versions": versions("sft-lightning", "tokenizers", "transformers", "torch"),
    }


def _loaded(config: str) -> sft_lightning.data.datamodule.SFTDataModule:
    """Return the data of a configuration with its tokenizer loaded and its template bound."""
    data = SFTCommandLine("prepare", ["--config", config], prepare.add_options).data
    _ = data.builder
    return data


if __name__ == "__main__":
    run(measure)
