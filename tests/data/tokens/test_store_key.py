from __future__ import annotations

import copy
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.formats import user_format, user_modules
from sft_lightning.data.tokens import store_key
from sft_lightning.data.tokens.store_cache import Prepared

Prepare = Callable[..., Prepared]


@pytest.mark.parametrize("change", [{"weight": 3.0}, {"max_epochs": 2.0}, {"sft_only": True}, {"streaming": True}])
def test_options_that_do_not_decide_the_tokens_are_not_in_the_key(change: dict[str, Any], prepare: Prepare) -> None:
    prepare()
    assert not prepare(**change).built


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"template": "vicuna_v1.1"}, "template changed: alpaca → vicuna_v1.1"),
        ({"loss_on": "all"}, "loss_on changed: assistant → all"),
        ({"malformed": "drop"}, "malformed changed: error → drop"),
        ({"max_examples": 3}, "max_examples changed: not set → 3"),
        (
            {"columns": {"instruction": "output", "output": "instruction"}},
            'columns changed: not set → {"instruction": "output", "output": "instruction"}',
        ),
        ({"format": "alpaca"}, "format changed: not set → alpaca"),
    ],
)
def test_options_that_decide_the_tokens_are_in_the_key_and_a_change_is_reported(
    change: dict[str, Any], told: str, prepare: Prepare, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare()
    assert first.origin == "built now"
    assert not caplog.text
    second = prepare(**change)
    assert second.folder != first.folder
    assert second.origin == f"rebuilt because {told}"
    assert f"data.sources.toy: the token store is rebuilt because {told}" in caplog.text
    assert prepare().origin == "found"  # the first store is still there


def test_changed_bytes_change_the_key_although_size_and_time_are_the_same(prepare: Prepare, alpaca_file: Path) -> None:
    prepare()
    before, content = alpaca_file.stat(), alpaca_file.read_bytes()
    alpaca_file.write_bytes(content.replace(b"What is 0", b"What is 9", 1))
    os.utime(alpaca_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = alpaca_file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert prepare().reason == f"data changed: {alpaca_file}"


def test_a_file_that_was_touched_or_moved_keeps_its_key(prepare: Prepare, alpaca_file: Path, tmp_path: Path) -> None:
    prepare()
    os.utime(alpaca_file, (1, 1))
    assert not prepare().built
    moved = alpaca_file.rename(tmp_path / "moved.json")
    assert not prepare(path=str(moved)).built


def test_a_new_file_and_names_in_another_order_change_the_key(
    prepare: Prepare, tmp_path: Path, write_json: Callable[..., Path]
) -> None:
    for name in ("d/a.json", "d/b.json"):
        write_json(name, [{"instruction": name, "output": "x"}])
    folder = tmp_path / "d"
    assert prepare(path=str(folder)).num_records == 2
    (folder / "a.json").rename(folder / "c.json")
    assert prepare(path=str(folder)).reason == (
        f"data changed: {folder}/a.json, {folder}/b.json → {folder}/b.json, {folder}/c.json"
    )
    write_json("d/d.json", [{"instruction": "more", "output": "x"}])
    more = prepare(path=str(folder))
    assert (more.num_records, more.reason) == (
        3, f"data changed: {folder}/b.json, {folder}/c.json → {folder}/b.json, {folder}/c.json, {folder}/d.json",
    )  # fmt: skip


def test_the_bytes_and_the_split_of_a_saved_data_set_are_in_the_key(prepare: Prepare, tmp_path: Path) -> None:
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
    assert prepare(path=str(tmp_path / "first")).reason == "data changed"


def test_the_fingerprint_of_a_hub_data_set_is_in_the_key(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert prepare(path="a/b").built
    assert not prepare(path="a/b").built
    loaded._fingerprint = "another commit"
    assert prepare(path="a/b").reason == "data changed: a/b"


def test_the_tokenizers_vocabulary_is_in_the_key(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    prepare()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["What is"])
    assert prepare(tokenizer=other).reason == "tokenizer changed"


def test_the_tokenizers_special_tokens_are_in_the_key(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    first = prepare()
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    second = prepare(tokenizer=other)
    assert (first.built, second.built) == (True, True)


def test_truncation_and_padding_of_the_tokenizer_are_not_in_the_key(
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


def test_the_text_of_a_jinja_file_is_in_the_key(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(JINJA)
    assert prepare(template=str(path)).built
    assert not prepare(template=str(path)).built
    path.write_text(JINJA.replace("]", ">"))
    assert prepare(template=str(path)).reason == f"text of template {path} changed"


def test_a_store_of_other_software_versions_is_built_anew_with_both_versions(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    now = store_key.TOKENIZATION_VERSION
    monkeypatch.setattr(store_key, "TOKENIZATION_VERSION", now + 1)
    assert prepare().reason == f"tokenization of sft_lightning changed: {now} → {now + 1}"
    monkeypatch.setattr(store_key.transformers, "__version__", "99.0")
    assert "transformers changed: " in prepare().reason


def test_several_changes_are_reported_in_one_line(prepare: Prepare, tokenizer: PreTrainedTokenizerFast) -> None:
    prepare()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["What is"])
    changed = prepare(template="vicuna_v1.1", loss_on="all", tokenizer=other)
    assert changed.reason == (
        "template changed: alpaca → vicuna_v1.1; tokenizer changed; loss_on changed: assistant → all"
    )


def test_the_most_similar_store_is_compared(prepare: Prepare) -> None:
    prepare()
    prepare(template="vicuna_v1.1", max_examples=5)
    assert prepare(max_examples=4).reason == "max_examples changed: not set → 4"


@pytest.mark.parametrize("other", [{"name": "another"}, {"path": "copy.json"}])
def test_stores_of_other_sources_are_not_compared(
    other: dict[str, str], prepare: Prepare, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(alpaca_file, "copy.json")
    prepare()
    assert prepare(**other, loss_on="all").origin == "built now"


def test_two_splits_of_a_data_set_are_not_compared(prepare: Prepare, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    prepare(path=str(tmp_path / "saved"), split="train")
    assert prepare(path=str(tmp_path / "saved"), split="test").origin == "built now"


OWN_FORMAT = """
from helper_of_the_key import ANSWER
from sft_lightning.types import Message

def own(record):
    return [Message("user", record.fields["instruction"]), Message("assistant", ANSWER)]
"""


def test_the_code_of_a_users_own_format_is_in_the_key_with_the_modules_that_it_imports(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_format_of_the_key.py").write_text(OWN_FORMAT)
    helper = tmp_path / "helper_of_the_key.py"
    helper.write_text("ANSWER = 'one'")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"format": "own_format_of_the_key.own"}
    first = prepare(**own)
    assert prepare(**own).folder == first.folder
    helper.write_text("ANSWER = 'another'")
    _restart(monkeypatch, "own_format_of_the_key", "helper_of_the_key")
    changed = prepare(**own)
    assert changed.reason == "code of the format changed: helper_of_the_key"
    assert changed.store.input_ids.tolist() != first.store.input_ids.tolist()


def test_code_that_is_edited_while_it_is_loaded_keeps_its_key(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_format_that_is_edited.py").write_text(OWN_FORMAT)
    (tmp_path / "helper_of_the_key.py").write_text("ANSWER = 'one'")
    monkeypatch.syspath_prepend(str(tmp_path))
    _restart(monkeypatch, "helper_of_the_key")
    assert prepare(format="own_format_that_is_edited.own").built
    (tmp_path / "helper_of_the_key.py").write_text("ANSWER = 'another'")
    assert not prepare(format="own_format_that_is_edited.own").built


def _restart(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Forget what was loaded, as a new process would."""
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    user_format.user_function.cache_clear()
    user_modules.source_hashes.cache_clear()
