"""What several systems do alike with their data."""

from __future__ import annotations

from pathlib import Path

from sft_lightning.migration.draft import Draft


def sources(draft: Draft, key: str, path: str | None, format_name: str | None) -> None:
    """Set a source, named like its file."""
    if path is not None:
        chosen = {} if format_name is None else {"format": format_name}
        draft.set(key, {source_name(path): {"path": path, **chosen}})


def source_name(path: str) -> str:
    """Return a source's name for a path."""
    name = "".join(each if each.isalnum() else "_" for each in Path(path).name.partition(".")[0]).strip("_")
    return name or "train"


def unpacked(draft: Draft) -> None:
    """Give each example a row, as systems do that know no packing: an optimizer step keeps its number of examples."""
    draft.set("data.packing", "none", "as there; best_fit is faster, with more examples per optimizer step")
