"""Checks of the first conversations of a source, with the run's template and tokenizer, before training.

The masks are exact by construction. These checks verify on the user's data what the masks rely on: the BOS, the stop
tokens, and that prompts are served as they are trained, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import check_serving, stop_token_id
from sft_lightning.data.templates.named import NamedTemplate
from sft_lightning.data.templates.template import DocumentTemplate, Template, supervision
from sft_lightning.data.tokens.tokenization import Encoder, tokenize
from sft_lightning.errors import UserError
from sft_lightning.types import LossOn, Message, Segment


def check_examples(
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    encoder: Encoder,
    conversations: Sequence[tuple[str, Sequence[Message]]],
    loss_on: LossOn,
) -> None:
    """Check the examples of conversations; about 32 conversations of each source are enough, at a millisecond each.

    Args:
        template: The source's template, bound to `tokenizer`.
        tokenizer: The tokenizer as it serves.
        encoder: The same tokenizer as it makes examples.
        conversations: Location (`data/chat.jsonl, line 12`) and messages of each conversation.
        loss_on: Which messages are supervised.

    Raises:
        UserError: If an example has no supervised token although a message should be learned; if its BOS is missing,
            doubled, or not a special token; if a supervised answer does not end with its stop token; or if a prompt is
            served as other tokens than it is trained as.
        RuntimeError: If a template renders a prompt for serving differently than for training, which is a bug of this
            package.
    """
    checks = _Checks(template, tokenizer, encoder, loss_on)
    for location, messages in conversations:
        try:
            checks.check(messages)
        except UserError as error:
            raise UserError(f"{location}: {error}") from error


class _Checks:
    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, loss_on: LossOn
    ) -> None:
        self._template, self._tokenizer, self._encoder, self._loss_on = template, tokenizer, encoder, loss_on
        first, *others = template.stops
        self._stops = {first: stop_token_id(template, tokenizer)}
        ids_of = tokenizer.get_added_vocab()
        self._stops |= {stop: ids_of[stop] for stop in others}
        self._bos = self._expected_bos()

    def check(self, messages: Sequence[Message]) -> None:
        rendered = self._template.render(messages, self._loss_on)
        flags = supervision(messages, self._loss_on)
        examples = [_Example(segments, self._encoder) for segments in rendered]
        for example in examples:
            self._check_bos(example)
        if any(flag and message.weight > 0 for flag, message in zip(flags, messages, strict=True)) and not any(
            example.learned for example in examples
        ):
            raise UserError("no token of the example is supervised, although a message should be learned")
        answers = [i for i, message in enumerate(messages) if flags[i] and message.role == "assistant"]
        self._check_stops(examples, len(answers))
        if not isinstance(self._template, DocumentTemplate):
            for index in sorted({*answers[:1], *answers[-1:]} - {0}):
                check_serving(self._template, self._tokenizer, messages[:index])
                self._check_prompt(examples, self._template.generation_prompt(messages[:index]))

    def _expected_bos(self) -> list[int]:
        """Return the ids with which every example of a named or document template must begin; empty for Jinja."""
        template, tokenizer = self._template, self._tokenizer
        if isinstance(template, NamedTemplate):
            text = template.bos
        elif isinstance(template, DocumentTemplate):
            text = template.tokens.bos
        else:
            return []
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
        if any(index not in tokenizer.added_tokens_decoder for index in ids):
            raise UserError(
                f"data.template: {template.name} begins with {text!r}, which is not a special token of this tokenizer "
                f"({tokenizer.convert_ids_to_tokens(ids)}); use chat_template, or a template of the model's family"
            )
        return ids

    def _check_bos(self, example: _Example) -> None:
        bos = self._tokenizer.bos_token_id
        if example.ids[: len(self._bos)] != self._bos:
            raise UserError(
                f"the example does not begin with the BOS of template {self._template.name}: {example.text[:40]!r}"
            )
        if bos is not None and example.ids[:2] == [bos, bos]:
            raise UserError(
                f"the example begins with two BOS tokens: {example.text[:40]!r}; template {self._template.name} writes "
                "one, so remove the other from the template or from the text"
            )

    def _check_stops(self, examples: Sequence[_Example], num_answers: int) -> None:
        num_stops = 0
        for example in examples:
            num_stops += sum(index in self._stops.values() for index in example.supervised())
            for n, segment in enumerate(example.segments):
                expected = [index for stop, index in self._stops.items() if segment.text.endswith(stop)]
                tokens = example.tokens_of(n)
                if segment.supervised and expected and (not tokens or tokens[-1] not in expected):
                    raise UserError(
                        f"the answer {segment.text[-40:]!r} does not end with its stop token but with the tokens "
                        f"{self._tokenizer.convert_ids_to_tokens(tokens[-3:])}; the tokenizer merges it with the text"
                    )
        if num_stops < num_answers:
            raise UserError(
                f"template {self._template.name} ends {num_stops} of {num_answers} supervised answers with a stop "
                f"token ({', '.join(self._template.stops)}), so the model would not learn to stop; fix the template"
            )

    def _check_prompt(self, examples: Sequence[_Example], prompt: str) -> None:
        served: list[int] = self._tokenizer(prompt, add_special_tokens=False).input_ids
        for example in examples:
            num_before = example.borders_before(prompt)
            if num_before is None or example.ids[: len(served)] == served:
                continue
            if num_before > 0 and example.ids != self._encoder.encode([example.text]).ids.tolist():
                continue  # the text was cut before an earlier answer, which serving does not do in the history
            raise UserError(
                f"the prompt {prompt[-40:]!r} is served as the tokens "
                f"{self._tokenizer.convert_ids_to_tokens(served)[-5:]} but trained as "
                f"{self._tokenizer.convert_ids_to_tokens(example.ids[: len(served)])[-5:]}; use a template whose "
                "prompt ends with a special token or a line feed"
            )


class _Example:
    """A tokenized example with the segment of each token: the loss weights are replaced by segment numbers."""

    def __init__(self, segments: Sequence[Segment], encoder: Encoder) -> None:
        self.segments = segments
        self.text = "".join(segment.text for segment in segments)
        numbered = [segment._replace(weight=float(n + 1)) for n, segment in enumerate(segments)]
        [example] = tokenize([numbered], encoder)
        self.ids: list[int] = example.input_ids.tolist()
        self._numbers = [int(number) - 1 for number in example.loss_weights.tolist()]
        self.learned = {n for n in self._numbers if n >= 0 and segments[n].weight > 0}
        """Indices of the segments that have tokens with a loss."""

    def supervised(self) -> Iterator[int]:
        """Yield the ids of supervised tokens."""
        return (index for index, n in zip(self.ids, self._numbers, strict=True) if n >= 0)

    def tokens_of(self, segment: int) -> list[int]:
        """Return the ids of a supervised segment."""
        return [index for index, n in zip(self.ids, self._numbers, strict=True) if n == segment]

    def borders_before(self, prompt: str) -> int | None:
        """Return how many supervised segments precede the one after `prompt`; `None` if none begins there."""
        if not self.text.startswith(prompt):
            return None
        position = num_supervised = 0
        for segment in self.segments:
            if segment.supervised and position == len(prompt) and position > 0:
                return num_supervised
            num_supervised += segment.supervised
            position += len(segment.text)
        return None
