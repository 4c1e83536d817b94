from __future__ import annotations

from sft_lightning.views.highlight import ShownToken
from sft_lightning.views.marked_text import around_the_first_answer, marked_text

BOS = ShownToken(0, 1, "<s>", "<s>", 0.0, special=True)
QUESTION = ShownToken(1, 7, "Hot", "Hot?\n", 0.0, special=False)
ANSWER = ShownToken(2, 8, "Cold", " Cold", 1.0, special=False)
STOP = ShownToken(3, 2, "</s>", "</s>", 1.0, special=True)


def styles(tokens: list[ShownToken], *, colours: bool) -> dict[str, str]:
    """Return the style of each piece of the text."""
    text = marked_text(tokens, colours=colours)
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_supervised_tokens_are_green_and_special_ones_reversed() -> None:
    assert styles([BOS, QUESTION, ANSWER, STOP], colours=True) == {
        "<s>": "dim reverse", "Hot?↵\n": "dim", " Cold": "bold green", "</s>": "bold green reverse",
    }  # fmt: skip


def test_without_colours_supervised_text_is_framed() -> None:
    text = marked_text([BOS, QUESTION, ANSWER, STOP, QUESTION], colours=False)
    assert text.plain == "<s>Hot?↵\n⟦ Cold</s>⟧Hot?↵\n"


def test_a_loss_weight_other_than_one_is_written_before_its_tokens() -> None:
    half = [ANSWER._replace(weight=0.5), STOP._replace(weight=0.5)]
    assert marked_text([BOS, *half, STOP], colours=False).plain == "<s>×0.5 ⟦ Cold</s>⟧⟦</s>⟧"
    assert styles([*half], colours=True)["×0.5 "] == "yellow"


def test_tokens_around_the_first_supervised_one_are_selected() -> None:
    tokens = [ShownToken(i, i, str(i), str(i), float(i >= 60), special=False) for i in range(100)]
    assert [token.position for token in around_the_first_answer(tokens, 10)] == list(range(55, 65))


def test_the_selection_stays_within_the_example() -> None:
    tokens = [ShownToken(i, i, str(i), str(i), float(i == 9), special=False) for i in range(10)]
    assert [token.position for token in around_the_first_answer(tokens, 4)] == [6, 7, 8, 9]
    assert around_the_first_answer(tokens, 20) == tokens
    without = [token._replace(weight=0.0) for token in tokens]
    assert [token.position for token in around_the_first_answer(without, 3)] == [0, 1, 2]
