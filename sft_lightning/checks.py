"""Checks: what was measured, within which bound, in what time. A check that fails stops its command.

A check with a tolerance *verifies*; "proven" is only for what cannot be otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


class CheckError(RuntimeError):
    """What a run does is not what it promises.

    It ends the command with exit status 1 and one message: the user did nothing wrong, and nothing after it could be
    trusted.
    """

    def __init__(self, check: Check) -> None:
        super().__init__(
            f"check failed: {check.name}: {check.figure}{f' ({check.bound})' if check.bound else ''}. "
            "The run is stopped, because it would not train what its configuration says"
        )


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    """Name of the check: `gradient 2 × 2`."""

    passed: bool | None
    """`None` if the check does not apply to the configuration."""

    figure: str
    """What was measured, or why the check does not apply."""

    bound: str = ""
    """The largest difference that passes: `at most 1.0e-05`; empty for checks that are exact."""

    seconds: float = 0.0
    """Time that the check took."""

    times: int = 1
    """How often it was made."""

    def line(self) -> str:
        """Return the line that is printed."""
        bound = f" ({self.bound})" if self.bound else ""
        return f"{self.sign} {self.name:<26} {self.figure}{bound}"

    @property
    def sign(self) -> str:
        """✓, ✗, or – if the check does not apply."""
        return {True: "✓", False: "✗", None: "–"}[self.passed]


def within(name: str, value: float, tolerance: float, what: str) -> Check:
    """Return a check that passes if a value is at most its tolerance; NaN fails.

    Args:
        name: Name of the check.
        value: The measured value.
        tolerance: Largest value that passes.
        what: What the value is, as the figure says it.
    """
    return Check(name, value <= tolerance, f"{what} {value:.1e}", f"at most {tolerance:.1e}")


class CheckLog:
    """The checks of a run, in the order of their first outcome. A check that is made again keeps its latest outcome."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self.exchange: Callable[[Check], Sequence[Check]] = lambda check: [check]
        """Returns the outcomes that all processes of the run have of one check; all of them stop if one fails."""

    def run(self, function: Callable[[], Check]) -> Check:
        """Make a check, measure its time, and note it.

        Args:
            function: Makes the check.

        Raises:
            CheckError: If it fails.
        """
        start = time.perf_counter()
        check = function()
        return self.note(replace(check, seconds=time.perf_counter() - start))

    def note(self, check: Check) -> Check:
        """Note an outcome; the time and the number of times add up over outcomes of the same name.

        All processes of a run note the same checks in the same order.

        Args:
            check: The outcome.

        Raises:
            CheckError: If it fails.
        """
        check = next((each for each in self.exchange(check) if each.passed is False), check)
        before = self._checks.get(check.name)
        if before is not None:
            check = replace(check, seconds=before.seconds + check.seconds, times=before.times + check.times)
        self._checks[check.name] = check
        if check.passed is False:
            raise CheckError(check)
        return check

    @property
    def checks(self) -> list[Check]:
        """All checks so far."""
        return list(self._checks.values())

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the checks for a manifest."""
        return [asdict(check) for check in self.checks]
