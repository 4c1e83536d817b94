"""Renders chat templates, which strangers wrote, with limits of loop steps, text and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from jinja2 import TemplateError, nodes

from sft_lightning.compat.transformers import compile_chat_template

MAX_STEPS = 1_000_000
"""Most loop steps of one rendering."""

MAX_CHARACTERS = 100_000_000
"""Longest text that a rendering, or a repetition such as `"-" * 80`, may make."""

_MAX_BITS = 10_000
"""Largest number that `**` may make, in bits."""


class LimitError(TemplateError):
    """A template takes too many steps or writes too much text."""


class BoundedTemplate:
    """A compiled chat template in the environment that serving uses (transformers' sandbox), with limits.

    The sandbox keeps a template from reading or changing anything else, but not from running forever.

    Args:
        source: The Jinja template.

    Raises:
        jinja2.TemplateSyntaxError: If the template is wrong.
    """

    def __init__(self, source: str) -> None:
        # Of an empty template: compiling this one without limits would compute its constants.
        environment: Any = compile_chat_template("").environment.overlay()
        environment.filters = {**environment.filters, "counted": self._counted}
        environment.intercepted_binops = frozenset({"*", "**"})
        environment.call_binop = _bounded_arithmetic
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(environment)
        self._template = environment.from_string(tree)
        self._steps = 0

    def render(self, **values: Any) -> str:
        """Return the text for the values.

        Raises:
            LimitError: If a limit is exceeded; any other error is the template's.
        """
        self._steps = 0
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(**values):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
        return "".join(pieces)

    def _counted(self, items: Iterable[Any]) -> Iterable[Any]:
        """Count the steps of a loop: at once if its length is known, so that each step costs nothing."""
        if not isinstance(items, Sized):
            return self._count_each(items)
        self._add(len(items))
        return items

    def _count_each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._add(1)
            yield item

    def _add(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise LimitError(f"its loops take more than {MAX_STEPS:,} steps")


def _bounded_arithmetic(context: Any, operator: str, left: Any, right: Any) -> Any:
    """Compute `*` or `**`, whose results can be far longer than what the template was given."""
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise LimitError(f"{left} ** {right} is too large")
        return left**right
    for repeated, times in ((left, right), (right, left)):
        if hasattr(repeated, "__len__") and isinstance(times, int):
            _check_length(len(repeated) * times)
    return left * right


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise LimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
