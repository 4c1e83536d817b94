"""The YAML in the making: keys, remarks on them, and what could not be carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class Draft:
    """Keys in the order in which they were set."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        """By dotted key."""

        self.remarks: dict[str, str] = {}
        """What stands behind a key."""

        self.left: list[tuple[str, str]] = []
        """What was not carried over, and why."""

    def set(self, key: str, value: Any, remark: str = "") -> None:
        """Set a dotted key, with a remark behind it."""
        self.values[key] = value
        if remark:
            self.remarks[key] = remark

    def drop(self, prefix: str) -> None:
        """Take back every key that begins so."""
        self.values = {key: value for key, value in self.values.items() if not key.startswith(prefix)}

    def leave(self, option: str, why: str) -> None:
        """Say why an option is not carried over."""
        self.left.append((option, why))

    def text(self, heading: str) -> str:
        """Return the YAML, the heading above it as a comment."""
        tree: dict[str, Any] = {}
        for key, value in self.values.items():
            *above, last = key.split(".")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
        order = [key for key in ("task", "seed_everything", "model", "data", "trainer") if key in tree]
        lines = [f"# {line}" for line in heading.splitlines()]
        for key in order:
            lines += self._lines(key, tree[key], "", 0)
        if self.left:
            lines += ["", "# Not carried over:", *(f"#   {option}: {why}" for option, why in self.left)]
        return "\n".join(lines) + "\n"

    def _lines(self, name: str, value: Any, above: str, depth: int) -> list[str]:
        key = f"{above}.{name}" if above else name
        indent = "  " * depth
        remark = f"  # {self.remarks[key]}" if key in self.remarks else ""
        if isinstance(value, dict) and key not in self.values:
            ordered = sorted(value.items(), key=lambda item: item[0] != "class_path")
            inner = [line for each, below in ordered for line in self._lines(each, below, key, depth + 1)]
            return [f"{indent}{name}:{remark}", *inner]
        return [f"{indent}{name}: {_inline(value)}{remark}"]


def _inline(value: Any) -> str:
    """Return a value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


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
