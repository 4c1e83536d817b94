"""Record → which of its tokens should have a loss, found in another way than training finds it.

Training asks the template for segments, each supervised or not. Here, the template renders the conversation again with
a marker in the place of each content. The text between the markers is what the template writes itself; the contents
stand between those texts, wherever the same words may occur elsewhere. An answer reaches from the end of its
generation prompt to its stop token. Tokens are assigned to characters by the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.jinja import JinjaTemplate
from sft_lightning.data.templates.named import NamedTemplate
from sft_lightning.data.templates.template import Template
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message

Weights = npt.NDArray[np.float64]
"""Loss weights; NaN where this module cannot know."""

_MARKER = re.compile(r"Qz(\d+)(m|c)zQ")


class ExpectedMask(NamedTuple):
    """The tokens of a rendered conversation, and the loss weight that each should have."""

    ids: list[int]
    """Token ids, L of them: the whole text tokenized at once."""

    weights: Weights
    """Loss weight of each token, (L,); NaN where it is not known."""


class ContentSpan(NamedTuple):
    """Where a message's content stands in the rendered text."""

    message: int
    """Index of the message."""

    start: int
    """Its first character."""

    end: int
    """The character after its last one."""


class Contents(NamedTuple):
    """Where the contents stand in a rendered text."""

    spans: list[ContentSpan]
    """Those that were found, in order."""

    num_messages: int
    """Messages that the text is rendered from: all, or the first ones up to an answer."""

    def gaps(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of each part of the text that has messages whose content was not found.

        Args:
            length: Characters of the text.
        """
        messages = [-1, *(span.message for span in self.spans), self.num_messages]
        bounds = [0, *(bound for span in self.spans for bound in (span.start, span.end)), length]
        for n, (before, after) in enumerate(pairwise(messages)):
            if after > before + 1:
                yield bounds[2 * n], bounds[2 * n + 1]


def expected_mask(
    text: str,
    messages: Sequence[Message],
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    loss_on: LossOn,
    *,
    rewritten: bool = False,
) -> ExpectedMask | None:
    """Return the tokens of a rendered conversation with the loss weights that they should have.

    Args:
        text: What the template rendered.
        messages: The conversation.
        template: The template.
        tokenizer: The run's tokenizer.
        loss_on: Which messages are supervised.
        rewritten: Whether the conversation has several texts, each with some of the answers supervised.

    Returns:
        The tokens; `None` if the contents cannot be found in the text.
    """
    contents = find_contents(text, messages, template)
    if contents is None:
        return None
    of_characters = _weights_of_text(text, messages, contents, template, loss_on, rewritten=rewritten)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return ExpectedMask(encoded["input_ids"], _weights_of_tokens(of_characters, encoded["offset_mapping"]))


def find_contents(text: str, messages: Sequence[Message], template: Template) -> Contents | None:
    """Return where the contents stand in a rendered conversation, in order; `None` if they cannot be found.

    Empty contents get a marker, too, unless the template writes something else where there is a content.

    Args:
        text: What the template rendered of all messages, or of the first ones up to an answer.
        messages: The conversation.
        template: The template.
    """
    empty = {n for n, message in enumerate(messages) if not message.content}
    for unmarked in (set[int](), empty) if empty else (empty,):
        marked = [
            replace(
                message,
                content="" if n in unmarked else f"Qz{n}mzQ",
                context=None if message.context is None else f"Qz{n}czQ",
            )
            for n, message in enumerate(messages)
        ]
        for count in range(len(messages), 0, -1):
            try:
                rendered = _text_of(template, marked[:count])
            except UserError:  # a template may refuse a conversation that ends here, or that has other contents
                continue
            spans = _align(text, rendered, messages)
            if spans is not None:
                return Contents(spans, count)
    return None


def _text_of(template: Template, messages: Sequence[Message]) -> str:
    if isinstance(template, JinjaTemplate):
        return template.apply(template.chat(messages), False, messages[0].tools)
    return "".join(segment.text for segment in template.render(messages, "last_turn")[0])


def _align(text: str, marked: str, messages: Sequence[Message]) -> list[ContentSpan] | None:
    """Return where the markers of a rendered text are in another one, which may end within the text after the last."""
    found = list(_MARKER.finditer(marked))
    bounds = [0, *(bound for match in found for bound in match.span()), len(marked)]
    between = [marked[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    if not text.startswith(between[0]):
        return None
    position, spans = len(between[0]), []
    for match, after in zip(found, between[1:], strict=True):
        message = messages[int(match[1])]
        content = message.content if match[2] == "m" else message.context or ""
        rest = text[position:]
        forms = (content, content.rstrip(), content.lstrip(), content.strip())
        is_last = match is found[-1]
        fits = (form for form in forms if rest.startswith(form) and _continues(rest[len(form) :], after, is_last))
        form = next(fits, None)
        if form is None:
            return None
        spans.append(ContentSpan(int(match[1]), position, position + len(form)))
        position += len(form) + len(after)
    return spans


def _continues(rest: str, after: str, is_last: bool) -> bool:
    return bool(rest or not after) and after.startswith(rest) if is_last else rest.startswith(after)


def _weights_of_text(
    text: str,
    messages: Sequence[Message],
    contents: Contents,
    template: Template,
    loss_on: LossOn,
    *,
    rewritten: bool,
) -> Weights:
    """Return the loss weight that each character should have, (characters,)."""
    spans, wanted = contents.spans, wanted_weights(messages, loss_on)
    by_role = all(message.train is None and message.weight == 1.0 for message in messages)
    weights = np.full(len(text), 0.0 if loss_on != "all" else 1.0 if by_role else np.nan)
    if isinstance(template, NamedTemplate):
        weights[: len(template.bos)] = 0.0  # of several tokens in ChatGLM's templates
    for start, end in contents.gaps(len(text)):
        weights[start:end] = np.nan
    last = spans[-1].message if spans else len(messages) - 1
    for n, span in enumerate(spans):
        message, weight = messages[span.message], wanted[span.message]
        before = spans[n - 1].end if n else 0
        after = spans[n + 1].start if n + 1 < len(spans) else len(text)
        if rewritten and weight and message.role == "assistant" and span.message != last:
            weights[before:after] = np.nan  # supervised here, or in a text of its own
        elif weight and loss_on != "all" and message.role == "assistant":
            first, stop = _answer(text, messages[: span.message], span, template, (before, after))
            weights[before if first is None else first : after if stop is None else stop] = np.nan
            if first is not None and stop is not None:
                weights[first:stop] = weight
        elif weight and message.role != "text" and loss_on != "all":
            weights[before:after] = np.nan  # the template decides what of its own text belongs to the message
        weights[span.start : span.end] = weight if not (rewritten and weight and span.message != last) else np.nan
        after_system = n > 0 and message.role == "user" and messages[spans[n - 1].message].role == "system"
        if after_system and (not by_role if loss_on == "all" else weight):
            weights[: spans[n - 1].end] = np.nan  # some templates write it into the user's message
        if weight and message.role == "text" and n + 1 == len(spans):
            weights[span.end :] = weight  # the EOS
    return weights


def wanted_weights(messages: Sequence[Message], loss_on: LossOn) -> list[float]:
    """Return the loss weight that each message should have: 0 for one that is not supervised.

    Args:
        messages: The conversation, or the pieces of a document.
        loss_on: Which messages are supervised.
    """
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if loss_on == "all":
        chosen = set(range(len(messages)))
    elif answers:
        chosen = {answers[-1]} if loss_on == "last_turn" else set(answers)
    else:  # a document, or a completion after its prompt
        chosen = {len(messages) - 1} if messages[-1].role == "text" else set()
    trains = [n in chosen if message.train is None else message.train for n, message in enumerate(messages)]
    return [message.weight if train else 0.0 for message, train in zip(messages, trains, strict=True)]


def _answer(
    text: str, before: Sequence[Message], span: ContentSpan, template: Template, bounds: tuple[int, int]
) -> tuple[int | None, int | None]:
    """Return the first character that the model writes of an answer, and the one after its stop token.

    Args:
        text: The rendered conversation.
        before: The messages before the answer.
        span: Where its content stands.
        template: The template.
        bounds: Where the content before it ends, and the one after it starts.

    Returns:
        Both; `None` for one that is not found.
    """
    prompt = template.generation_prompt(before) if before else ""
    start = len(prompt) if before and text.startswith(prompt) and bounds[0] <= len(prompt) <= span.start else None
    ends = [text.find(stop, span.end, bounds[1]) + len(stop) for stop in template.stops if stop]
    ends = [
        end for stop, end in zip([s for s in template.stops if s], ends, strict=True) if end >= span.end + len(stop)
    ]
    return start, min(ends, default=None)


def _weights_of_tokens(of_characters: Weights, offsets: Sequence[tuple[int, int]]) -> Weights:
    """Return the loss weight of each token: that of its characters if they agree, else NaN.

    Args:
        of_characters: Loss weight of each character.
        offsets: Where each token starts and ends in the text, in characters. Its start is not used: some tokenizers
            leave out leading spaces, so a token starts where the one before it ended.
    """
    weights = np.full(len(offsets), np.nan)
    position = 0
    for n, (start, end) in enumerate(offsets):
        if end > position:
            own = of_characters[position:end]
        elif start < end:
            own = of_characters[end - 1 : end]  # one of several tokens that are a character together
        else:
            continue  # a token without characters
        position = max(position, end)
        if len(own) and (own == own[0]).all():
            weights[n] = own[0]
    return weights
