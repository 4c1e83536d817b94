"""What a check found: a line with its figure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One invariant, checked."""

    name: str
    """What was checked: `gradient 2 × 2`."""

    passed: bool | None
    """`None` where it does not apply to the configuration."""

    figure: str
    """What was found, with the tolerance it was held against; or why the check does not apply."""

    def line(self) -> str:
        """Return the line that is printed."""
        sign = {True: "✓", False: "✗", None: "–"}[self.passed]
        return f"{sign} {self.name:<26} {self.figure}"


def within(name: str, value: float, tolerance: float, what: str) -> Check:
    """Return the check that a figure is at most its tolerance; not-a-number is above every tolerance."""
    return Check(name, value <= tolerance, f"{what} {value:.1e} (at most {tolerance:.1e})")
