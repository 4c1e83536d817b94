"""Merge adapters into their base model and verify the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sft_lightning.cli import quiet_libraries
from sft_lightning.models.merging import merge_adapters
from sft_lightning.parsing import CommandParser


def main(args: Sequence[str]) -> None:
    """Parse the options and merge."""
    quiet_libraries()
    parser = CommandParser(prog="python -m sft_lightning merge", description=__doc__)
    parser.add_argument(
        "--adapter", action="append", type=str, required=True, help="A PEFT adapter folder; repeat to merge several."
    )
    parser.add_function_arguments(merge, skip={"adapter"})
    merge(**parser.parse_args(list(args)).as_dict())


def merge(
    adapter: Sequence[str],
    output_dir: str,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Merge adapters into their base model; the result is a folder that `AutoModelForCausalLM` loads.

    Args:
        adapter: PEFT adapter folders, merged in order.
        output_dir: Folder to write; replaced as a whole.
        base: Base model; default: the one that the first adapter names.
        dtype: Type of the written weights; default: the base's own.
    """
    report = merge_adapters(adapter, output_dir, base=base, dtype=dtype)
    print(
        f"merged into {report.output_dir} ({report.dtype}); loaded again, its logits differ from the adapted "
        f"model's by at most {report.max_logit_difference:.1e} (the largest logit is {report.logit_scale:.1f}; "
        f"merging moved logits by up to {report.moved:.1e})"
    )
