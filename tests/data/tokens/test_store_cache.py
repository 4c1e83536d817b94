from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens import store_cache
from sft_lightning.data.tokens.examples import ExampleBuilder
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.store import DamagedStoreError, open_store
from sft_lightning.data.tokens.store_cache import Prepared, default_store_dir, prepare_source
from sft_lightning.errors import UserError
from sft_lightning.tokenizer import load_tokenizer

Prepare = Callable[..., Prepared]

BUILDER_OPTIONS = ("loss_on", "malformed")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "stores"


@pytest.fixture
def prepare(alpaca_file: Path, root: Path, tokenizer: PreTrainedTokenizerFast) -> Prepare:
    """Prepare the Alpaca file, with other options of the source, the template or the builder."""

    def run(*, template: str = "alpaca", tokenizer: Any = tokenizer, rebuild: bool = False, **changes: Any) -> Prepared:
        tokenizer = copy.deepcopy(tokenizer)
        options = {"loss_on": "assistant", **{k: v for k, v in changes.items() if k in BUILDER_OPTIONS}}
        source = {"path": str(alpaca_file), **{k: v for k, v in changes.items() if k not in BUILDER_OPTIONS}}
        builder = ExampleBuilder(tokenizer=tokenizer, template=bind_template(template, tokenizer), **options)
        return prepare_source("toy", SourceConfig(**source), builder, root, rebuild=rebuild)

    return run


