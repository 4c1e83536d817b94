from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from sft_lightning.data.tokens.flat_examples import flat_examples
from sft_lightning.data.tokens.store import DamagedStoreError, StoreWriter, hash_file, open_store
from sft_lightning.data.tokens.tokenization import TokenizedBatch


def batch_of(*examples: tuple[list[int], list[float]]) -> TokenizedBatch:
    """Examples, each of token ids and loss weights."""
    return TokenizedBatch(
        np.array([token for ids, _ in examples for token in ids], np.int32),
        np.array([weight for _, weights in examples for weight in weights], np.float32),
        np.array([len(ids) for ids, _ in examples], np.int64),
    )


BATCH = batch_of(([5, 6, 7], [1, 0, 2]), ([8], [1]), ([9, 10], [0, 0.5]))


def write(folder: Path, *batches: TokenizedBatch, **facts: Any) -> Path:
    writer = StoreWriter(folder)
    first = 0
    for batch in batches:
        writer.append(batch, np.arange(first, first + len(batch)))
        first += len(batch)
    writer.finish(np.arange(first, dtype=np.uint32), facts)
    return folder


def many_batches() -> list[TokenizedBatch]:
    generator = np.random.default_rng(0)
    examples = [
        (generator.integers(0, 999, n).tolist(), generator.integers(0, 2, n).tolist())
        for n in generator.integers(1, 30, 120)
    ]
    return [batch_of(*examples[i : i + 7]) for i in range(0, 120, 7)]


def test_batches_that_are_written_become_one_store_mapped_into_memory(tmp_path: Path) -> None:
    batches = many_batches()
    store, manifest = open_store(write(tmp_path / "s", *batches, format="text"))
    ids = np.concatenate([batch.input_ids for batch in batches])
    whole = TokenizedBatch(
        ids, np.concatenate([b.loss_weights for b in batches]), np.concatenate([b.counts for b in batches])
    )
    for name, expected in vars(flat_examples(whole)).items():
        assert np.array_equal(getattr(store, name), expected), name
    assert store.records.tolist() == store.marks.tolist() == list(range(120))
    assert isinstance(store.input_ids.base, np.memmap)
    assert isinstance(store.loss_weights.base, np.memmap)
    assert (manifest["format"], manifest["num_examples"], manifest["num_tokens"]) == ("text", 120, len(ids))


def test_a_store_without_examples_can_be_written_and_opened(tmp_path: Path) -> None:
    store, manifest = open_store(write(tmp_path / "s"))
    assert len(store) == manifest["num_examples"] == manifest["num_tokens"] == 0


def test_a_missing_store_is_not_a_damaged_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "nowhere")


FILES = ["input_ids.bin", "loss_weights.bin", "lengths.bin", "records.bin", "supervised.bin", "weights.bin"]


@pytest.mark.parametrize("name", [*FILES, "marks.bin"])
def test_a_flipped_bit_in_any_file_is_found(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s", *many_batches()) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=f"{name} was altered"):
        open_store(path.parent)


@pytest.mark.parametrize("name", [*FILES, "marks.bin"])
def test_a_truncated_file_is_found(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s", *many_batches()) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedStoreError, match=rf"{name} has [\d,]+ bytes instead of"):
        open_store(path.parent)


@pytest.mark.parametrize("name", [*FILES, "marks.bin", "manifest.json"])
def test_a_missing_file_is_found(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "s", BATCH)
    (folder / name).unlink()
    with pytest.raises(DamagedStoreError, match=name):
        open_store(folder)


def test_an_altered_manifest_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", BATCH, format="text")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "alpaca"}))
    with pytest.raises(DamagedStoreError, match=r"manifest\.json was altered"):
        open_store(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "1", '{"files": {}}'])
def test_a_file_that_is_not_a_manifest_is_found(content: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "s", BATCH)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DamagedStoreError, match=r"manifest\.json cannot be read"):
        open_store(folder)


def test_a_flipped_byte_of_a_manifest_is_found_or_changes_no_value(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", BATCH, format="text")
    path = folder / "manifest.json"
    content = path.read_bytes()
    said = json.loads(content)
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            _, found = open_store(folder)
        except DamagedStoreError:
            continue
        assert {**found, "checksum": said["checksum"]} == said


def test_a_store_is_only_written_into_a_new_folder(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        StoreWriter(tmp_path)


def test_a_build_that_failed_closes_its_files_and_leaves_no_store(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s")
    writer.append(BATCH, np.arange(3))
    writer.abandon()
    writer.abandon()
    with pytest.raises(DamagedStoreError):
        open_store(tmp_path / "s")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert hash_file(tmp_path / "a") == xxhash.xxh3_128_hexdigest(b"abc" * 1000)
