"""The checks, one file each; each returns `Check`s, which are printed as one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    """Name of the check: `gradient 2 × 2`."""

    passed: bool | None
    """`None` if the check does not apply to the configuration."""

    figure: str
    """The measured figure with its tolerance, or why the check does not apply."""

    def line(self) -> str:
        """Return the line that is printed."""
        sign = {True: "✓", False: "✗", None: "–"}[self.passed]
        return f"{sign} {self.name:<26} {self.figure}"


def within(name: str, value: float, tolerance: float, what: str) -> Check:
    """Return a check that passes if a value is at most its tolerance; NaN fails.

    Args:
        name: Name of the check.
        value: The measured value.
        tolerance: Largest value that passes.
        what: What the value is, as the figure says it.
    """
    return Check(name, value <= tolerance, f"{what} {value:.1e} (at most {tolerance:.1e})")