def test_a_second_preparation_builds_nothing_and_finds_the_same(
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


def test_a_store_knows_its_records_and_what_it_was_made_of(prepare: Prepare, root: Path) -> None:
    prepared = prepare()
    assert prepared.num_records == len(prepared.store) == 24
    assert prepared.folder.parent == root
    assert prepared.facts["format"] == "alpaca"
    assert prepared.facts["inputs"]["loss_on"] == "assistant"


@pytest.mark.parametrize("change", [{"weight": 3.0}, {"max_epochs": 2.0}, {"sft_only": True}, {"streaming": True}])
def test_what_does_not_decide_the_tokens_is_not_in_the_key(change: dict[str, Any], prepare: Prepare) -> None:
    prepare()
    assert not prepare(**change).built


@pytest.mark.parametrize(
    "change",
    [
        {"template": "vicuna_v1.1"},
        {"loss_on": "all"},
        {"malformed": "drop"},
        {"max_examples": 3},
        {"columns": {"instruction": "output", "output": "instruction"}},
        {"format": "alpaca"},
    ],
)
def test_what_decides_the_tokens_is_in_the_key(change: dict[str, Any], prepare: Prepare) -> None:
    first = prepare()
    second = prepare(**change)
    assert second.built
    assert second.folder != first.folder
    assert not prepare().built  # and the first is still there


def test_other_bytes_are_another_source_even_with_the_size_and_time_of_the_old(
    prepare: Prepare, alpaca_file: Path
) -> None:
    prepare()
    before, content = alpaca_file.stat(), alpaca_file.read_bytes()
    alpaca_file.write_bytes(content.replace(b"What is 0", b"What is 9", 1))
    os.utime(alpaca_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = alpaca_file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert prepare().built


def test_a_file_that_was_touched_or_moved_is_the_same_source(
    prepare: Prepare, alpaca_file: Path, tmp_path: Path
) -> None:
    prepare()
    os.utime(alpaca_file, (1, 1))
    assert not prepare().built
    moved = alpaca_file.rename(tmp_path / "moved.json")
    assert not prepare(path=str(moved)).built


def test_a_file_more_or_other_names_that_change_the_order_are_another_source(
    prepare: Prepare, tmp_path: Path, write_json: Callable[..., Path]
) -> None:
    for name in ("d/a.json", "d/b.json"):
        write_json(name, [{"instruction": name, "output": "x"}])
    folder = tmp_path / "d"
    assert prepare(path=str(folder)).num_records == 2
    (folder / "a.json").rename(folder / "c.json")
    assert prepare(path=str(folder)).built
    write_json("d/d.json", [{"instruction": "more", "output": "x"}])
    assert prepare(path=str(folder)).num_records == 3


def test_a_saved_dataset_is_known_by_its_bytes_and_its_split(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    both = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    for name in ("first", "copy"):
        datasets.DatasetDict(both).save_to_disk(str(tmp_path / name))
    first = prepare(path=str(tmp_path / "first"))
    assert (first.built, first.num_records) == (True, 2)
    assert not prepare(path=str(tmp_path / "first")).built
    assert prepare(path=str(tmp_path / "first"), split="test").num_records == 1
    [arrow] = (tmp_path / "first" / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b"abcd", b"abce").replace(b"ac", b"ax", 1))
    assert prepare(path=str(tmp_path / "first")).built


def test_a_hub_dataset_is_known_by_the_fingerprint_of_its_files(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert prepare(path="a/b").built
    assert not prepare(path="a/b").built
    loaded._fingerprint = "another commit"
    assert prepare(path="a/b").built


def test_another_tokenizer_is_another_key(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    prepare()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["What is"])
    assert prepare(tokenizer=other).built


def test_another_special_token_is_another_key(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    first = prepare()
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    second = prepare(tokenizer=other)
    assert (first.built, second.built) == (True, True)


def test_a_tokenizer_that_was_used_with_truncation_or_padding_is_the_same(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = prepare()
    used = copy.deepcopy(tokenizer)
    used.backend_tokenizer.enable_truncation(5)
    used.backend_tokenizer.enable_padding(length=9)
    assert prepare(tokenizer=used).store.input_ids.tolist() == first.store.input_ids.tolist()
    assert not prepare(tokenizer=used).built


JINJA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_another_text_of_a_jinja_file_is_another_key(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(JINJA)
    assert prepare(template=str(path)).built
    assert not prepare(template=str(path)).built
    path.write_text(JINJA.replace("]", ">"))
    assert prepare(template=str(path)).built


def test_another_version_of_the_tokenization_is_another_key(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    monkeypatch.setattr(store_cache, "_versions", lambda: "other")
    assert prepare().built


OWN_FORMAT = """
from sft_lightning.types import Message

def own(record):
    return [Message("user", record.fields["instruction"]), Message("assistant", "{answer}")]
"""


def test_the_source_of_a_users_own_format_is_in_the_key(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "own_format_of_preparation.py"
    module.write_text(OWN_FORMAT.format(answer="one"))
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"format": "own_format_of_preparation.own"}
    assert prepare(**own).built
    assert not prepare(**own).built
    module.write_text(OWN_FORMAT.format(answer="another"))
    importlib.reload(sys.modules["own_format_of_preparation"])
    store_cache.user_function.cache_clear()
    changed = prepare(**own)
    assert changed.built
    assert changed.num_records == 24


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: _flip(folder / "input_ids.bin"), "input_ids.bin was altered"),
        (lambda folder: _flip(folder / "manifest.json"), "manifest.json"),
        (lambda folder: _cut(folder / "loss_weights.bin"), "loss_weights.bin has"),
        (lambda folder: (folder / "lengths.bin").unlink(), "lengths.bin has 0 bytes"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
    ids=["flipped byte", "flipped byte of the manifest", "torn", "missing", "no manifest"],
)
def test_a_damaged_store_is_reported_and_built_again(
    damage: Callable[[Path], Any], said: str, prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare()
    tokens = first.store.input_ids.tolist()
    damage(first.folder)
    with caplog.at_level(logging.WARNING, logger="sft_lightning"):
        second = prepare()
    assert second.built
    assert second.store.input_ids.tolist() == tokens
    assert "data.sources.toy: the token store" in caplog.text
    assert said in caplog.text
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


def test_a_build_that_fails_leaves_nothing_and_keeps_failing(
    prepare: Prepare, root: Path, write_json: Callable[..., Path]
) -> None:
    path = write_json("bad.json", [{"instruction": "a", "output": "b"}, {"instruction": "c"}])
    for _ in range(2):
        with pytest.raises(UserError, match="record 1"):
            prepare(path=str(path))
        assert folders(root) == []
    assert prepare(path=str(path), malformed="drop").num_records == 2


def test_a_rebuild_that_fails_keeps_the_store_that_was_there(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare()
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(rebuild=True)
    assert not prepare().built
    assert folders(first.folder.parent) == [first.folder.name]


def test_stores_lie_in_the_cache_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store_dir() == tmp_path / "sft_lightning" / "stores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_store_dir() == tmp_path / "home" / ".cache" / "sft_lightning" / "stores"


# --- several processes ---------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import json, os, sys
from pathlib import Path
from sft_lightning.data.tokens import examples
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.data.tokens.store_cache import prepare_source
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.tokenizer import load_tokenizer

examples._EXAMPLES_AT_ONCE = 2
tokenizer_dir, source, root = sys.argv[1:4]
tokenizer = load_tokenizer(tokenizer_dir)
builder = examples.ExampleBuilder(
    tokenizer=tokenizer, template=bind_template("alpaca", tokenizer), loss_on="assistant"
)
config = SourceConfig(path=source, format="format_of_two_processes.own")
if "READY" in os.environ:
    (Path(os.environ["READY"]) / str(os.getpid())).touch()
prepared = prepare_source("toy", config, builder, Path(root))
print(json.dumps([prepared.built, str(prepared.folder), prepared.store.input_ids.tolist()]))
"""

TWO_PROCESSES_FORMAT = """
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


@pytest.fixture
def start(model_dir: Path, alpaca_file: Path, root: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a process that prepares the Alpaca file."""
    (tmp_path / "format_of_two_processes.py").write_text(TWO_PROCESSES_FORMAT)
    python_path = os.pathsep.join([str(tmp_path), str(Path(store_cache.__file__).parents[3])])

    def run(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, str(model_dir), str(alpaca_file), str(root)],
            env={**os.environ, "PYTHONPATH": python_path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def result(process: subprocess.Popen[str]) -> tuple[bool, str, list[int]]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    built, folder, ids = json.loads(out)
    return built, folder, ids


def test_two_processes_that_need_one_store_at_once_build_it_once(
    start: Callable[..., subprocess.Popen[str]], root: Path, tmp_path: Path
) -> None:
    (tmp_path / "ready").mkdir()
    processes = [start(READY=str(tmp_path / "ready")) for _ in range(2)]
    (one_built, one_folder, one_ids), (two_built, two_folder, two_ids) = (result(process) for process in processes)
    assert sorted([one_built, two_built]) == [False, True]
    assert (one_folder, one_ids) == (two_folder, two_ids)
    assert folders(root) == [Path(one_folder).name]


def test_a_build_that_was_killed_is_not_taken_for_whole_and_the_next_run_builds(
    start: Callable[..., subprocess.Popen[str]],
    root: Path,
    prepare: Prepare,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = start(KILL_AFTER_EIGHT="1")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    [left] = root.glob("*.partial")
    assert (left / "input_ids.bin").is_file()
    with pytest.raises(FileNotFoundError):
        open_store(left.with_suffix(""))
    with pytest.raises(DamagedStoreError):
        open_store(left)
    monkeypatch.syspath_prepend(str(tmp_path))
    prepared = prepare(tokenizer=load_tokenizer(str(model_dir)), format="format_of_two_processes.own")
    assert (prepared.built, prepared.num_records, len(prepared.store)) == (True, 24, 24)
    assert folders(root) == [left.stem] == [prepared.folder.name]
