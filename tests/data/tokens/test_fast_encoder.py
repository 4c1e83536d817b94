from __future__ import annotations

import copy
import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.tokens.fast_encoder import TextEncoder, bytes_of_tokens, without_normalizer
from sft_lightning.data.tokens.tokenization import Tokens, byte_length, split, tokenize
from sft_lightning.errors import UserError
from sft_lightning.types import Segment

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
HARD = [
    "",
    " ",
    "a",
    "  two  spaces ",
    "é 日本 🙂🙃 👨‍👩‍👧",
    "<s>a</s></s>",
    "\n\n\tx\r\n",
    "e\u0301 \u1100\u1161",
    "\u00a0\u2028",
    "a" * 99,
]


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def by_offsets(encoder: TextEncoder, texts: list[str]) -> Tokens:
    return encoder._by_offsets(texts)


def check_same(fast: Tokens, slow: Tokens, texts: list[str]) -> None:
    """The same tokens; the same ends wherever a token ends with a character."""
    assert fast.ids.tolist() == slow.ids.tolist()
    assert fast.counts.tolist() == slow.counts.tolist()
    for text, one, other in zip(texts, split(fast), split(slow), strict=True):
        borders = set(np.cumsum([0, *(len(character.encode()) for character in text)]).tolist())
        at_border = np.array([end in borders for end in one.ends.tolist()], bool)
        assert one.ends[at_border].tolist() == other.ends[at_border].tolist()
        assert one.last[at_border].tolist() == other.last[at_border].tolist()
        if len(one.ids):
            assert one.ends[-1] == byte_length(text)


@given(texts=st.lists(TEXT | st.sampled_from(HARD), max_size=5))
def test_byte_lengths_give_the_same_tokens_as_offsets(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer)
    assert encoder._bytes_of is not None
    check_same(encoder.encode(texts), by_offsets(encoder, texts), texts)


@pytest.mark.parametrize("text", HARD)
def test_ids_are_those_of_the_tokenizer(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextEncoder(tokenizer).encode([text]).ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


def changed(tokenizer: PreTrainedTokenizerFast, **parts: Any) -> PreTrainedTokenizerFast:
    """The same vocabulary with another normalizer or pre-tokenizer."""
    own = copy.deepcopy(tokenizer)
    for name, part in parts.items():
        setattr(own.backend_tokenizer, name, part)
    return own


NOT_NFC = ["e\u0301 x", "\u1100\u1161\u11a8", "\u212b", "plain", "a\u0327\u0301 é"]


@given(texts=st.lists(TEXT | st.sampled_from(NOT_NFC), max_size=5))
def test_the_offsets_of_a_text_that_the_normalizer_changes_are_read(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = TextEncoder(changed(tokenizer, normalizer=normalizers.NFC()))
    assert encoder._bytes_of is not None
    fast, slow = encoder.encode(texts), by_offsets(encoder, texts)
    assert fast.ids.tolist() == slow.ids.tolist()
    for text, one, other in zip(texts, split(fast), split(slow), strict=True):
        if unicodedata.normalize("NFC", text) != text:
            assert one.ends.tolist() == other.ends.tolist()
        assert max(one.ends.tolist(), default=0) <= byte_length(text)


def test_texts_whose_offsets_are_read_keep_their_position(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(changed(tokenizer, normalizer=normalizers.NFC()))
    texts = ["one", NOT_NFC[0], "two", NOT_NFC[4], "three"]
    together = split(encoder.encode(texts))
    for text, tokens in zip(texts, together, strict=True):
        assert tokens.ids.tolist() == encoder.encode([text]).ids.tolist()
        assert tokens.ends.tolist() == encoder.encode([text]).ends.tolist()


@pytest.mark.parametrize("sides", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_special_token_that_swallows_spaces_covers_them(
    sides: dict[str, bool], tokenizer: PreTrainedTokenizerFast
) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<end>", special=True, **sides)], special_tokens=True)
    encoder = TextEncoder(own)
    assert encoder._bytes_of is not None
    texts = ["a  <end>  b", "plain", "é <end>", "<end>"]
    fast, slow = encoder.encode(texts), by_offsets(encoder, texts)
    check_same(fast, slow, texts)
    first = split(fast)[0]
    assert first.ids.tolist() == own("a  <end>  b", add_special_tokens=False).input_ids


def test_an_added_token_counts_its_own_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<é>"), AddedToken("日本", special=True)])
    table = bytes_of_tokens(own.backend_tokenizer)
    assert table is not None
    assert table[own.convert_tokens_to_ids(["<é>", "日本", "</s>"])].tolist() == [4, 6, 4]
    texts = ["a<é>b日本c"]
    check_same(TextEncoder(own).encode(texts), by_offsets(TextEncoder(own), texts), texts)


def test_the_offsets_of_a_text_with_bytes_outside_the_vocabulary_are_read() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = TextEncoder(wrapped(backend))
    assert encoder._bytes_of is not None
    tokens, asked = encoder.encode(["ab", "a xb"]), by_offsets(encoder, ["ab", "a xb"])
    assert tokens.ids.tolist() == [0, 1, 0, 2, 1]
    assert tokens.ends.tolist() == asked.ends.tolist()


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), LEVEL])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL])},
        {"pre_tokenizer": LEVEL, "normalizer": normalizers.NFC()},
    ],
)
def test_tokenizers_like_llama_3_and_qwen_need_no_offsets(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = TextEncoder(changed(tokenizer, **parts))
    assert encoder._bytes_of is not None
    check_same(encoder.encode(HARD[:7]), by_offsets(encoder, HARD[:7]), HARD[:7])


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), LEVEL])},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])},
    ],
)
def test_the_offsets_of_other_tokenizers_are_read(parts: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    assert bytes_of_tokens(changed(tokenizer, **parts).backend_tokenizer) is None


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()], ids=["by lengths", "by offsets"])
def test_truncation_and_padding_of_earlier_calls_change_nothing(
    normalizer: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = changed(tokenizer, normalizer=normalizer) if normalizer else copy.deepcopy(tokenizer)
    before = TextEncoder(own).encode(["a long text of many tokens", "b"])
    own(["a long text", "b"], truncation=True, max_length=2, padding="max_length")
    assert own.backend_tokenizer.truncation is not None
    after = TextEncoder(own).encode(["a long text of many tokens", "b"])
    assert after.ids.tolist() == before.ids.tolist()
    assert after.counts.tolist() == before.counts.tolist()


# --- tokenizers that put a space before a text -----------------------------------------------------------------------

CORPUS = ["Hello world, how are you? I am fine.", "The answer is: 4 and 42.\nGood bye, world.", "Hello Hello a b c"]


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted({*"".join(CORPUS), "▁"})
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=alphabet),
    )
    return wrapped(backend)


