from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_lightning.data.formats.user_modules import source_hashes
from sft_lightning.errors import UserError

Write = Callable[..., str]

_NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the modules of a package with a name of its own, `{p}` in their texts, and return that name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def make(**modules: str) -> str:
        package = f"user_modules_{next(_NUMBERS)}"
        for name, text in {"__init__": "", **modules}.items():
            file = tmp_path.joinpath(package, *name.split("__in__")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("{p}", package))
        written.append(package)
        return package

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] in written]:
        del sys.modules[name]


def names(package: str) -> list[str]:
    found = source_hashes(f"{package}.formats.own", "toy")
    return [name.removeprefix(package).removeprefix(".") for name in found]


def test_a_format_alone_is_its_module(write: Write) -> None:
    assert names(write(formats="import json\nimport numpy\ndef own(record): ...")) == ["formats"]


def test_modules_imported_by_imported_modules_count(write: Write) -> None:
    package = write(
        formats="from {p}.first import clean\ndef own(record): ...",
        first="import {p}.second as other\nclean = other.clean",
        second="clean = str.strip",
        unused="x = 1",
    )
    assert names(package) == ["", "first", "formats", "second"]


@pytest.mark.parametrize(
    "statement",
    [
        "from . import helper", "from .helper import x", "from .helper import *",
        "import {p}.helper", "from {p} import helper",
    ],
)  # fmt: skip
def test_every_way_to_import_a_module_is_seen(statement: str, write: Write) -> None:
    package = write(formats=f"{statement}\ndef own(record): ...", helper="x = 1")
    assert names(package) == ["", "formats", "helper"]


def test_relative_imports_of_a_folder_above_are_resolved(write: Write) -> None:
    package = write(
        formats="from .deep.inner import y\ndef own(record): ...",
        deep__in____init__="",
        deep__in__inner="from ..helper import x\ny = x",
        helper="x = 1",
    )
    assert names(package) == ["", "deep", "deep.inner", "formats", "helper"]


def test_an_import_inside_a_function_counts_although_it_was_not_run(write: Write) -> None:
    package = write(formats="def own(record):\n    from {p} import late", late="x = 1")
    assert names(package) == ["", "formats", "late"]
    assert f"{package}.late" not in sys.modules


def test_modules_that_import_each_other_are_read_once(write: Write) -> None:
    package = write(formats="from {p} import a\ndef own(record): ...", a="import {p}.b", b="import {p}.a")
    assert names(package) == ["", "a", "b", "formats"]


def test_an_optional_import_of_what_is_not_installed_is_passed_over(write: Write) -> None:
    text = "try:\n    import not_installed_anywhere.part\nexcept ImportError:\n    pass\ndef own(record): ..."
    assert names(write(formats=text)) == ["formats"]


def test_this_package_and_installed_ones_do_not_count(write: Write) -> None:
    text = "from sft_lightning.types import Message\nfrom transformers import AutoTokenizer\ndef own(record): ..."
    assert names(write(formats=text)) == ["formats"]


def test_the_hash_of_an_imported_module_changes_with_its_text(write: Write) -> None:
    one, other = (
        source_hashes(f"{write(formats='from . import helper', helper=f'x = {n}')}.formats.own", "toy") for n in (1, 2)
    )
    assert [mine == theirs for mine, theirs in zip(one.values(), other.values(), strict=True)] == [True, True, False]


def test_a_function_without_a_source_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.sources\.toy\.format: the source code of builtins cannot be found"):
        source_hashes("builtins.dict", "toy")
