"""Undocumented names of other libraries: which functions use them, and what happens if one is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from sft_lightning.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_PACKAGE = "sft-lightning"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A function of this folder, and the names of a library that it needs."""

    function: str
    """Module and name of the function, without `sft_lightning.compat.`."""

    names: tuple[str, ...]
    """`module:attribute` of what must exist in the library; none for a behaviour, such as the wording of a message."""

    attributes: tuple[str, ...]
    """Attributes, dotted, that the function's first argument must have; they exist on objects only."""

    feature: str
    """What is refused without them, at the start of a message: a YAML key, a command, or what the user gets from it."""

    since: str
    """The earliest release of the library in which the names were found as they are used here."""

    replacement: str
    """What to use when they are gone."""

    optional: bool
    """Go on without the feature, and warn once, instead of refusing it."""

    warned: set[str] = field(default_factory=set, compare=False, repr=False)
    """Messages that have been logged."""

    @property
    def library(self) -> str:
        """The library's import name: that of the first name, else that of the function's module."""
        return self.names[0].partition(":")[0].partition(".")[0] if self.names else self.function.partition(".")[0]

    def missing(self, subject: object = None) -> list[str]:
        """Return the names that the installed library does not have.

        Args:
            subject: The object that `attributes` are looked for on.
        """
        gone = [name for name in self.names if not _exists(name)]
        kind = type(subject).__name__
        return gone or [f"{kind}.{path}" for path in self.attributes if not _reaches(subject, path)]

    @property
    def is_checked(self) -> bool:
        """Whether a call looks for anything; a behaviour shows only in the tests."""
        return bool(self.names or self.attributes)

    def message(self, missing: list[str]) -> str:
        """Return the message about missing names: the feature, the library, and what to install."""
        installed = _version(self.library)
        return (
            f"{self.feature}: not available, because {self.library} {installed} has no {missing[0].replace(':', '.')}; "
            f"run pip install '{_requirement(self.library)}'"
        )


ENTRIES: list[Entry] = []
"""Every entry of the modules that are imported."""


def uses(
    *names: str,
    feature: str,
    since: str,
    replacement: str,
    attributes: tuple[str, ...] = (),
    optional: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the undocumented names or behaviour that a function needs; each call checks the names first.

    Args:
        names: `module:attribute`, the first one of the library that the entry belongs to; none for a behaviour.
        feature: As in `Entry`, as all that follow.
        since: The earliest release in which they were found.
        replacement: What to use when they are gone.
        attributes: Attributes of the function's first argument.
        optional: Return `None` and warn once, instead of refusing the feature.

    Returns:
        A decorator of a function, or of a class's `__init__`; the function raises a `UserError` if a name is missing.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        where = function.__module__.removeprefix("sft_lightning.compat.")
        entry = Entry(
            function=f"{where}.{function.__qualname__.removesuffix('.__init__')}",
            names=names,
            attributes=attributes,
            feature=feature,
            since=since,
            replacement=replacement,
            optional=optional,
        )
        ENTRIES.append(entry)
        if not names and not attributes:
            return function

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            missing = entry.missing(args[0] if args else None)
            if not missing:
                return function(*args, **kwargs)
            message = entry.message(missing)
            if not optional:
                raise UserError(message)
            if message not in entry.warned:
                entry.warned.add(message)
                _logger.warning(message)
            return None  # type: ignore[return-value]  # an optional function says so in its own type

        return checked

    return decorate


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        return _reaches(importlib.import_module(module), path)
    except ImportError:
        return False


def _reaches(subject: object, path: str) -> bool:
    try:
        operator.attrgetter(path)(subject)
    except AttributeError:
        return False
    return True


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _requirement(library: str) -> str:
    """Return what this package asks of a library, such as `peft<0.22,>=0.19`."""
    try:
        requirements = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return library
    plain = [each.partition(";")[0].strip() for each in requirements]
    return next((each for each in plain if re.split(r"[^\w-]", each)[0] == library), library)
