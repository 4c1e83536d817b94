"""What came of each fault: a line while running, a table at the end, JSON if asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.faults.faults import Fault


@dataclass(frozen=True)
class Outcome:
    """What one command made of a fault."""

    caught: bool
    """Whether it ended with an error, or said what it was to say."""

    message: str
    """The error; or why nothing was noticed, if the command was still running at its limit."""

    seconds: float
    """Wall time."""

    command: str
    """The command that ended it: `fit`, `merge`, `selftest`."""


@dataclass(frozen=True)
class Row:
    """A fault, or a scenario without one."""

    fault: Fault
    """What was planted."""

    outcomes: Mapping[str, Outcome | None]
    """By command; `None` where the command does not apply."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing was planted."""
        return not (self.fault.edits or self.fault.last or self.fault.files)

    @property
    def is_caught(self) -> bool:
        """Whether any command noticed it."""
        return any(outcome is not None and outcome.caught for outcome in self.outcomes.values())

    @property
    def is_bad(self) -> bool:
        """Whether a fault passed, or a run without one did not."""
        hangs = any(
            outcome is not None and not outcome.caught and outcome.message for outcome in self.outcomes.values()
        )
        return self.is_caught or hangs if self.is_clean else not self.is_caught

    def line(self) -> str:
        """Return the row in one line of text."""
        cells = (f"{name} {_cell(outcome)}" for name, outcome in self.outcomes.items())
        return f"{'BAD ' if self.is_bad else 'ok  '} {self.fault.name:<36} {' · '.join(cells)}"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "–"
    sign = "✓" if outcome.caught else "passes"
    return f"{sign} {outcome.seconds:.1f} s {outcome.message}".rstrip()


def print_table(rows: Sequence[Row], file: TextIO) -> None:
    """Print the rows as a Markdown table, and the counts.

    Args:
        rows: All rows.
        file: Where to print.
    """
    names = list(rows[0].outcomes) if rows else []
    print(f"\n| fault | {' | '.join(names)} | message |\n|---|{'---|' * len(names)}---|", file=file)
    planted = [row for row in rows if not row.is_clean]
    for row in planted:
        cells = [_short(row.outcomes[name]) for name in names]
        print(f"| {row.fault.name} | {' | '.join(cells)} | {_message(row)} |", file=file)
    print(f"\n{counts(rows)}", file=file)


def _short(outcome: Outcome | None) -> str:
    if outcome is None:
        return "–"
    return f"{'caught' if outcome.caught else 'hangs' if outcome.message else 'passes'}, {outcome.seconds:.1f} s"


def _message(row: Row) -> str:
    """Return the first message in the order of the commands, short enough for a table."""
    said = next((each.message for each in row.outcomes.values() if each is not None and each.caught), "")
    said = said.replace("|", "\\|")
    return said if len(said) <= 160 else f"{said[:157]}…"


def counts(rows: Sequence[Row]) -> str:
    """Return how many faults each command noticed, how many passed all, and how many runs without a fault did not.

    Args:
        rows: All rows.
    """
    planted, clean = [row for row in rows if not row.is_clean], [row for row in rows if row.is_clean]
    names = list(rows[0].outcomes) if rows else []
    noticed = {name: sum(bool(row.outcomes[name] and row.outcomes[name].caught) for row in planted) for name in names}
    parts = [f"{len(planted)} faults", *(f"{name} notices {number}" for name, number in noticed.items())]
    parts.append(f"{sum(row.is_bad for row in planted)} pass unnoticed")
    return f"{', '.join(parts)}; {sum(row.is_bad for row in clean)} false alarms in {len(clean)} scenarios"


def write_json(rows: Sequence[Row], file: Path) -> None:
    """Write all rows, with the whole messages.

    Args:
        rows: All rows.
        file: The file to write.
    """
    entries = [
        {
            "fault": row.fault.name,
            "wrong": row.fault.wrong,
            "scenario": row.fault.scenario,
            "bad": row.is_bad,
            **{name: None if outcome is None else asdict(outcome) for name, outcome in row.outcomes.items()},
        }
        for row in rows
    ]
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
