"""Print the results of the data benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from processes import hardware
from rich.console import Console
from rich.table import Table

_MIB = 2**20


def show(result: dict[str, Any], peers: Sequence[str]) -> None:
    """Print the measurements.

    Args:
        result: The results, without date and hardware.
        peers: Names of the peers, whose results are lists with the fastest first.
    """
    console = Console()
    console.print(f"{result['num_rows']:,} rows, {hardware()}, best of {result['repeats']}", highlight=False)
    table = Table("", "seconds", "tokens/s", "ours is … times as fast")
    ratios = result["times_as_fast_as"]
    if "tokenizers" in result:
        table.add_row("encode_batch_fast alone", *_speed(result["tokenizers"]), _ratio(ratios, "tokenizers"))
    if "ours" in result:
        table.add_row("ours: prepare, no store yet", *_speed(result["ours"]), "")
        table.add_row("ours: prepare, sixteen rows", f"{result['ours']['fixed_seconds']:.2f}", "", "")
        table.add_row("ours: prepare, from the store", f"{result['ours']['cached_seconds']:.2f}", "", "")
    for peer in peers:
        for place, answer in enumerate(result.get(peer, [])):
            table.add_row(_way(peer, answer), *_speed(answer), "" if place else _ratio(ratios, peer))
    console.print(table)
    if "packing" in result:
        packing = result["packing"]
        console.print(f"best_fit: {packing['examples_per_second']:,.0f} examples/s, fill {packing['fill']:.4f}")
    if "ours" in result:
        for tokens, peak in result["ours"]["peak_bytes"].items():
            per_token = f"{peak / int(tokens):,.1f} bytes/token"
            console.print(f"prepare of {int(tokens):,} tokens: {peak / _MIB:,.0f} MiB above imports, {per_token}")
        console.print(f"each further token: {result['ours']['bytes_per_further_token']:.2f} bytes")


def _speed(answer: dict[str, Any]) -> tuple[str, str]:
    return f"{answer['seconds']:.2f}", f"{answer['tokens'] / answer['seconds']:,.0f}"


def _ratio(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.2f}" if name in ratios else ""


def _way(peer: str, answer: dict[str, Any]) -> str:
    loss = f"{answer['loss']} loss, " if "loss" in answer else ""
    return f"{peer}: {loss}{'packed' if answer['packing'] else 'not packed'}, {answer['workers']} workers"
