"""What the command line and its config files set, read before they are parsed.

The parser depends on it: `task` decides which keys exist, and the default optimizer is left out when another is named.
Config files that cannot be read are reported here, by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from sft_lightning.errors import UserError


class GivenArguments:
    """The options and the contents of the config files, in order.

    Args:
        args: What follows the command on the command line.

    Raises:
        UserError: If a config file does not exist, or is not YAML.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self._args = list(args)
        self._given = list(_options_and_files(args))

    def value_of(self, key: str) -> Any:
        """Return the last value that options and config files set a dotted key to, or `None`."""
        value: Any = None
        for option, content in self._given:
            if option == f"--{key}":
                value = content
            elif option in ("--config", "-c"):
                in_file = _value_in(content, key)
                value = value if in_file is None else in_file
        return value

    def shows_help(self) -> bool:
        """Whether the docstrings of keys will be printed."""
        return asks_for_help(self._args) or any(arg.startswith("--print_config=comments") for arg in self._args)

    def names_another_optimizer(self) -> bool:
        """Whether an optimizer other than the default is named, which must not inherit the default's arguments."""
        named = [self.value_of(f"model.optimizer{suffix}") for suffix in ("", ".class_path")]
        classes = [value.get("class_path", value) if isinstance(value, dict) else value for value in named]
        return any(isinstance(each, str) and not each.endswith("torch.optim.AdamW") for each in classes)

    def names_classes(self) -> bool:
        """Whether callbacks are given, or a strategy by its class rather than by a short name such as `fsdp2`."""
        options = ("--trainer.callbacks", "--trainer.strategy.")
        return (
            any(arg.startswith(options) for arg in self._args)
            or self.value_of("trainer.callbacks") is not None
            or isinstance(self.value_of("trainer.strategy"), dict)
        )


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether `-h` or `--help` is among the arguments."""
    return any(arg == "-h" or arg.startswith("--help") for arg in args)


def first_given(*values: str | None) -> str | None:
    """Return the first value that is not `None`.

    It stands here because jsonargparse, which computes one key from others with it, imports everything that its module
    imports, under `TYPE_CHECKING` too.
    """
    return next((value for value in values if value is not None), None)


def _options_and_files(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        option, has_value, value = arg.partition("=")
        value = value if has_value else following
        if option in ("--config", "-c") and value and _is_file_name(value):
            yield option, _read_config(value)
        elif option not in ("--config", "-c"):
            yield option, value


def _is_file_name(value: str) -> bool:
    """Whether a value of `--config` is a local file, not a URL or YAML itself, which jsonargparse takes too."""
    return "://" not in value and "\n" not in value and not value.lstrip().startswith("{")


def _read_config(name: str) -> Any:
    path = Path(name)
    if not path.exists():
        raise UserError(f"--config: {name!r} does not exist (looked in {Path.cwd()})")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"--config: {name!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config: {name!r} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"--config: {name!r}{line}: {getattr(error, 'problem', None) or 'not valid YAML'}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"--config: {name!r} must map keys to values (got a {type(content).__name__})")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; YAML's own loader takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping as written, before merge keys are expanded.

        Args:
            anchor: As PyYAML's.

        Raises:
            yaml.MarkedYAMLError: If a key is written twice.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is set twice; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _value_in(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content
