"""A user's own format: the dotted path of a function `Record -> list[Message]`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from sft_lightning.errors import UserError
from sft_lightning.types import Message, Record


def is_dotted_path(name: str) -> bool:
    """Whether a format's name could be the dotted path of a function."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def read_with(path: str, record: Record) -> list[Message]:
    """Return what the user's function makes of a record.

    The function may raise `Malformed` for a record that is to count as such; any other exception stops the run, under
    `data.malformed: drop` too: a slip in the code must not look like bad data.

    Raises:
        UserError: If there is no such function, it fails, or it returns something else.
    """
    function = user_function(path, record.source)
    try:
        turns = function(record)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{record.location}: {path} raised {type(error).__name__}: {error}") from error
    if not isinstance(turns, list) or not all(isinstance(turn, Message) for turn in turns):
        raise UserError(
            f"{record.location}: {path} must return a list of sft_lightning.types.Message, not {_kind(turns)}"
        )
    return turns


@functools.cache
def user_function(path: str, source: str) -> Callable[[Record], object]:
    """Return the function at a dotted path.

    Args:
        path: Module and function: `my_package.my_module.my_function`.
        source: The source that names it, for messages.

    Raises:
        UserError: If there is no such module or function, or it cannot be called.
    """
    key = f"data.sources.{source}.format"
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{key}: {path!r} is neither a format nor a function: there is no module {error.name!r}; correct the "
                "name, or put the folder that holds the module on PYTHONPATH"
            ) from error
        raise UserError(f"{key}: {module_name} needs {error.name!r}, which is not installed") from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"{key}: the module {module_name} has no function {name!r}")
    if not callable(function):
        raise UserError(f"{key}: {path} is of type {type(function).__name__}, not a function of a Record")
    return function  # type: ignore[no-any-return]  # what it returns is checked record by record


def _kind(value: object) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return f"a list with a {next(type(item).__name__ for item in value if not isinstance(item, Message))}"
