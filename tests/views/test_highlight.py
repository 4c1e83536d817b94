from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft_lightning.types import TokenizedExample
from sft_lightning.views.highlight import Piece, ShownToken, show_tokens, token_texts, visible


def shown(tokenizer: PreTrainedTokenizerFast, text: str) -> list[ShownToken]:
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    return show_tokens(TokenizedExample(ids, np.ones(len(ids), np.float32)), tokenizer)


@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=40))
def test_the_joined_texts_of_all_tokens_are_the_decoded_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert "".join(token.text for token in shown(tokenizer, text)) == text


def test_the_last_token_of_a_character_has_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [token.text for token in shown(tokenizer, "a👍b")]
    assert texts == ["a", "", "", "", "👍", "b"]


def test_a_text_that_ends_within_a_character_keeps_all_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a👍", add_special_tokens=False).input_ids[:-1]
    assert token_texts(ids, lambda part: str(tokenizer.decode(part))) == ["a", "", "", "\ufffd"]


def test_the_wait_for_the_end_of_a_character_is_limited() -> None:
    asked: list[int] = []

    def decode(ids: list[int]) -> str:
        asked.append(len(ids))
        return "\ufffd" * len(ids)

    assert "".join(token_texts([0] * 1000, decode)) == "\ufffd" * 1000
    assert max(asked) <= 32


def test_leading_spaces_that_the_tokenizer_drops_are_kept() -> None:
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    example = TokenizedExample(np.array([0, 1, 1], np.int32), np.zeros(3, np.float32))
    assert [token.text for token in show_tokens(example, tokenizer)] == ["one", " two", " two"]


def test_tokens_have_position_id_name_weight_and_whether_they_are_special(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = TokenizedExample(np.array([1, 2], np.int32), np.array([0, 0.5], np.float32))
    assert show_tokens(example, tokenizer) == [
        ShownToken(0, 1, "<s>", "<s>", 0.0, special=True),
        ShownToken(1, 2, "</s>", "</s>", 0.5, special=True),
    ]


def test_an_example_without_tokens_has_none_to_show(tokenizer: PreTrainedTokenizerFast) -> None:
    assert show_tokens(TokenizedExample(np.zeros(0, np.int32), np.zeros(0, np.float32)), tokenizer) == []


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("a\nb", ["↵"]),
        ("\r\n", ["␍", "↵"]),
        ("\t", ["⇥"]),
        ("\x1b[31m", ["␛"]),
        ("\x00", ["␀"]),
        ("\u202eevil", ["⟨U+202E⟩"]),
        ("\ufeff", ["⟨U+FEFF⟩"]),
        ("\u200b", ["⟨U+200B⟩"]),
        ("plain text, 日本語, العربية", []),
        ("👨\u200d👩\u200d👧", []),
    ],
)
def test_invisible_characters_are_marked(text: str, marks: list[str]) -> None:
    assert [piece.text for piece in visible(text, spaces=False) if piece.is_mark] == marks


def test_a_line_feed_is_kept_after_its_mark() -> None:
    assert list(visible("a\n", spaces=False)) == [Piece("a", False), Piece("↵", True), Piece("\n", False)]


def test_spaces_and_joiners_are_only_marked_in_tokens() -> None:
    assert [piece.text for piece in visible(" a\u200d", spaces=True)] == ["·", "a", "⟨U+200D⟩"]
    assert [piece.text for piece in visible(" a\u200d", spaces=False)] == [" a\u200d"]


@given(text=st.text())
def test_a_text_without_its_marks_has_all_visible_characters(text: str) -> None:
    kept = "".join(piece.text for piece in visible(text, spaces=False) if not piece.is_mark)
    assert kept == "".join(character for character in text if character == "\n" or not _is_marked_alone(character))


def _is_marked_alone(character: str) -> bool:
    return next(visible(character, spaces=False)).is_mark
