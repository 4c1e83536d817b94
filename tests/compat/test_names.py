from __future__ import annotations

import importlib.util
import inspect
import logging
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import sft_lightning.compat
from sft_lightning.compat.names import ENTRIES, Entry, uses
from sft_lightning.errors import UserError

COMPAT = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(sft_lightning.compat.__path__, "sft_lightning.compat.")
]
EVERY = [entry for entry in ENTRIES if importlib.util.find_spec(entry.library) is not None]  # deepspeed is an extra


def function_of(entry: Entry) -> Any:
    """The function of an entry; of a class, what makes an object of it."""
    return pkgutil.resolve_name(f"sft_lightning.compat.{entry.function}")


def delete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take `module:attribute` out of a library, from wherever a class inherits it."""
    module, _, attribute = name.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    bases = owner.__mro__ if isinstance(owner, type) else [owner, *type(owner).__mro__]
    holders = [base for base in bases if last in vars(base)]
    for holder in holders or [owner]:  # a configuration module of torch removes a name that is in no `vars`
        monkeypatch.delattr(holder, last)


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.function)
def test_the_installed_version_has_every_name(entry: Entry) -> None:
    assert [name for name in entry.missing() if ":" in name] == []


@pytest.mark.parametrize("entry", [entry for entry in EVERY if entry.is_checked], ids=lambda entry: entry.function)
def test_without_a_name_the_feature_is_refused_or_left_out_with_a_warning(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not entry.attributes:
        delete(entry.names[0], monkeypatch)
    call = function_of(entry)
    subject = (object(),) if entry.attributes else ()
    if not entry.optional:
        with pytest.raises(UserError, match="not available, because") as refused:
            call(*subject)
        assert str(refused.value).startswith(f"{entry.feature}: ")
        assert entry.library in str(refused.value)
        return
    entry.warned.clear()
    with caplog.at_level(logging.WARNING):
        assert call(*subject) is None
    assert entry.feature in caplog.text


@pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.function)
def test_an_entry_says_since_when_and_what_comes_after(entry: Entry) -> None:
    assert entry.since
    assert entry.replacement
    assert function_of(entry).__doc__


def test_every_public_function_has_an_entry() -> None:
    modules = [each for each in COMPAT if each.__name__ != "sft_lightning.compat.names"]
    public = {
        f"{each.__name__.removeprefix('sft_lightning.compat.')}.{name}"
        for each in modules
        for name, value in vars(each).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == each.__name__
    }
    assert not public - {entry.function for entry in ENTRIES}


def test_a_message_names_the_feature_the_name_and_the_versions_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    @uses("json:loads", "json:no_such_name", feature="merge", since="3.0", replacement="nothing")
    def read() -> None:
        """Read."""

    monkeypatch.setattr("sft_lightning.compat.names._version", lambda library: "9.1")
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda package: ["jsonargparse>=4", "json<10,>=9.2; extra == 'x'"]
    )
    with pytest.raises(UserError) as refused:
        read()
    assert str(refused.value) == (
        "merge: not available, because json 9.1 has no json.no_such_name; run pip install 'json<10,>=9.2'"
    )
    ENTRIES.remove(next(entry for entry in ENTRIES if entry.feature == "merge" and entry.library == "json"))


def test_an_optional_feature_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    @uses("json:no_such_name", feature="speed", since="3.0", replacement="nothing", optional=True)
    def hurry() -> bool | None:
        """Hurry."""
        return True

    assert hurry() is None
    assert hurry() is None
    assert caplog.text.count("speed: not available") == 1
    ENTRIES.pop()


def test_importing_compat_imports_no_library() -> None:
    code = (
        "import importlib, pkgutil, sys, sft_lightning.compat as c\n"
        "for m in pkgutil.iter_modules(c.__path__):\n"
        "    if not m.ispkg: importlib.import_module(f'sft_lightning.compat.{m.name}')\n"
        "print([n for n in ('torch','transformers','peft','bitsandbytes','deepspeed','lightning','jsonargparse',"
        "'datasets','tokenizers') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
