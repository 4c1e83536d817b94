from __future__ import annotations

import json
import logging
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sft_lightning.data.tokens import examples
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.store import DamagedStoreError, open_store
from sft_lightning.data.tokens.store_cache import Prepared, default_store_dir
from sft_lightning.errors import UserError

Prepare = Callable[..., Prepared]


def test_a_second_preparation_finds_the_store_and_tokenizes_nothing(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare()
    calls: list[int] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: calls.append(len(texts)) or encode(self, texts))
    second = prepare()
    assert (first.built, second.built, calls) == (True, False, [])
    assert second.folder == first.folder
    assert second.facts == first.facts
    assert second.store.input_ids.tolist() == first.store.input_ids.tolist()
    assert prepare(rebuild=True).built
    assert calls.count(24) == 1  # besides the start-up checks, one conversation at a time


def test_a_store_has_its_number_of_records_and_the_parts_of_its_key(prepare: Prepare, root: Path) -> None:
    prepared = prepare()
    assert prepared.num_records == len(prepared.store) == 24
    assert prepared.folder.parent == root
    assert prepared.facts["format"] == "alpaca"
    assert prepared.facts["parts"]["loss_on"] == "assistant"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: _flip(folder / "input_ids.bin"), "input_ids.bin was altered"),
        (lambda folder: _flip(folder / "manifest.json"), "manifest.json"),
        (lambda folder: _cut(folder / "loss_weights.bin"), "loss_weights.bin has"),
        (lambda folder: (folder / "lengths.bin").unlink(), "lengths.bin has 0 bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
    ids=["flipped byte", "flipped byte of the manifest", "truncated", "missing", "no manifest"],
)
def test_a_damaged_store_is_reported_and_built_anew(
    damage: Callable[[Path], Any], said: str, prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare()
    tokens = first.store.input_ids.tolist()
    damage(first.folder)
    with caplog.at_level(logging.WARNING, logger="sft_lightning"):
        second = prepare()
    assert second.built
    assert second.store.input_ids.tolist() == tokens
    assert "data.sources.toy: the token store is rebuilt because the store is damaged: " in caplog.text
    assert said in caplog.text
    assert said in second.origin
    caplog.clear()
    assert not prepare().built
    assert not caplog.text


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_build_that_fails_leaves_nothing_and_fails_again(
    prepare: Prepare, root: Path, write_json: Callable[..., Path]
) -> None:
    path = write_json("bad.json", [{"instruction": "a", "output": "b"}, {"instruction": "c"}])
    for _ in range(2):
        with pytest.raises(UserError, match="record 1"):
            prepare(path=str(path))
        assert folders(root) == []
    assert prepare(path=str(path), malformed="drop").num_records == 2


def test_a_rebuild_that_fails_keeps_the_earlier_store(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare()
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(rebuild=True)
    assert not prepare().built
    assert folders(first.folder.parent) == [first.folder.name]


def test_a_requested_rebuild_is_reported_without_a_warning(prepare: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    prepare()
    assert prepare(rebuild=True).origin == "rebuilt because --rebuild was given"
    assert not caplog.text


def test_a_store_of_an_older_version_is_built_anew_with_that_reason(prepare: Prepare, root: Path) -> None:
    first = prepare()
    manifest = json.loads((first.folder / "manifest.json").read_text())
    old = root / "0123"
    old.mkdir()
    older = {**{key: value for key, value in manifest.items() if key not in ("source", "parts", "paths")}, "inputs": {}}
    older["places"] = manifest["paths"]
    (old / "manifest.json").write_text(json.dumps(older))
    shutil.rmtree(first.folder)
    assert prepare().reason == "the earlier store was built by an older version of sft_lightning"


def test_broken_manifests_of_other_stores_are_ignored(prepare: Prepare, root: Path) -> None:
    for name, text in {"a": "{", "b": "[]", "c.partial": "{}"}.items():
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text(text)
    assert prepare().origin == "built now"


def test_the_default_folder_of_stores_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store_dir() == tmp_path / "sft_lightning" / "stores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_store_dir() == tmp_path / "home" / ".cache" / "sft_lightning" / "stores"


# --- several processes ---------------------------------------------------------------------------------------------

SLOW_FORMAT = """
import os, signal, time
from pathlib import Path
from sft_lightning.types import Message

seen = 0

def own(record):
    global seen
    seen += 1
    if seen == 9 and "KILL_AFTER_EIGHT" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if seen == 1 and "READY" in os.environ:
        while len(list(Path(os.environ["READY"]).iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(0.2)  # the other one is at the lock by now
    return [Message("user", record.fields["instruction"]), Message("assistant", record.fields["output"])]
"""

Forked = multiprocessing.process.BaseProcess
Start = Callable[..., "tuple[Forked, Connection]"]


@pytest.fixture
def start(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a process that prepares the Alpaca file in small batches, with a format of its own."""
    (tmp_path / "slow_format.py").write_text(SLOW_FORMAT)
    monkeypatch.syspath_prepend(str(tmp_path))
    forks = multiprocessing.get_context("fork")  # a fork has imported torch already, which takes seconds

    def work(answer: Connection, environment: dict[str, str]) -> None:
        os.environ |= environment
        examples._EXAMPLES_AT_ONCE = 2
        if "READY" in environment:
            (Path(environment["READY"]) / str(os.getpid())).touch()
        prepared = prepare(format="slow_format.own")
        answer.send((prepared.built, prepared.folder, prepared.store.input_ids.tolist()))

    def run(**environment: str) -> tuple[Forked, Connection]:
        mine, theirs = forks.Pipe(duplex=False)
        process = forks.Process(target=work, args=(theirs, environment))
        process.start()
        theirs.close()
        return process, mine

    return run


def test_two_processes_that_need_the_same_store_build_it_once(start: Start, root: Path, tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    started = [start(READY=str(tmp_path / "ready")) for _ in range(2)]
    (one_built, one_folder, one_ids), (two_built, two_folder, two_ids) = (answer.recv() for _, answer in started)
    for process, _ in started:
        process.join()
    assert sorted([one_built, two_built]) == [False, True]
    assert (one_folder, one_ids) == (two_folder, two_ids)
    assert folders(root) == [one_folder.name]


def test_a_build_that_was_killed_is_no_store_and_the_next_run_builds_it(
    start: Start, root: Path, prepare: Prepare
) -> None:
    killed, _ = start(KILL_AFTER_EIGHT="1")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    [left] = root.glob("*.partial")
    assert (left / "input_ids.bin").is_file()
    with pytest.raises(FileNotFoundError):
        open_store(left.with_suffix(""))
    with pytest.raises(DamagedStoreError):
        open_store(left)
    prepared = prepare(format="slow_format.own")
    assert (prepared.origin, prepared.num_records, len(prepared.store)) == ("built now", 24, 24)
    assert folders(root) == [left.stem] == [prepared.folder.name]