def like_llama_2() -> PreTrainedTokenizerFast:
    """Sentencepiece's BPE as Llama 2 has it: no pre-tokenizer, a normalizer that writes `▁`, bytes as a fallback."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return wrapped(backend)


def prefixed_byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return wrapped(backend)


def test_a_prefix_token_that_covers_the_first_character_hides_no_token_across_a_border() -> None:
    scores = {"<unk>": 0.0, "▁": -2.0, "中": -9.0, "国": -9.0, "中国": -3.0, "人": -4.0}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = wrapped(backend)
    encoded = backend.encode("中国人")
    assert (encoded.tokens, encoded.offsets) == (["▁", "中国", "人"], [(0, 1), (0, 2), (2, 3)])
    assert TextEncoder(tokenizer).encode(["中国人"]).ends.tolist() == [0, 6, 9]
    [example] = tokenize([[Segment("中", False), Segment("国人", True)]], TextEncoder(tokenizer))
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist()) == ["▁", "中", "国", "人"]
    assert example.loss_weights.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(
    scope="module",
    params=[lambda: metaspace("always"), lambda: metaspace("first"), like_llama_2, prefixed_byte_level],
    ids=["metaspace", "metaspace first", "llama 2", "byte level"],
)
def prefixing(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = request.param()
    return made


def test_a_text_gets_its_prefix_space_and_a_continuation_does_not(prefixing: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(prefixing)
    assert encoder._bytes_of is None
    first, rest = encoder.encode(["Hello"]), encoder.encode_continuations(["Hello"])
    words = [str(prefixing.convert_ids_to_tokens(tokens.ids.tolist())[0]) for tokens in (first, rest)]
    assert words[0][0] in "▁Ġ"
    assert words[1][0] == "H"
    assert (first.ends[-1], rest.ends[-1]) == (5, 5)


@pytest.mark.parametrize("text", ["world", " world", "Hello world.", "a b", "\nGood", "42 and 4", "  a"])
def test_the_ends_of_a_continuation_are_positions_in_it(text: str, prefixing: PreTrainedTokenizerFast) -> None:
    tokens = TextEncoder(prefixing).encode_continuations([text])
    assert tokens.ends[-1] == len(text)
    assert tokens.ends.tolist() == sorted(tokens.ends.tolist())
    whole = "".join(prefixing.convert_ids_to_tokens(tokens.ids.tolist()))
    assert whole.translate({ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "\n"}).replace("<0x0A>", "\n") == text


def test_continuations_keep_their_order(prefixing: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(prefixing)
    texts = ["Hello", "world", "a b", "\nGood", " are"]
    for text, tokens in zip(texts, split(encoder.encode_continuations(texts)), strict=True):
        assert tokens.ids.tolist() == encoder.encode_continuations([text]).ids.tolist()
    assert len(encoder.encode_continuations([]).ids) == 0


def test_a_text_that_cannot_be_tokenized_as_a_continuation_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="cannot tokenize 'zz' after another text"):
        TextEncoder(wrapped(backend)).encode_continuations(["zz"])


def test_no_texts_give_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [len(column) for column in TextEncoder(tokenizer).encode([])] == [0, 0, 0, 0]


def test_the_copy_without_a_normalizer_has_the_same_ids_of_added_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    own = changed(tokenizer, normalizer=normalizers.NFC())
    own.add_tokens([AddedToken("<added>", normalized=True), AddedToken("<raw>", normalized=False, lstrip=True)])
    texts = ["x<added>y", "x  <raw> y", "<s>é<added></s>", "e\u0301<added>"]
    encoder = TextEncoder(own)
    check_same(encoder.encode(texts), by_offsets(encoder, texts), texts)


def test_added_tokens_with_gaps_between_their_ids_keep_them(tokenizer: PreTrainedTokenizerFast) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    highest = max(state["model"]["vocab"].values())
    state["added_tokens"].append({**state["added_tokens"][-1], "id": highest + 100, "content": "<far>"})
    backend = Tokenizer.from_str(json.dumps(state))
    fast = without_normalizer(backend)
    assert fast.get_added_tokens_decoder() == backend.get_added_tokens_decoder()
    assert fast.encode("a<far>", add_special_tokens=False).ids == backend.encode("a<far>", add_special_tokens=False).ids
    assert fast.normalizer is None
