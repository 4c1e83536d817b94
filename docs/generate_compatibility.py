"""Writes docs/compatibility.md from sft_lightning/compat: the undocumented parts of each library that are used.

python docs/generate_compatibility.py
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import sft_lightning.compat
from sft_lightning.compat.names import ENTRIES, Entry

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"

_INTRODUCTION = """\
# Compatibility

All use of undocumented parts of other libraries (private names, patches, the wording of messages) is in
`sft_lightning/compat`, one module per library; `tests/compat/test_seam.py` checks that. Each function checks that its
names exist when it is called. If the installed version lacks one, only that feature is refused, with a message that
names the versions to install; help, `preview` and all other runs work. Each function has a test of the behaviour that
it relies on. Expected warnings of the libraries are silenced in `sft_lightning/cli/quiet.py`.

## Versions

Lower bounds are the oldest releases that the tests pass with. Upper bounds are the next untested releases: the next
minor release of a library that changes such names in minor releases, else the next major one.

    make test-oldest   # the lowest allowed versions, in .venv-oldest: the tests of compat and the end-to-end tests
    make test-newest   # the newest allowed versions, in .venv-newest: the same tests

`make test-oldest TORCH=2.13.0` uses that version of torch; a CPU-only build saves several gigabytes.
"""

_NAMES = """
## Names

- **since**: the earliest release that was checked and has the names.
- **feature**: what is refused if a name is missing.
- **replacement**: what to use when the names are gone.
"""

_TABLE = """
| function | purpose | names | since | feature | replacement |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Return the page, as Markdown."""
    for found in pkgutil.walk_packages(sft_lightning.compat.__path__, "sft_lightning.compat."):
        importlib.import_module(found.name)
    places = {entry.function: number for number, entry in enumerate(ENTRIES)}  # modules in the order of their import
    by_library = sorted(ENTRIES, key=lambda each: (each.library, _module(each), places[each.function]))
    parts = [
        _INTRODUCTION,
        "\n".join(_versions()),
        _NAMES,
    ]
    for library, entries in itertools.groupby(by_library, key=lambda entry: entry.library):
        parts.append(f"\n### {library}\n{_TABLE}" + "\n".join(map(_row, entries)) + "\n")
    return "".join(parts)


def _module(entry: Entry) -> str:
    return pkgutil.resolve_name(f"sft_lightning.compat.{entry.function}").__module__


def _versions() -> Iterator[str]:
    """Yield the table of what is allowed and what was tried."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest, newest = (_pins(ROOT / name) for name in ("constraints-oldest.txt", "constraints.txt"))
    yield "\n| library | allowed | `make test-oldest` | `make setup` |\n| --- | --- | --- | --- |"
    for library in sorted({entry.library for entry in ENTRIES}):
        allowed = re.search(rf'"{library}(?:\[\w+\])?(>=[^"]+)"', project)
        if allowed is None:
            raise ValueError(f"pyproject.toml has no bounds for {library}")
        yield f"| {library} | {allowed[1].replace(',', ', ')} | {oldest[library]} | {newest[library]} |"
    yield ""


def _pins(file: Path) -> dict[str, str]:
    """Return the versions that a constraints file pins; of several for one library, the last."""
    return dict(re.findall(r"(?m)^([\w-]+)==([^;\s]+)", file.read_text(encoding="utf-8")))


def _row(entry: Entry) -> str:
    function = pkgutil.resolve_name(f"sft_lightning.compat.{entry.function}")
    meaning = (function.__doc__ or "").partition("\n\n")[0]
    names = [f"`{name.replace(':', '.')}`" for name in entry.names]
    used = ", ".join([*names, *(f"attribute `{path}`" for path in entry.attributes)]) or "behaviour"
    refused = f"{entry.feature} (left out, with a warning)" if entry.optional else entry.feature
    cells = [f"`{entry.function}`", meaning, used, entry.since, refused, entry.replacement]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "&#124;") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
