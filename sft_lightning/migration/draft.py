"""The translated YAML: its keys, comments on them, and the options that could not be migrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class Draft:
    """Collects keys in the order in which they are set, and writes them as YAML."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        """Values by dotted key."""

        self.comments: dict[str, str] = {}
        """Comments by dotted key; each follows its key on the same line."""

        self.omitted: list[tuple[str, str]] = []
        """Options that were not migrated, each with the reason."""

    def set(self, key: str, value: Any, comment: str = "") -> None:
        """Set a key.

        Args:
            key: Dotted key.
            value: Value that YAML can hold.
            comment: Comment behind the key; none if empty.
        """
        self.values[key] = value
        if comment:
            self.comments[key] = comment

    def drop(self, prefix: str) -> None:
        """Remove every key that begins with a prefix."""
        self.values = {key: value for key, value in self.values.items() if not key.startswith(prefix)}

    def omit(self, option: str, reason: str) -> None:
        """Note that an option is not migrated.

        Args:
            option: The option as the user wrote it.
            reason: Why not, or what to do instead.
        """
        self.omitted.append((option, reason))

    def text(self, heading: str) -> str:
        """Return the YAML, after the heading as a comment."""
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
        if self.omitted:
            lines += ["", "# Not migrated:", *(f"#   {option}: {reason}" for option, reason in self.omitted)]
        return "\n".join(lines) + "\n"

    def _lines(self, name: str, value: Any, above: str, depth: int) -> list[str]:
        key = f"{above}.{name}" if above else name
        indent = "  " * depth
        comment = f"  # {self.comments[key]}" if key in self.comments else ""
        if isinstance(value, dict) and key not in self.values:
            ordered = sorted(value.items(), key=lambda item: item[0] != "class_path")
            inner = [line for each, below in ordered for line in self._lines(each, below, key, depth + 1)]
            return [f"{indent}{name}:{comment}", *inner]
        return [f"{indent}{name}: {_inline(value)}{comment}"]


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def set_source(draft: Draft, key: str, path: str | None, format_name: str | None) -> None:
    """Set a source that is named after its file.

    Args:
        draft: The YAML.
        key: `data.sources` or `data.val_sources`.
        path: Path of the data; `None` sets nothing.
        format_name: `format` of the source; `None` leaves it to be found from the data.
    """
    if path is not None:
        source = {"path": path} if format_name is None else {"path": path, "format": format_name}
        draft.set(key, {source_name(path): source})


def source_name(path: str) -> str:
    """Return the name of a source for the path of its data."""
    name = "".join(each if each.isalnum() else "_" for each in Path(path).name.partition(".")[0]).strip("_")
    return name or "train"


def keep_examples_unpacked(draft: Draft) -> None:
    """Give each example its own row, as systems without packing do, so that a step keeps its number of examples."""
    draft.set("data.packing", "none", "as in the original; best_fit is faster, with more examples per optimizer step")
