from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sft_lightning.errors import UserError
from sft_lightning.tokenizer import (
    AnswerEnding,
    Chat,
    adds_bos,
    answer_ending,
    content_parts,
    has_tokenizer,
    load_tokenizer,
)

NEW = ["<tool>", "<think>", "newword"]


@pytest.fixture
def extended(model_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(model_dir), tokens=NEW[2:], special_tokens=NEW[:2])


def test_a_tokenizer_is_needed_without_a_model() -> None:
    with pytest.raises(UserError, match="tokenizer_name_or_path"):
        load_tokenizer(None)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("folder", "said"),
    [("./nowhere", "the folder './nowhere' does not exist"), (".", "has no tokenizer.json or tokenizer.model")],
)
def test_a_folder_without_a_tokenizer_is_named_with_its_key(
    folder: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^model\.tokenizer_name_or_path \(or model_name_or_path\): .*" + said):
        load_tokenizer(folder)


def test_whether_a_tokenizer_adds_bos_is_found_by_tokenizing(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    assert adds_bos(load_tokenizer(str(model_dir)))
    assert not adds_bos(plain)


def test_added_tokens_are_one_token_each_and_special_ones_leave_answers(
    extended: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(extended) == len(tokenizer) + 3
    ids = extended("a newword<tool>", add_special_tokens=False).input_ids
    assert ids[-2:] == extended.convert_tokens_to_ids(["newword", "<tool>"])
    assert extended.decode(ids, skip_special_tokens=True) == "a newword"


def test_tokens_that_are_there_already_add_nothing(extended: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    extended.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), tokens=NEW[2:], special_tokens=NEW[:2])) == len(extended)


@pytest.mark.parametrize(
    ("tokens", "said"), [(["a", ""], "must not be empty"), (["<tool>", "<tool>"], "named twice: '<tool>'")]
)
def test_an_empty_token_and_one_that_is_named_twice_are_refused(tokens: list[str], said: str, model_dir: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_tokenizer(str(model_dir), tokens=tokens)


def test_a_missing_pad_token_stays_missing(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token is None
    assert len(loaded) == len(tokenizer)


# --- how a chat template ends an answer -------------------------------------------------------------------------------


def chatml(chat: Chat, add_generation_prompt: bool, tools: object = ()) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)


def typed_chatml(chat: Chat, add_generation_prompt: bool, tools: object = ()) -> str:
    """Write typed parts only, as multimodal templates do."""
    texts = ["".join(part["text"] for part in turn["content"] if isinstance(part, dict)) for turn in chat]
    return chatml([{**turn, "content": text} for turn, text in zip(chat, texts, strict=True)], add_generation_prompt)


def test_the_stop_token_and_what_follows_it_are_found_by_rendering() -> None:
    added = ["<|im_start|>", "<|im_end|>", ""]
    assert answer_ending("chatml", chatml, added) == AnswerEnding("<|im_end|>", "\n", typed_parts=False)
    assert answer_ending("typed", typed_chatml, added) == AnswerEnding("<|im_end|>", "\n", typed_parts=True)


def test_the_longest_of_several_tokens_that_match_is_the_stop_token() -> None:
    assert answer_ending("chatml", chatml, ["<|im", "<|im_end|>"]).stop == "<|im_end|>"


def test_a_template_that_ends_answers_without_an_added_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"chatml writes '<\|im_end\|>\\n' after an answer.*could not learn to stop"):
        answer_ending("chatml", chatml, ["</s>"])


def test_a_template_that_leaves_out_answers_is_refused() -> None:
    with pytest.raises(UserError, match="mute leaves out the answer"):
        answer_ending("mute", lambda chat, prompt, tools: "", ["</s>"])


def test_the_refusal_of_a_template_is_passed_on() -> None:
    def refusing(chat: Chat, add_generation_prompt: bool, tools: object) -> str:
        raise UserError(f"never: {chat[0]['content']}")

    with pytest.raises(UserError, match=r"^never: question$"):
        answer_ending("refusing", refusing, ["</s>"])


def test_typed_contents_are_lists_of_one_text_part() -> None:
    assert content_parts("a", typed=False) == "a"
    assert content_parts("a", typed=True) == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"])
def test_a_folder_with_any_file_of_a_tokenizer_has_one(file: str, tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / file).touch()
    assert has_tokenizer(tmp_path)
