from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.blending import BlendConfig
from sft_lightning.data.plan.epoch_plan import Layout, Topology
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.errors import UserError


@pytest.fixture
def module(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> Callable[..., SFTDataModule]:
    def make(**changes: Any) -> SFTDataModule:
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(alpaca_file))},
            "template": "alpaca",
            "max_length": 256,
            "tokenizer_name_or_path": str(model_dir),
            "store_dir": str(tmp_path / "stores"),
        }
        return SFTDataModule(DataSpec(**{**options, **changes}))

    return make


Make = Callable[..., SFTDataModule]


def test_the_supervised_tokens_are_the_answers_and_their_end_tokens(module: Make, alpaca_file: Path) -> None:
    data = module(packing="none")
    data.setup("fit")
    answers = set()
    for batch in data.train_dataloader():
        answers.add(data.tokenizer.decode(batch["labels"][batch["loss_weights"] > 0].tolist()))
    assert answers == {record["output"] + "</s>" for record in json.loads(alpaca_file.read_text())}


def test_the_held_out_records_are_the_same_every_time_and_not_trained_on(module: Make) -> None:
    data, again = module(val_fraction=0.25), module(val_fraction=0.25)
    for each in (data, again):
        each.setup("fit")
    splits: tuple[Split, ...] = ("train", "val")
    locations = {split: [record.location for record in data.reader.records(split, "toy")] for split in splits}
    assert (len(locations["train"]), len(locations["val"])) == (18, 6)
    assert not set(locations["train"]) & set(locations["val"])
    assert [record.location for record in again.reader.records("val", "toy")] == locations["val"]


def test_each_validation_source_has_a_loader(module: Make, alpaca_file: Path) -> None:
    source = SourceConfig(path=str(alpaca_file), max_examples=3)
    data = module(val_sources={"one": source, "two": source})
    data.setup("fit")
    assert data.source_names("val") == ["one", "two"]
    assert len(data.val_dataloader()) == 2


def test_the_report_counts_records_examples_and_rows(module: Make) -> None:
    data = module()
    data.setup("fit")
    report = data.report.sources["train/toy"]
    assert (report.format, report.records, report.examples) == ("alpaca", 24, 24)
    assert 0 < report.supervised_tokens < report.tokens
    assert data.report.rows == data.plan(0).num_rows
    assert data.report.fill == pytest.approx(report.tokens / (data.report.rows * 256))


@pytest.mark.parametrize(("overlong", "examples"), [("drop", 0), ("truncate", 24)])
def test_overlong_examples_are_dropped_or_cut_and_counted(
    overlong: str, examples: int, module: Make, write_json: Callable[[str, Any], Path]
) -> None:
    long = write_json("long.json", [{"text": "word " * 300}] * 24 + [{"text": "short"}])
    data = module(sources={"long": SourceConfig(path=str(long))}, overlong=overlong, max_length=100, task="pretrain")
    data.setup("fit")
    report = data.report.sources["train/long"]
    assert report.examples == examples + 1
    assert report.supervised_tokens_lost > 0
    assert (report.dropped["overlong"], report.truncated) == (24 - examples, examples)


def test_an_example_cut_before_its_answer_is_dropped_with_a_reason(module: Make) -> None:
    data = module(overlong="truncate", max_length=20)
    with pytest.raises(UserError, match="no example is left"):
        data.setup("fit")
    assert data.report.sources["train/toy"].dropped == {"no_supervised_tokens": 24}


def test_an_overlong_example_is_an_error_that_says_the_length_needed(module: Make) -> None:
    with pytest.raises(UserError, match=r"Set data\.max_length to at least \d+"):
        module(max_length=20).setup("fit")


def test_pretraining_refuses_conversations(module: Make, alpaca_file: Path) -> None:
    data = module(task="pretrain", sources={"toy": SourceConfig(path=str(alpaca_file), format="alpaca")})
    with pytest.raises(UserError, match="task: pretrain requires text"):
        data.setup("fit")


