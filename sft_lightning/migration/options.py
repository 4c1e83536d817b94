"""A system's options, one entry each; the translation and docs/migrating.md are made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.migration.arguments import GivenOptions, is_true
from sft_lightning.migration.draft import Draft

Kind = Literal["text", "number", "flag", "words", "commas"]
"""How an option's values are read: one value, a number, on or off, a list of words, or a list with commas."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of another system."""

    name: str
    """Name without dashes."""

    key: str = ""
    """Our dotted key for it; several are separated by commas."""

    note: str = ""
    """What the documentation says about it; of an omitted option, why it is omitted or what to do instead."""

    default: str | None = None
    """Default of the other system; given where ours differs."""

    kind: Kind = "text"
    """How its values are read."""

    how: Literal["copied", "combined", "omitted"] = "copied"
    """`copied`: the value is written to `key`. `combined`: the system's `finish` translates it together with other
    options. `omitted`: it is not migrated."""


def copied(name: str, key: str, kind: Kind = "text", *, default: str | None = None, note: str = "") -> Option:
    """Return an option whose value is copied to one of our keys.

    Args:
        name: Name without dashes.
        key: Our dotted key.
        kind: How its values are read.
        default: Default of the other system, if ours differs.
        note: What the documentation says about it.
    """
    return Option(name=name, key=key, kind=kind, default=default, note=note)


def combined(name: str, key: str, note: str = "", *, default: str | None = None) -> Option:
    """Return an option that the system's `finish` translates together with others.

    Args:
        name: Name without dashes.
        key: Our dotted keys for it, for the documentation.
        note: What the documentation says about it.
        default: Default of the other system.
    """
    return Option(name=name, key=key, note=note, default=default, how="combined")


def omitted(name: str, reason: str, *, key: str = "") -> Option:
    """Return an option that is not migrated.

    Args:
        name: Name without dashes.
        reason: Why not, or what to do instead.
        key: Our dotted key for the same thing, if there is one.
    """
    return Option(name=name, key=key, note=reason, how="omitted")


class Options:
    """The values of a system's options: the user's, or else the system's defaults.

    Args:
        given: The options as the user wrote them.
        known: The options of the system.
        draft: The YAML; values that cannot be read are noted in it.
    """

    def __init__(self, given: GivenOptions, known: Sequence[Option], draft: Draft) -> None:
        self.given = given.options
        self.launcher = given.launcher
        self.program = given.program
        self.draft = draft
        self._defaults = {option.name: option.default for option in known}

    def has(self, name: str) -> bool:
        """Whether the user set an option."""
        return name in self.given

    def words(self, name: str) -> list[str]:
        """Return the values of an option: the user's, the default's, or none."""
        default = self._defaults.get(name)
        return self.given.get(name, [] if default is None else default.split())

    def parts(self, name: str) -> list[str]:
        """Return the values of an option that separates them by commas."""
        return [part for word in self.words(name) for part in word.split(",") if part]

    def text(self, name: str) -> str | None:
        """Return the first value of an option; `None` if it has none."""
        return next(iter(self.words(name)), None)

    def flag(self, name: str) -> bool:
        """Whether a flag is on."""
        default = self._defaults.get(name)
        return is_true(self.given[name]) if name in self.given else default is not None and is_true([default])

    def number(self, name: str) -> int | float | None:
        """Return the value of an option as a number; `None` if it has none, or if it is a variable that is not set."""
        text = self.text(name)
        if text is None:
            return None
        if text.startswith("$"):
            self.draft.omit(f"--{name} {text}", "the script does not set this variable; set the value yourself")
            return None
        return as_number(name, text)

    def as_written(self, name: str) -> str:
        """Return an option with its values as the user wrote it."""
        return " ".join([f"--{name}", *self.given.get(name, [])])


def as_number(name: str, text: str) -> int | float:
    """Return a text as an integer if it is written like one, else as a float.

    Args:
        name: Name of the option, for the message.
        text: The text.

    Raises:
        UserError: If it is not a number.
    """
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"migrate: --{name}: {text!r} is not a number; correct it") from error
    return int(value) if value.is_integer() and "e" not in text.lower() and "." not in text else value


@dataclass(frozen=True, kw_only=True)
class System:
    """A fine-tuning system whose options can be translated."""

    name: str
    """Name on the command line."""

    title: str
    """Name in texts."""

    source: str
    """The files that define its options."""

    options: Sequence[Option]
    """Its options, in the order of the documentation."""

    finish: Callable[[Options, Draft], None]
    """Translates the combined options, and sets what the system does without an option."""


def translate(system: System, given: GivenOptions) -> Draft:
    """Translate the options of a system.

    Args:
        system: The system.
        given: Its options as the user wrote them.

    Raises:
        UserError: If a value is not what its option takes.
    """
    draft = Draft()
    options = Options(given, system.options, draft)
    known = {option.name: option for option in system.options}
    for option in system.options:
        if option.how == "copied" and (option.name in given.options or option.default is not None):
            _copy(option, options, draft, system.title)
    system.finish(options, draft)
    for name in given.options:
        if name not in known:
            draft.omit(options.as_written(name), f"not a known option of {system.title}")
        elif known[name].how == "omitted":
            draft.omit(options.as_written(name), known[name].note)
    return draft


def _copy(option: Option, options: Options, draft: Draft, title: str) -> None:
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
