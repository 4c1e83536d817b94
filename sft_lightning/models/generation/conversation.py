"""A conversation with a served model: its history, its commands, and what fits into the model's context."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.generation.streamers import TextStreamer

from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import Answer, ServedModel
from sft_lightning.terminal import printable

HELP = "/reset forgets the conversation, /system TEXT sets the system message and forgets, /quit ends"


class Conversation:
    """What was said so far.

    A model without a chat template goes on with plain text: `Human: … Assistant:`.

    Args:
        served: The model.
        config: How it answers.
        system: System message.
    """

    def __init__(self, served: ServedModel, config: GenerationConfig, system: str | None = None) -> None:
        self._served = served
        self._config = config
        self.system = system
        self.turns: list[dict[str, str]] = []
        """Without the system message."""

    def ask(self, prompt: str, streamer: TextStreamer | None = None) -> tuple[Answer, int]:
        """Return the answer to a prompt, and how many of the oldest turns were left out for it to fit.

        Raises:
            UserError: If the prompt alone does not fit, or the chat template refuses the conversation; the
                conversation is then as before.
        """
        asked = [*self.turns, {"role": "user", "content": prompt}]
        ids, left_out = self._fitting(asked)
        [[answer]] = self._served.answer([ids], self._config, streamer=streamer)
        self.turns = [*asked[left_out:], {"role": "assistant", "content": answer.text}]
        return answer, left_out

    def command(self, line: str) -> str | None:
        """Obey /reset and /system, and return what to tell the user; `None` if the line is none of these."""
        name, _, rest = line.strip().partition(" ")
        if name == "/reset":
            self.turns = []
            return "the conversation is forgotten"
        if name == "/system":
            self.system, self.turns = rest.strip() or None, []
            return "no system message" if self.system is None else f"system: {self.system}"
        return None

    def _fitting(self, asked: Sequence[dict[str, str]]) -> tuple[list[int], int]:
        """Return the tokens of as many of the latest rounds as leave room for an answer, and how many turns are not."""
        limit = self._served.context_length
        for left_out in range(0, len(asked), 2):
            ids = self._encode(asked[left_out:])
            if limit is None or len(ids) + self._config.max_new_tokens <= limit:
                return ids, left_out
        raise UserError(
            f"the prompt has {len(ids)} tokens and the answer may have {self._config.max_new_tokens}, more than the "
            f"{limit} that the model was made for; shorten it, or lower --max_new_tokens"
        )

    def _encode(self, turns: Sequence[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self._served.has_template:
            return self._served.encode_messages([*system, *turns])
        names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
        said = " ".join(names[turn["role"]] + turn["content"] for turn in [*system, *turns])
        return self._served.encode_text(f"{said} Assistant:")


class AnswerStreamer(TextStreamer):
    """Prints an answer as it comes, without its stop token.

    Args:
        served: The model that answers.
    """

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stops = set(served.stop_token_ids)

    def put(self, value: object) -> None:
        """Take the next token; the first call brings the prompt."""
        ids = getattr(value, "flatten", lambda: value)().tolist()  # type: ignore[union-attr]
        if self.next_tokens_are_prompt or not self._stops & set(ids):
            super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a finished piece."""
        print(printable(text), end="\n" if stream_end else "", flush=True)
