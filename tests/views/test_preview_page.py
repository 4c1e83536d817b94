from __future__ import annotations

import base64
import hashlib
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from sft_lightning.types import Message, Segment
from sft_lightning.views.highlight import ShownExample, ShownSource, ShownToken
from sft_lightning.views.preview_page import PreviewPage, render_page

ANSWER = ShownToken(1, 7, "Ġyes", " yes", 1.0, special=False)


def example(**changes: Any) -> ShownExample:
    shown = ShownExample(
        location="chat.jsonl, line 1",
        number=1,
        num_of_record=1,
        repairs=(),
        messages=[Message("user", "Well?"), Message("assistant", "yes")],
        segments=[Segment("<s>", False), Segment(" yes", True)],
        tokens=[ShownToken(0, 1, "<s>", "<s>", 0.0, special=True), ANSWER],
    )
    return replace(shown, **changes)


def render(*examples: ShownExample, dropped: tuple[str, ...] = (), **changes: Any) -> str:
    source = ShownSource("train/chat", "chat.jsonl", "messages", len(examples), examples, dropped)
    page = PreviewPage(
        template="alpaca", stop="</s>", loss_on="assistant", max_length=10, overlong="error", sources=[source]
    )
    return render_page(replace(page, **changes))


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "span" and attributes.get("title")]


def test_every_token_is_a_span_with_id_position_and_weight() -> None:
    tokens = Page(render(example())).tokens()
    assert [token["class"] for token in tokens] == ["t x", "t s"]
    assert tokens[1]["title"] == "id 7, position 1, weight 1, 'Ġyes'"


def test_the_page_has_the_totals_of_each_source() -> None:
    text = " ".join(Page(render(example(), example())).text.split())
    assert "train/chat messages" in text or "train/chatmessages" in text.replace(" ", "")
    assert "2 (50 %)" in text


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt; & {{ 7*7 }}"])
def test_nothing_from_the_data_becomes_markup(hostile: str) -> None:
    html = render(
        example(
            location=hostile,
            repairs=[hostile],
            messages=[Message("user", hostile, context=hostile, extras={hostile: hostile}, tools=({hostile: 1},))],
            segments=[Segment(hostile, False)],
            tokens=[ShownToken(0, 1, hostile, hostile, 1.0, special=False)],
        ),
        dropped=(hostile,),
        template=hostile,
        stop=hostile,
    )
    page, plain = Page(html), Page(render(example()))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"p", "span", "b"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(hostile) >= 8


def test_the_page_loads_nothing() -> None:
    page = Page(render(example()))
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(name in ("src", "srcset") for _, attributes in page.tags for name in attributes)
    assert all(str(attributes["href"]).startswith("#") for tag, attributes in page.tags if tag == "a")


@pytest.mark.parametrize("element", ["style", "script"])
def test_the_content_security_policy_has_the_hashes_of_style_and_script(element: str) -> None:
    html = render(example())
    inside = re.search(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    assert inside
    found = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
    [policy] = [str(a["content"]) for tag, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"{element}-src 'sha256-{found}'" in policy
    assert "default-src 'none'" in policy


def test_weights_other_than_one_are_shown_at_tokens_segments_and_messages() -> None:
    html = render(
        example(
            messages=[Message("assistant", "yes", weight=0.25)],
            segments=[Segment(" yes", True, 0.25)],
            tokens=[ANSWER._replace(weight=0.25), ANSWER._replace(weight=0.25)],
        )
    )
    assert html.count('<b class="weight">×0.25</b>') == 3  # once for the run of tokens


def test_right_to_left_text_and_emoji_are_not_changed() -> None:
    page = Page(render(example(segments=[Segment("مرحبا 👨‍👩‍👧", True)])))
    assert "مرحبا 👨‍👩‍👧" in page.text


def test_right_to_left_tokens_keep_their_position() -> None:
    tokens = [ANSWER._replace(text="مرحبا"), ANSWER._replace(text="?"), ANSWER._replace(text="שלום", weight=0.0)]
    assert [token["class"] for token in Page(render(example(tokens=tokens))).tokens()] == ["t s r", "t s", "t r"]


def test_an_empty_message_is_marked_as_empty() -> None:
    assert "<em>empty</em>" in render(example(messages=[Message("user", "")]))


def test_a_token_without_text_has_a_box() -> None:
    html = render(example(tokens=[ANSWER._replace(text="")]))
    assert "no text of its own" in html
    assert len(Page(html).tokens()) == 1


def test_a_line_feed_is_marked_and_breaks_the_line_after_its_token() -> None:
    html = render(example(tokens=[ANSWER._replace(text=".\n"), ANSWER]))
    assert ".<i>↵</i></span>\n<span" in html


@pytest.mark.parametrize(("overlong", "told"), [("drop", True), ("error", True), (None, False)])
def test_an_example_over_max_length_has_a_badge_unless_packing_cuts_it_anyway(overlong: str | None, told: bool) -> None:
    assert ("longer than max_length" in render(example(tokens=[ANSWER] * 11), overlong=overlong)) == told
    assert "longer than max_length" not in render(example(tokens=[ANSWER] * 10), overlong=overlong)


def test_repairs_rewritten_answers_and_dropped_records_have_a_badge() -> None:
    html = render(
        example(repairs=["empty_turn"], number=2, num_of_record=3), dropped=("no_answer: chat.jsonl, line 2",)
    )
    assert "repaired: empty_turn" in html
    assert "example 2 of 3" in html
    assert "no_answer: chat.jsonl, line 2" in html


def test_ten_thousand_tokens_are_rendered_fast() -> None:
    tokens = [ANSWER._replace(position=i) for i in range(10_000)]
    start = time.perf_counter()
    html = render(example(tokens=tokens))
    assert time.perf_counter() - start < 5  # 0.2 s on a quiet machine
    assert len(Page(html).tokens()) == 10_000
