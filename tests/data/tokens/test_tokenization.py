from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.named import named_template
from sft_lightning.data.templates.template import SpecialTokens
from sft_lightning.data.tokens.fast_encoder import TextEncoder
from sft_lightning.data.tokens.tokenization import tokenize
from sft_lightning.types import Message, Segment, TokenizedExample


def supervised_text(tokenizer: PreTrainedTokenizerFast, example: TokenizedExample) -> str:
    ids = example.input_ids[example.loss_weights > 0]
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def example_of(tokenizer: PreTrainedTokenizerFast, segments: Sequence[Segment]) -> TokenizedExample:
    [example] = tokenize([segments], TextEncoder(tokenizer))
    return example


def test_ids_are_those_of_the_whole_text(tokenizer: PreTrainedTokenizerFast) -> None:
    segments = [Segment("<s>What is hot? ", False), Segment("The opposite of cold.</s>", True)]
    whole = tokenizer("<s>What is hot? The opposite of cold.</s>", add_special_tokens=False).input_ids
    assert example_of(tokenizer, [segments[0], segments[1]._replace(supervised=False)]).input_ids.tolist() == whole


def test_supervised_tokens_are_the_answer_and_its_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    template = named_template("vicuna_v1.1", SpecialTokens("<s>", "</s>"))
    turns = [
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "See you"),
    ]
    example = example_of(tokenizer, template.render(turns, "assistant")[0])
    assert supervised_text(tokenizer, example) == " Hello</s> See you</s>"


def test_each_token_has_the_weight_of_its_segment(tokenizer: PreTrainedTokenizerFast) -> None:
    example = example_of(tokenizer, [Segment("a b c", True, 0.5), Segment(" d e f</s>", True, 2.0)])
    halves = len(tokenizer("a b c", add_special_tokens=False).input_ids)
    assert example.loss_weights.tolist() == [0.5] * halves + [2.0] * (len(example.input_ids) - halves)


def test_a_token_that_would_cross_a_border_is_cut_there() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, ".": 4}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("c", "isolated")
    encode = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    [example] = tokenize([[Segment("ca", False), Segment("bc", True)]], encode)
    assert example.input_ids.tolist() == [3, 0, 1, 3]
    assert example.loss_weights.tolist() == [0, 0, 1, 1]


def test_the_prompt_of_a_cut_example_is_tokenized_as_serving_tokenizes_it(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, answer = "### Response:", ":) is a smile.</s>"
    example = example_of(tokenizer, [Segment(prompt, False), Segment(answer, True)])
    served = tokenizer(prompt, add_special_tokens=False).input_ids
    assert example.input_ids[: len(served)].tolist() == served
    assert supervised_text(tokenizer, example) == answer


def test_an_empty_segment_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = example_of(tokenizer, [Segment("a", False), Segment("b</s>", True)])
    with_empty = example_of(
        tokenizer, [Segment("a", False), Segment("", True), Segment("", False), Segment("b</s>", True)]
    )
    assert np.array_equal(plain.input_ids, with_empty.input_ids)
    assert np.array_equal(plain.loss_weights, with_empty.loss_weights)


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=70, deadline=None)
@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=6))
def test_the_supervised_tokens_of_any_text_decode_to_the_supervised_text(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast
) -> None:
    segments = [Segment(text, supervised) for text, supervised in pieces]
    example = example_of(tokenizer, segments)
    expected = "".join(segment.text for segment in segments if segment.supervised)
    assert supervised_text(tokenizer, example) == expected
    assert tokenizer.decode(example.input_ids.tolist(), clean_up_tokenization_spaces=False) == "".join(
        segment.text for segment in segments
    )


@pytest.mark.parametrize("folder", ["model/stories260K", "tokenizer/qwen2.5", "tokenizer/oasst-test"])
def test_real_tokenizers_supervise_exactly_the_answers(folder: str, real_data: object) -> None:
    from sft_lightning.tokenizer import load_tokenizer

    real = load_tokenizer(f"{real_data}/{folder}")
    answers = ["Yes.", "你好, 世界!", " two  spaces ", "\n\nlines\n", "🙂🙃"]
    for answer in answers:
        segments = [Segment("Question? ASSISTANT:", False), Segment(answer, True), Segment(f"{real.eos_token}", True)]
        example = example_of(real, segments)
        assert supervised_text(real, example).strip() == f"{answer}{real.eos_token}".strip()


def test_an_example_in_a_batch_has_the_tokens_that_it_has_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [
        [Segment("ab", False), Segment("cd", True)],
        [Segment("### Response:", False), Segment(":)</s>", True)],
        [Segment("", True)],
        [Segment("é日本", True, 0.5), Segment("🙂", False)],
    ]
    together = tokenize(examples, TextEncoder(tokenizer))
    assert len(together) == len(examples)
    for segments, example in zip(examples, together, strict=True):
        alone = example_of(tokenizer, segments)
        assert np.array_equal(alone.input_ids, example.input_ids)
        assert np.array_equal(alone.loss_weights, example.loss_weights)


def test_no_examples_give_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert list(tokenize([], TextEncoder(tokenizer))) == []


def letters(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the letters a to f, merged as told."""
    words = [*"abcdef.", *("".join(pair) for pair in merges)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    )


def test_a_cut_that_moves_a_token_across_another_border_is_followed_by_another_cut() -> None:
    # "abcd" is ab|cd. Cut at 1, b and c merge across the border at 2 and are cut there too.
    cutting = letters(("a", "b"), ("b", "c"), ("c", "d"))
    example = example_of(cutting, [Segment("a", False), Segment("b", True), Segment("cd", False), Segment("e", True)])
    assert cutting.convert_ids_to_tokens(example.input_ids.tolist()) == ["a", "b", "cd", "e"]
    assert example.loss_weights.tolist() == [0, 1, 0, 1]


def test_borders_between_segments_of_one_weight_cut_nothing() -> None:
    merging = letters(("a", "b"))
    example = example_of(merging, [Segment("a", True), Segment("b", True)])
    assert merging.convert_ids_to_tokens(example.input_ids.tolist()) == ["ab"]


def test_a_border_between_two_weights_is_cut_too() -> None:
    merging = letters(("a", "b"))
    example = example_of(merging, [Segment("a", True, 1.0), Segment("b", True, 0.5)])
    assert example.loss_weights.tolist() == [1.0, 0.5]


@settings(max_examples=70, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text("abcdef", max_size=6), st.booleans()), min_size=1, max_size=8),
    merges=st.lists(st.sampled_from([("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("ab", "c"), ("cd", "e")])),
)
def test_no_token_crosses_a_border_whatever_the_tokenizer_merges(
    pieces: list[tuple[str, bool]], merges: list[tuple[str, str]]
) -> None:
    known = [pair for pair in dict.fromkeys(merges) if len(pair[0]) == 1]
    known += [pair for pair in dict.fromkeys(merges) if (pair[0][0], pair[0][1:]) in known]
    merging = letters(*known)
    example = example_of(merging, [Segment(text, supervised) for text, supervised in pieces])
    tokens = merging.convert_ids_to_tokens(example.input_ids.tolist())
    weights = [weight for token, weight in zip(tokens, example.loss_weights.tolist(), strict=True) for _ in token]
    assert "".join(tokens) == "".join(text for text, _ in pieces)
    assert weights == [float(supervised) for text, supervised in pieces for _ in text]
