"""What a template and a tokenizer make of the first conversations of a source, checked before training.

The masks are exact by construction; this proves on the user's own data that nothing around them is broken: the BOS, the
stop tokens, and that what is served is what is trained, token for token.
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
    """Check what becomes of conversations: some 32 of each source are enough, at about a millisecond each.

    Args:
        template: The source's template, bound to `tokenizer`.
        tokenizer: What serves.
        encoder: The same tokenizer as examples are made with.
        conversations: Where each one stands (`data/chat.jsonl, line 12`), and its messages.
        loss_on: Which messages are supervised.

    Raises:
        UserError: If an example has no supervised token though a message is to be learned; if its BOS is there twice or
            is no special token; if a supervised answer does not end with its stop token, supervised; or if a prompt as
            it is served is not, token for token, what precedes the answer in training.
        RuntimeError: If a template renders for serving something else than for training, which is our mistake.
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
        self._bos = self._opening()

    def check(self, messages: Sequence[Message]) -> None:
        rendered = self._template.render(messages, self._loss_on)
        flags = supervision(messages, self._loss_on)
        examples = [_Example(segments, self._encoder) for segments in rendered]
        for example in examples:
            self._check_bos(example)
        if any(flag and message.weight > 0 for flag, message in zip(flags, messages, strict=True)) and not any(
            example.owners for example in examples
        ):
            raise UserError("no token of it is supervised, though a message is to be learned")
        answers = [i for i, message in enumerate(messages) if flags[i] and message.role == "assistant"]
        self._check_stops(examples, len(answers))
        if not isinstance(self._template, DocumentTemplate):
            for turn in sorted({*answers[:1], *answers[-1:]} - {0}):
                check_serving(self._template, self._tokenizer, messages[:turn])
                self._check_prompt(examples, self._template.generation_prompt(messages[:turn]))

    def _opening(self) -> list[int]:
        """Return the ids of what the template's name says stands first; none where nothing has to."""
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
                f"data.template: {template.name} begins with {text!r}, which is no special token of this tokenizer "
                f"({tokenizer.convert_ids_to_tokens(ids)}); use chat_template, or a template of the model's own family"
            )
        return ids

    def _check_bos(self, example: _Example) -> None:
        bos = self._tokenizer.bos_token_id
        if example.ids[: len(self._bos)] != self._bos:
            raise UserError(f"it does not begin with the BOS of template {self._template.name}: {example.text[:40]!r}")
        if bos is not None and example.ids[:2] == [bos, bos]:
            raise UserError(
                f"it begins with two BOS tokens: {example.text[:40]!r}; template {self._template.name} writes one, so "
                "take the other out of the template, or out of the text"
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
                        f"the answer {segment.text[-40:]!r} does not end with its stop token, but with the tokens "
                        f"{self._tokenizer.convert_ids_to_tokens(tokens[-3:])}; the tokenizer joins it with its text"
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
                continue  # a cut at an earlier answer's border, which serving does not make in the history
            raise UserError(
                f"the prompt {prompt[-40:]!r} is served as other tokens than it is trained as: "
                f"{self._tokenizer.convert_ids_to_tokens(served)[-5:]} against "
                f"{self._tokenizer.convert_ids_to_tokens(example.ids[: len(served)])[-5:]}; use a template whose "
                "prompt ends with a special token or a line feed"
            )


class _Example:
    """A tokenized example whose tokens know their segment: the weights that are tokenized along are segment numbers."""

    def __init__(self, segments: Sequence[Segment], encoder: Encoder) -> None:
        self.segments = segments
        self.text = "".join(segment.text for segment in segments)
        numbered = [segment._replace(weight=float(n + 1)) for n, segment in enumerate(segments)]
        [example] = tokenize([numbered], encoder)
        self.ids: list[int] = example.input_ids.tolist()
        self._numbers = [int(number) - 1 for number in example.loss_weights.tolist()]
        self.owners = {n for n in self._numbers if n >= 0 and segments[n].weight > 0}
        """The segments that have supervised tokens."""

    def supervised(self) -> Iterator[int]:
        """Yield the ids of supervised tokens."""
        return (index for index, n in zip(self.ids, self._numbers, strict=True) if n >= 0)

    def tokens_of(self, segment: int) -> list[int]:
        """Return the ids of a supervised segment."""
        return [index for index, n in zip(self.ids, self._numbers, strict=True) if n == segment]

    def borders_before(self, prompt: str) -> int | None:
        """Return how many supervised segments precede the one right after `prompt`; `None` if there is none there."""
        if not self.text.startswith(prompt):
            return None
        position = num_supervised = 0
        for segment in self.segments:
            if segment.supervised and position == len(prompt) and position > 0:
                return num_supervised
            num_supervised += segment.supervised
            position += len(segment.text)
        return None
