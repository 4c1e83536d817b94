from __future__ import annotations

import pytest
import yaml

from sft_lightning.migration.draft import Draft, keep_examples_unpacked, set_source, source_name


def test_keys_become_nested_yaml_in_the_order_of_a_configuration() -> None:
    draft = Draft()
    draft.set("trainer.max_steps", 5)
    draft.set("model.adapter.r", 8, "the default")
    draft.set("model.optimizer.init_args.lr", 1e-4)
    draft.set("model.optimizer.class_path", "torch.optim.AdamW")
    text = draft.text("Migrated.\nCheck it.")
    assert text.startswith("# Migrated.\n# Check it.\nmodel:\n")
    assert "    r: 8  # the default\n" in text
    assert text.index("class_path") < text.index("init_args")
    assert yaml.safe_load(text) == {
        "model": {"adapter": {"r": 8}, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}},
        "trainer": {"max_steps": 5},
    }


def test_dropping_a_prefix_removes_its_keys() -> None:
    draft = Draft()
    draft.set("model.adapter.r", 8)
    draft.set("model.dtype", "float32")
    draft.drop("model.adapter.")
    assert draft.values == {"model.dtype": "float32"}


def test_omitted_options_follow_the_yaml_as_comments() -> None:
    draft = Draft()
    draft.omit("--tf32 True", "use bf16")
    assert draft.text("x") == "# x\n\n# Not migrated:\n#   --tf32 True: use bf16\n"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/train.jsonl", "train"),
        ("a-b.c.json", "a_b"),
        ("你好.json", "你好"),
        ("--.json", "train"),
        ("dir/", "dir"),
    ],
)
def test_a_source_is_named_after_its_file(path: str, name: str) -> None:
    assert source_name(path) == name


def test_a_source_has_a_format_if_the_system_has_one() -> None:
    draft = Draft()
    set_source(draft, "data.sources", "a.json", "alpaca")
    set_source(draft, "data.val_sources", "b.json", None)
    set_source(draft, "data.test_sources", None, "alpaca")
    keep_examples_unpacked(draft)
    assert draft.values == {
        "data.sources": {"a": {"path": "a.json", "format": "alpaca"}},
        "data.val_sources": {"b": {"path": "b.json"}},
        "data.packing": "none",
    }
