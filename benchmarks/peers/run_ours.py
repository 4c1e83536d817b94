"""Run `python -m sft_lightning prepare` on the raw rows; imports are not timed.

`seconds` is the time from the raw rows to token store and plan, with the tokenizer loaded, as for the peers.
`command_seconds` includes parsing the configuration and loading the tokenizer.
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
"""The line that `prepare` prints for a source."""


def measure(job: Job) -> Answer:
    """Prepare the job's `config`; `built` is whether the token store was built or found.

    Peak memory is in bytes above the peak of the imports. It includes the tokenizer and the mapped pages of the store.
    """
    imported = peak_memory()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        quiet_libraries()
        before, data = seconds_of(lambda: _loaded(job["config"]))
        seconds, _ = seconds_of(lambda: prepare.prepare(data))
    peak = peak_memory() - imported
    line = _STORE.search(printed.getvalue())
    if line is None:
        raise ValueError(f"prepare did not print what it stored: {printed.getvalue()[-500:]!r}")
    return {
        "seconds": seconds,
        "command_seconds": before + seconds,
        "tokens": int(line[1].replace(",", "")),
        "built": line[2] == "built now",
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
