"""A system's options, one entry each: the source of the translation and of its documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import Given, is_true
from sft_lightning.migration.draft import Draft

Kind = Literal["text", "number", "flag", "words", "commas"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of another system.

    `how` says who carries it: `plain`, to `key` as it is; `joint`, the system's `finish`, together with others;
    `left`, nobody, and `note` says why.
    """

    name: str
    key: str = ""
    """Our key, dotted; several with commas."""

    note: str = ""
    default: str | None = None
    """That system's default, written out where ours is another."""

    kind: Kind = "text"
    how: Literal["plain", "joint", "left"] = "plain"


def plain(name: str, key: str, kind: Kind = "text", *, default: str | None = None, note: str = "") -> Option:
    """An option that our key takes as it is."""
    return Option(name=name, key=key, kind=kind, default=default, note=note)


def joint(name: str, key: str, note: str = "", *, default: str | None = None) -> Option:
    """An option that is carried over together with others."""
    return Option(name=name, key=key, note=note, default=default, how="joint")


def left(name: str, why: str, *, key: str = "") -> Option:
    """An option that nothing is carried over of."""
    return Option(name=name, key=key, note=why, how="left")


class Options:
    """What was given, with the system's defaults behind it.

    Args:
        given: As written.
        known: The system's options.
        draft: Gets remarks on values that cannot be read.
    """

    def __init__(self, given: Given, known: Sequence[Option], draft: Draft) -> None:
        self.given = given.options
        self.launcher = given.launcher
        self.program = given.program
        self.draft = draft
        self._defaults = {option.name: option.default for option in known}

    def has(self, name: str) -> bool:
        """Whether the user wrote it."""
        return name in self.given

    def words(self, name: str) -> list[str]:
        """Return its values, those of the default if it is not given; empty if there is none."""
        default = self._defaults.get(name)
        return self.given.get(name, [] if default is None else default.split())

    def parts(self, name: str) -> list[str]:
        """Return its values, commas between them."""
        return [part for word in self.words(name) for part in word.split(",") if part]

    def text(self, name: str) -> str | None:
        """Return its one value."""
        return next(iter(self.words(name)), None)

    def flag(self, name: str) -> bool:
        """Whether it is on."""
        default = self._defaults.get(name)
        return is_true(self.given[name]) if name in self.given else default is not None and is_true([default])

    def number(self, name: str) -> int | float | None:
        """Return its value as a number; `None`, with a remark, if the script leaves it open."""
        text = self.text(name)
        if text is None:
            return None
        if text.startswith("$"):
            self.draft.leave(f"--{name} {text}", "the script does not say what this is; set it yourself")
            return None
        return as_number(name, text)

    def shown(self, name: str) -> str:
        """Return the option as it was written."""
        return " ".join([f"--{name}", *self.given.get(name, [])])


def as_number(name: str, text: str) -> int | float:
    """Return a number, whole if it is.

    Raises:
        UserError: If it is none.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"migrate: --{name}: {text!r} is not a number; correct it there first") from error
    return int(value) if value.is_integer() and "e" not in text.lower() and "." not in text else value


@dataclass(frozen=True, kw_only=True)
class System:
    """Another system."""

    name: str
    title: str
    source: str
    """Where the options were read."""

    options: Sequence[Option]
    finish: Callable[[Options, Draft], None]
    """Carries over what stands in several options together, and what the system does without being asked."""


def translate(system: System, given: Given) -> Draft:
    """Return the YAML of what was given to a system.

    Raises:
        UserError: If a value cannot be what the option takes.
    """
    draft = Draft()
    options = Options(given, system.options, draft)
    known = {option.name: option for option in system.options}
    for option in system.options:
        if option.how == "plain" and (option.name in given.options or option.default is not None):
            _carry(option, options, draft, system.title)
    system.finish(options, draft)
    for name in given.options:
        if name not in known:
            draft.leave(options.shown(name), f"not an option of {system.title} that is known here")
        elif known[name].how == "left":
            draft.leave(options.shown(name), known[name].note)
    return draft


def _carry(option: Option, options: Options, draft: Draft, title: str) -> None:
    read: dict[Kind, Callable[[str], Any]] = {
        "text": options.text,
        "number": options.number,
        "flag": options.flag,
        "words": options.words,
        "commas": options.parts,
    }
    value = read[option.kind](option.name)
    if value is not None:
        draft.set(option.key, value, "" if options.has(option.name) else f"{title}'s default")
