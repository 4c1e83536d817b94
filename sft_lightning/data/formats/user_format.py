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
    """Return the messages that the user's function makes of a record.

    The function may raise `Malformed` for a record that does not fit. Any other exception stops the run, even with
    `data.malformed: drop`: a bug in the function must not count as bad data.

    Args:
        path: Module and function: `my_package.my_module.my_function`.
        record: The record.

    Raises:
        UserError: If the function does not exist, fails, or returns something else.
    """
    function = user_function(path, record.source)
    try:
        messages = function(record)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{record.location}: {path} raised {type(error).__name__}: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, Message) for message in messages):
        raise UserError(
            f"{record.location}: {path} must return a list of sft_lightning.types.Message (got {_type_of(messages)})"
        )
    return messages


@functools.cache
def user_function(path: str, source: str) -> Callable[[Record], object]:
    """Return the function at a dotted path.

    Args:
        path: Module and function: `my_package.my_module.my_function`.
        source: The name of the source that uses it, for messages.

    Raises:
        UserError: If the module or function does not exist, or cannot be called.
    """
    key = f"data.sources.{source}.format"
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{key}: {path!r} is neither a format nor a function: there is no module {error.name!r}; correct the "
                "name, or add the folder of the module to PYTHONPATH"
            ) from error
        raise UserError(f"{key}: {module_name} imports {error.name!r}, which is not installed") from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"{key}: the module {module_name} has no function {name!r}")
    if not callable(function):
        raise UserError(f"{key}: {path} must be a function of a Record (got {type(function).__name__})")
    return function  # type: ignore[no-any-return]  # its return value is checked for every record


def _type_of(value: object) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return f"a list with a {next(type(item).__name__ for item in value if not isinstance(item, Message))}"
