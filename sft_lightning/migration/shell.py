"""Find the training command in a shell script and split it into words. Nothing is executed.

The parser supports comments, continued lines, `NAME=value`, `$NAME`, `${NAME}`, `${NAME:-default}`, `$1` where the
script's arguments are given, `if [ "$NAME" == "value" ]` with `else`, and a command in a variable
(`cmd="deepspeed …"`). Everything else is taken literally. `shlex` would not do: it forgets which words were in single
quotes, where a shell does not expand variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from sft_lightning.errors import UserError

_ASSIGNMENT = re.compile(r"^(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)$")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_TEST = re.compile(
    r"""^if\s+\[+\s+(?:-(?P<unary>[zn])\s+)?"?(?P<left>\$\{?\w+\}?)"?"""
    r"""(?:\s+(?P<compare>==?|!=)\s+(?P<right>"[^"]*"|'[^']*'|[^\s\]]+))?\s+\]"""
)
_PROGRAM = re.compile(r"(^|/)[\w.-]+\.py$")
_ENDS = re.compile(r"^(\d?>|&>|>>|<|\||;|&)")
_PIECE = re.compile(r"""[^\s"'\\]+|\\.|"[^"]*"|'[^']*'""")
_WORD = re.compile(rf"(?:{_PIECE.pattern})+")


def training_words(script: str, where: str, arguments: Sequence[str] = ()) -> list[str]:
    """Return the words of the last command in a script that runs a Python file with options.

    Variables are expanded; one that the script does not set stays `$NAME`.

    Args:
        script: Text of the script.
        where: Path of the script, for messages.
        arguments: The script's own arguments, `$1` and following.

    Raises:
        UserError: If there is no such command, or if a quote is not closed.
    """
    variables = {str(number): value for number, value in enumerate(arguments, start=1)}
    words: list[str] = []
    branches = _Branches()
    for line in _logical_lines(script):
        assignment = _ASSIGNMENT.match(line.removeprefix("then ").removeprefix("else ").strip())
        if not branches.runs(line, variables):
            if assignment:
                variables.setdefault(assignment[1], "")  # the script sets it, but not with these arguments
        elif assignment and not re.search(r"\.py\s", line):
            variables[assignment[1]] = _expanded(_unquoted(assignment[2]), variables)
        elif re.search(r"\.py(\s|$)", line):
            command = _unquoted(assignment[2]) if assignment and assignment[2][:1] in "\"'" else line
            words = command_words(command, where, variables) or words
    if not words:
        raise UserError(f"{where}: no command runs a Python file with options; give the command itself")
    return words


class _Branches:
    """The `if`s that are open at a line of a script."""

    def __init__(self) -> None:
        self._open: list[tuple[bool, bool]] = []  # whether its lines here are run, and whether a branch was run before

    def runs(self, line: str, variables: Mapping[str, str]) -> bool:
        """Return whether a line is run; the line may open, change or close an `if`."""
        if line.startswith("if "):
            self._open.append((_holds(line, variables), False))
        elif self._open and (other := re.match(r"^(else|elif)\b", line)):
            taken = any(self._open.pop())
            self._open.append((not taken and (other[1] == "else" or _holds(line[2:], variables)), taken))
        elif self._open and re.match(r"^fi\b", line):
            self._open.pop()
        return all(running for running, _ in self._open)


def _holds(line: str, variables: Mapping[str, str]) -> bool:
    """Return the outcome of `if [ … ]`; a test that is not understood counts as true."""
    test = _TEST.match(line)
    if test is None:
        return True
    name = test["left"].strip("${}")
    value = variables.get(name, "")
    if test["compare"] is None:
        return (value == "") if test["unary"] == "z" else value != ""
    return (value == _expanded(_unquoted(test["right"]), variables)) == (test["compare"] != "!=")


def command_words(command: str, where: str, variables: Mapping[str, str] | None = None) -> list[str]:
    """Return the words of a command up to a redirection; none if it does not run a Python file with options.

    Args:
        command: The command, on one line.
        where: Source of the command, for messages.
        variables: Values of the variables that are set.

    Raises:
        UserError: If a quote is not closed.
    """
    if _WORD.sub("", command).strip():
        raise UserError(f"{where}: a quote is not closed in: {command[:80]}")
    words = list(_words(command, variables or {}))
    has_options = any(word.startswith("--") or word.endswith(".json") for word in words)
    return words if has_options and any(_PROGRAM.search(word) for word in words) else []


def _words(command: str, variables: Mapping[str, str]) -> Iterator[str]:
    for match in _WORD.finditer(command):
        word = match[0]
        if _ENDS.match(word) or word.startswith("#"):
            return
        value = "".join(_piece(piece, variables) for piece in _PIECE.findall(word))
        # As in a shell, an unquoted variable is split into words; a <placeholder> is not.
        if _VARIABLE.fullmatch(word) and not value.startswith("<"):
            yield from value.split()
        else:
            yield value


def _piece(piece: str, variables: Mapping[str, str]) -> str:
    if piece.startswith("'"):
        return piece[1:-1]
    if piece.startswith('"'):
        return _expanded(piece[1:-1], variables)
    return _expanded(re.sub(r"\\(.)", r"\1", piece), variables)


def split_launcher(words: list[str]) -> tuple[list[str], str, list[str]]:
    """Split a command into the words of the launcher, the Python file, and its arguments.

    Without a Python file, all words are arguments.
    """
    for i, word in enumerate(words):
        if _PROGRAM.search(word):
            return words[:i], word, words[i + 1 :]
    return [], "", words


def _logical_lines(script: str) -> list[str]:
    joined = re.sub(r"\\\r?\n", " ", script)
    lines = (line.strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _unquoted(value: str) -> str:
    value = value.strip().rstrip(";")
    quoted = re.match(r"""^(["'])(.*?)\1""", value)
    return quoted[2] if quoted else value.partition(" #")[0].strip()


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        if name in variables:
            return variables[name] or (default or "")
        if name.isdigit():
            return default or ""  # an argument of the script, which only its caller knows
        return match[0] if default is None else default

    return _VARIABLE.sub(value, text)