def test_prompts_end_where_the_answer_begins(module: Make) -> None:
    data = module(val_fraction=0.25)
    prompts = data.prompts()
    assert len(prompts) == 6
    assert prompts[0]["prompt"].endswith("### Response:")
    assert " is " in prompts[0]["reference"]


def test_a_template_without_a_single_stop_token_is_refused(
    module: Make, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match="could not learn to stop"):
        module(template=str(template)).setup("fit")


def test_a_jinja_file_becomes_the_tokenizers_chat_template(module: Make, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    text = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template.write_text(text)
    data = module(template=str(template))
    data.setup("fit")
    assert data.tokenizer.chat_template == text
    assert data.prompts() == []
    assert data.sample_prompts(1)[0]["prompt"] == "<s>[user]What is 0 and 0?[assistant]"


def test_a_missing_jinja_file_names_the_key(module: Make) -> None:
    with pytest.raises(UserError, match=r"data\.template: cannot read"):
        module(template="nowhere.jinja").setup("fit")


def test_two_epochs_have_the_same_examples_in_another_order(module: Make) -> None:
    data = module()
    data.setup("fit")
    first, second = data.plan(0), data.plan(1)
    assert sorted(first.documents.tolist()) == sorted(second.documents.tolist())
    assert first.documents.tolist() != second.documents.tolist()


def test_concat_trains_on_every_token_of_documents_of_any_length(module: Make, write_json: Callable[..., Path]) -> None:
    long = write_json("long.json", [{"text": "word " * 300}, {"text": "short"}])
    data = module(sources={"long": SourceConfig(path=str(long))}, packing="concat", max_length=64, task="pretrain")
    data.setup("fit")
    report = data.report.sources["train/long"]
    batches = list(data.train_dataloader())
    assert sum(batch["num_tokens"] for batch in batches) == report.tokens
    assert (report.dropped, report.truncated, report.supervised_tokens_lost) == ({}, 0, 0)
    assert sorted(batch["num_tokens"] for batch in batches)[1:] == [64] * (data.plan(0).num_rows - 1)


def test_template_free_records_mix_with_conversations(
    module: Make, alpaca_file: Path, write_json: Callable[..., Path]
) -> None:
    pairs = write_json("pairs.json", [{"prompt": "2+2=", "completion": "4"}] * 3)
    sources = {"chat": SourceConfig(path=str(alpaca_file)), "pairs": SourceConfig(path=str(pairs))}
    data = module(sources=sources, predict_sources={"pairs": sources["pairs"]})
    data.setup("fit")
    assert data.report.sources["train/pairs"].format == "prompt_completion"
    assert data.report.sources["train/pairs"].supervised_tokens == 3 * 2
    assert data.prompts()[0] == {
        "source": "pairs", "location": f"{pairs}, record 0", "prompt": "<s>2+2=", "reference": "4",
    }  # fmt: skip


def test_predict_takes_questions_without_answers(module: Make, write_json: Callable[..., Path]) -> None:
    plain = write_json("plain.json", [{"instruction": "Who?"}])
    chat = write_json("chat.json", [{"messages": [{"role": "user", "content": "Who?"}]}])
    data = module(predict_sources={"a": SourceConfig(path=str(plain)), "b": SourceConfig(path=str(chat))})
    first, second = data.prompts()
    assert first["prompt"] == second["prompt"]
    assert "reference" not in first
    assert "reference" not in second


def test_the_sample_prompt_of_a_document_is_its_beginning(module: Make, write_json: Callable[..., Path]) -> None:
    long = write_json("long.txt", "word " * 10_000)
    data = module(sources={"long": SourceConfig(path=str(long))}, packing="concat", task="pretrain")
    assert len(data.sample_prompts(1)[0]["prompt"]) <= 80 + len("<s>")


def test_a_weight_that_leaves_no_example_is_refused(module: Make, alpaca_file: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.toy\.weight: 0\.01 of 24 examples is less than one example"):
        module(sources={"toy": SourceConfig(path=str(alpaca_file), weight=0.01)}).setup("fit")


def test_a_validation_source_that_has_no_example_left_is_named(module: Make, write_json: Callable[..., Path]) -> None:
    long = write_json("long.json", [{"text": "word " * 3000}])
    with pytest.raises(UserError, match="no example of the val source 'long' is left"):
        module(val_sources={"long": SourceConfig(path=str(long))}, overlong="drop").setup("fit")


def test_a_checkpoint_of_other_data_is_refused_with_the_changes(module: Make) -> None:
    first, same, other = (
        module(overlong="truncate"),
        module(overlong="drop"),
        module(overlong="truncate", max_length=100),
    )
    for each in (first, same, other):
        each.setup("fit")
    state = first.state_dict()
    assert state == same.state_dict()  # nothing was long enough to be cut
    same.load_state_dict(state)
    with pytest.raises(UserError, match=r"--ckpt_path: .*max_length: 256 → 100; data.sources: other tokens: \w+ → \w+"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed: 0 → 1"),
        ({"packing": "none"}, "packing: best_fit → none"),
        ({"batch_size": 2}, r"global batch \(rows\): 1 → 2"),
        ({"blend": BlendConfig(by="tokens")}, "blend: epochs, temperature 1.0 → tokens, temperature 1.0"),
        ({"max_length": 300}, "max_length: 256 → 300"),
        ({"loss_on": "all"}, "data.loss_on: assistant → all"),
        ({"val_fraction": 0.5}, "data.sources: other tokens: "),
    ],
)
def test_a_checkpoint_of_rows_in_another_order_is_refused(changes: dict[str, Any], said: str, module: Make) -> None:
    first, second = module(), module(**changes)
    for each in (first, second):
        each.setup("fit")
    with pytest.raises(UserError, match=said):
        second.load_state_dict(first.state_dict())


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were tokenized, call by call."""
    calls: list[int] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: calls.append(len(texts)) or encode(self, texts))
    return calls


def test_options_that_do_not_change_the_tokens_do_not_tokenize_again(
    module: Make, alpaca_file: Path, encoded: list[int]
) -> None:
    module().setup("fit")
    assert encoded.count(24) == 1
    sources = {"toy": SourceConfig(path=str(alpaca_file), weight=2.0, max_epochs=3.0)}
    for changes in (
        {},
        {"max_length": 300},
        {"max_length": 100, "overlong": "truncate"},
        {"min_length": 5},
        {"packing": "none"},
        {"packing": "concat"},
        {"batch_size": 4},
        {"seed": 9},
        {"val_fraction": 0.25},
        {"data_split": "2,4,4", "data_split_part": 2},
        {"sources": sources, "blend": BlendConfig(by="tokens", temperature=2.0)},
        {"test_sources": sources},
    ):
        data = module(**changes)
        data.setup("fit")
        data.plan(1)
    assert encoded.count(24) == 1
    module(loss_on="all").setup("fit")
    assert encoded.count(24) == 2


def test_the_plan_is_the_same_for_any_split_of_the_global_batch(module: Make) -> None:
    plans = []
    for batch_size, accumulate, world_size in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
        data = module(batch_size=batch_size)
        data.topology = Topology(batch_size=batch_size, accumulate=accumulate, world_size=world_size)
        data.setup("fit")
        plans.append((data.plan(0).documents.tolist(), data.plan(0).rows_per_step, data.num_optimizer_steps))
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_every_example_is_trained_on_once_and_the_denominators_add_up(packing: str, module: Make) -> None:
    data = module(packing=packing, batch_size=5, max_length=128)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(batch["num_tokens"] for batch in batches) == data.report.sources["train/toy"].tokens
    for batch in batches:
        assert batch["denominator"] == pytest.approx(float(batch["loss_weights"].sum()))  # a step is one batch here


def test_sources_are_blended_by_their_weights(module: Make, write_json: Callable[..., Path]) -> None:
    paths = {
        name: write_json(f"{name}.json", [{"instruction": f"{name} {i}", "output": f"{i}"} for i in range(count)])
        for name, count in (("big", 60), ("small", 20))
    }
    sources = {name: SourceConfig(path=str(path), max_epochs=2.0) for name, path in paths.items()}
    data = module(sources=sources, blend=BlendConfig(by="examples"))
    data.setup("fit")
    assert len(data.plan(0).documents) == 80  # 40 of each: the small one twice
    for name in ("big", "small"):
        report = data.report.sources[f"train/{name}"]
        assert (report.wanted, report.delivered) == (pytest.approx(0.5), pytest.approx(0.5))
    assert data.report.largest_deviation <= 1


def test_a_source_whose_examples_are_all_dropped_does_not_stop_the_others(
    module: Make, alpaca_file: Path, write_json: Callable[..., Path]
) -> None:
    long = write_json("long.json", [{"text": "word " * 3000}])
    for names in (("a_long", "toy"), ("toy", "z_long")):
        paths = {name: long if "long" in name else alpaca_file for name in names}
        data = module(sources={name: SourceConfig(path=str(path)) for name, path in paths.items()}, overlong="drop")
        data.setup("fit")
        assert len(data.plan(0).documents) == 24


def test_prepare_builds_the_stores_of_every_split_and_finds_them_the_next_time(module: Make, alpaca_file: Path) -> None:
    def sources(*numbers: int) -> dict[str, SourceConfig]:
        return {f"s{n}": SourceConfig(path=str(alpaca_file), max_examples=n) for n in numbers}

    options = {"sources": sources(9), "val_sources": sources(8), "test_sources": sources(6, 7)}
    first, second = module(**options).prepare(), module(**options).prepare()
    assert {name: stored.built for name, stored in first.items()} == dict.fromkeys(
        ("train/s9", "val/s8", "test/s6", "test/s7"), True
    )
    assert not any(stored.built for stored in second.values())
    assert all(stored.built for stored in module(**options).prepare(rebuild=True).values())


def test_prepare_tokenizes_a_source_once_that_training_and_validation_share(module: Make, encoded: list[int]) -> None:
    data = module(val_fraction=0.25)
    stores = data.prepare(rebuild=True)
    assert list(stores) == ["train/toy"]
    assert encoded.count(24) == 1
    assert data.report.sources["val/toy"].examples == 6


def test_a_stage_without_sources_is_refused(module: Make) -> None:
    data = module(sources={})
    with pytest.raises(UserError, match=r"data\.sources: no source given"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"data\.test_sources: no source given"):
        data.setup("test")
    with pytest.raises(UserError, match="set val_sources or val_fraction"):
        data.setup("validate")


def test_ranks_take_different_rows_and_as_many_batches(module: Make) -> None:
    taken = []
    for rank in range(2):
        data = module(packing="none", batch_size=2)
        data.topology = Topology(batch_size=2, world_size=2, rank=rank)
        data.setup("fit")
        loader = data.train_dataloader()
        taken.append([batch["input_ids"].tolist() for batch in loader])
        assert len(taken[-1]) == len(loader) == 6
    assert sum(len(batch) for rank in taken for batch in rank) == 24


def test_a_model_that_trains_again_does_not_keep_the_layout_of_its_earlier_run(module: Make) -> None:
    data = module(packing="best_fit")
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(layout=Layout(packing="none")))  # type: ignore[assignment]
    assert data.layout.packing == "best_fit"


@pytest.mark.parametrize(("device", "locked"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_are_in_page_locked_memory(
    device: str, locked: bool, module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.Size] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    data = module(packing="best_fit")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    tensors = sum(isinstance(value, torch.Tensor) for value in batch.values())
    assert not pinned
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), lightning_module=None, world_size=1, global_rank=0,
        accumulate_grad_batches=1, max_epochs=1, max_steps=-1, limit_train_batches=1.0, current_epoch=0,
    )  # fmt: skip
    data.trainer = trainer
    next(iter(data.train_dataloader()))
    # Besides the tensors, the starts of the documents, and where supervised tokens are predicted (four tensors).
    assert len(pinned) == (tensors + 5 if locked else 0)
