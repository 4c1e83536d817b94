"""Find the training command in a shell script and split it into words. Nothing is executed.

The parser supports comments, continued lines, `NAME=value`, `$NAME`, `${NAME}`, `${NAME:-default}`, and the
`if [ "$NAME" == "" ]` with which scripts set defaults of their arguments. Everything else is taken literally. `shlex`
would not do: it forgets which words were in single quotes, where a shell does not expand variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from sft_lightning.errors import UserError

_ASSIGNMENT = re.compile(r"^(?:export\s+|local\s+)?([A-Za-z_]\w*)=(.*)$")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_EMPTY_TEST = re.compile(r"""^if\s+\[+\s+(?:-z\s+"?\$\{?(\w+)\}?"?|"?\$\{?(\w+)\}?"?\s+==?\s+"")\s+\]""")
_PROGRAM = re.compile(r"(^|/)[\w.-]+\.py$")
_ENDS = re.compile(r"^(\d?>|&>|>>|<|\||;|&)")
_PIECE = re.compile(r"""[^\s"'\\]+|\\.|"[^"]*"|'[^']*'""")
_WORD = re.compile(rf"(?:{_PIECE.pattern})+")


def training_words(script: str, where: str) -> list[str]:
    """Return the words of the last command in a script that runs a Python file with options.

    Variables are expanded; one that the script does not set stays `$NAME`.

    Args:
        script: Text of the script.
        where: Path of the script, for messages.

    Raises:
        UserError: If there is no such command, or if a quote is not closed.
    """
    variables: dict[str, str] = {}
    words: list[str] = []
    skipping = False
    for line in _logical_lines(script):
        test = _EMPTY_TEST.match(line)
        if test:
            skipping = bool(variables.get(test[1] or test[2], ""))
        elif re.match(r"^(fi|else)\b", line):
            skipping = False
        assignment = _ASSIGNMENT.match(line.removeprefix("then ").strip())
        if assignment and not re.search(r"\.py\s", line):
            if not skipping:
                variables[assignment[1]] = _expanded(_unquoted(assignment[2]), variables)
        elif re.search(r"\.py(\s|$)", line):
            words = command_words(line, where, variables) or words
    if not words:
        raise UserError(f"{where}: no command runs a Python file with options; give the command itself")
    return words


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
