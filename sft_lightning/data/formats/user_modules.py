"""The source files behind a user's own format: its module, and the modules that this one imports, directly or not.

They decide the tokens, so they are part of a token store's key. Imports are read from the source text, those inside
functions included. Left out are the standard library, what is installed in site-packages, and this package, whose
changes `TOKENIZATION_VERSION` tells. Files that the code opens, and imports by computed names, are not seen.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import xxhash

from sft_lightning.errors import UserError

_OWN_PACKAGE = __name__.partition(".")[0]


@functools.cache  # hashed once, when the code is loaded: a file that is edited later is not the code that runs
def source_hashes(format_path: str, source: str) -> dict[str, str]:
    """Return the hash of each source file behind a user's format, by module name.

    Args:
        format_path: Module and function: `my_package.my_module.my_function`.
        source: The source that names it, for messages.

    Raises:
        UserError: If the module has no source file.
    """
    module = format_path.rpartition(".")[0]
    file = _file_of(importlib.import_module(module).__spec__)
    if file is None:
        raise UserError(
            f"data.sources.{source}.format: the source code of {module} cannot be found, so changes to it could not "
            "be detected; put the function into a .py file"
        )
    files = {module: file}
    waiting = [module]
    while waiting:
        for name, found in _imported_files(waiting.pop(), files):
            if name not in files:
                files[name] = found
                waiting.append(name)
    return {name: xxhash.xxh3_128_hexdigest(files[name].read_bytes()) for name in sorted(files)}


def _imported_files(module: str, files: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each of the user's modules that a module imports."""
    file = files[module]
    if file.suffix != ".py":
        return
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for name in _imported_names(ast.parse(file.read_bytes()), package):
        parts = name.split(".")
        if not _is_users(parts[0]):
            continue
        for length in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b, too
            parent = ".".join(parts[:length])
            found = _file_of(_spec_of(parent))
            if found is not None:
                yield parent, found


def _imported_names(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the full names that import statements mention; of `from a import b`, both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


@functools.cache
def _is_users(top_level: str) -> bool:
    """Whether a top-level module belongs to the user: not Python's, not installed, not this package."""
    if top_level in sys.stdlib_module_names or top_level == _OWN_PACKAGE:
        return False
    spec = _spec_of(top_level)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or [])
    return not any(Path(place).resolve().is_relative_to(folder) for place in places for folder in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [*(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()]
    return tuple(Path(folder).resolve() for folder in [*folders, site.getusersitepackages()])


def _spec_of(module: str) -> ModuleSpec | None:
    """Return where a module comes from; `None` if no module has this name: a function, or a package that is absent."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return loaded.__spec__
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _file_of(spec: ModuleSpec | None) -> Path | None:
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    path = Path(spec.origin)
    return path if path.is_file() else None
