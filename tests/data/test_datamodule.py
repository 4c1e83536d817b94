from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources import SourceConfig
from sft_lightning.errors import UserError


@pytest.fixture
def module(model_dir: Path, alpaca_file: Path) -> Callable[..., SFTDataModule]:
    def make(**changes: Any) -> SFTDataModule:
        options: dict[str, Any] = {
            "sources": {"toy": SourceConfig(path=str(alpaca_file))},
            "template": "alpaca",
            "max_length": 256,
            "tokenizer_name_or_path": str(model_dir),
        }
        return SFTDataModule(**{**options, **changes})

    return make


Make = Callable[..., SFTDataModule]


def test_supervised_tokens_of_the_training_data_are_the_answers_and_their_end(module: Make, alpaca_file: Path) -> None:
    data = module(packing="none")
    data.setup("fit")
    answers = set()
    for batch in data.train_dataloader():
        answers.add(data.tokenizer.decode(batch["labels"][batch["loss_weights"] > 0].tolist()))
    assert answers == {record["output"] + "</s>" for record in json.loads(alpaca_file.read_text())}


def test_a_fraction_is_held_out_disjoint_and_the_same_every_time(module: Make) -> None:
    data, again = module(val_fraction=0.25), module(val_fraction=0.25)
    for each in (data, again):
        each.setup("fit")
    locations = {
        split: [record.location for record in data.records(split, data.sources)["toy"]] for split in ("train", "val")
    }
    assert (len(locations["train"]), len(locations["val"])) == (18, 6)
    assert not set(locations["train"]) & set(locations["val"])
    assert [r.location for r in again.records("val", again.sources)["toy"]] == locations["val"]


def test_validation_sources_have_a_loader_each(module: Make, alpaca_file: Path) -> None:
    source = SourceConfig(path=str(alpaca_file), max_examples=3)
    data = module(val_sources={"one": source, "two": source})
    data.setup("fit")
    assert data.val_names == ["one", "two"]
    assert len(data.val_dataloader()) == 2


def test_the_report_counts_what_was_read_and_what_trains(module: Make) -> None:
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


def test_pretraining_takes_documents_alone(module: Make, alpaca_file: Path) -> None:
    data = module(task="pretrain", sources={"toy": SourceConfig(path=str(alpaca_file), format="alpaca")})
    with pytest.raises(UserError, match="pretraining takes text"):
        data.setup("fit")


def test_prompts_end_where_the_answer_begins(module: Make) -> None:
    data = module(val_fraction=0.25)
    prompts = data.prompts()
    assert len(prompts) == 6
    assert prompts[0]["prompt"].endswith("### Response:")
    assert " is " in prompts[0]["reference"]


def test_a_stop_token_that_is_no_single_token_is_refused(
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"val_fraction": -0.1}, "data.val_fraction"),
        ({"val_fraction": 0.1, "val_sources": {"a": SourceConfig(path="x")}}, "not both"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], said: str, module: Make) -> None:
    with pytest.raises(UserError, match=said):
        module(**changes)


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


def test_questions_without_answers_can_be_predicted_on(module: Make, write_json: Callable[..., Path]) -> None:
    plain = write_json("plain.json", [{"instruction": "Who?"}])
    chat = write_json("chat.json", [{"messages": [{"role": "user", "content": "Who?"}]}])
    data = module(predict_sources={"a": SourceConfig(path=str(plain)), "b": SourceConfig(path=str(chat))})
    first, second = data.prompts()
    assert first["prompt"] == second["prompt"]
    assert "reference" not in first
    assert "reference" not in second


def test_a_document_is_sampled_from_its_beginning_not_from_all_of_it(
    module: Make, write_json: Callable[..., Path]
) -> None:
    long = write_json("long.txt", "word " * 10_000)
    data = module(sources={"long": SourceConfig(path=str(long))}, packing="concat", task="pretrain")
    assert len(data.sample_prompts(1)[0]["prompt"]) <= 80 + len("<s>")


def test_a_weight_that_leaves_nothing_is_refused(module: Make, alpaca_file: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.toy\.weight: 0\.01 of 24 examples is none"):
        module(sources={"toy": SourceConfig(path=str(alpaca_file), weight=0.01)}).setup("fit")


def test_a_validation_source_of_which_nothing_is_left_is_named(module: Make, write_json: Callable[..., Path]) -> None:
    long = write_json("long.json", [{"text": "word " * 3000}])
    with pytest.raises(UserError, match="no example of the val source 'long' is left"):
        module(val_sources={"long": SourceConfig(path=str(long))}, overlong="drop").setup("fit")


def test_another_cut_is_other_data(module: Make, alpaca_file: Path) -> None:
    first = module(overlong="truncate")
    second = module(overlong="drop", max_length=256)
    for each in (first, second):
        each.setup("fit")
    assert first.state_dict() == second.state_dict()
    second._train[0].lengths[0] -= 1
    second.__dict__.pop("_lengths", None)
    second.__dict__.pop("_fingerprint", None)
    with pytest.raises(UserError, match="tokens"):
        second.load_state_dict(first.state_dict())
