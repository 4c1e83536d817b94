"""A conversation with a served model: history, commands, and truncation to the model's context."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.generation.streamers import TextStreamer

from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import Answer, ServedModel
from sft_lightning.terminal import printable

HELP = "/reset clears the conversation, /system TEXT sets the system message and clears the conversation, /quit exits"


class Conversation:
    """The messages of a conversation so far.

    A model without a chat template continues plain text: `Human: … Assistant:`.

    Args:
        served: The model.
        config: How it generates.
        system: System message; `None` for none.
    """

    def __init__(self, served: ServedModel, config: GenerationConfig, system: str | None = None) -> None:
        self._served = served
        self._config = config
        self.system = system
        self.messages: list[dict[str, str]] = []
        """The messages, without the system message."""

    def ask(self, prompt: str, streamer: TextStreamer | None = None) -> tuple[Answer, int]:
        """Answer a prompt, and add both to the conversation.

        Args:
            prompt: The user's message.
            streamer: Receives the answer's tokens as they are generated.

        Returns:
            The answer, and how many of the oldest messages were left out to fit the context.

        Raises:
            UserError: If the prompt alone does not fit, or the chat template rejects the conversation; the
                conversation does not change then.
        """
        asked = [*self.messages, {"role": "user", "content": prompt}]
        ids, left_out = self._fitting(asked)
        [[answer]] = self._served.answer([ids], self._config, streamer=streamer)
        self.messages = [*asked[left_out:], {"role": "assistant", "content": answer.text}]
        return answer, left_out

    def command(self, line: str) -> str | None:
        """Run /reset or /system, and return a message for the user; `None` if the line is another one."""
        name, _, rest = line.strip().partition(" ")
        if name == "/reset":
            self.messages = []
            return "conversation cleared"
        if name == "/system":
            self.system, self.messages = rest.strip() or None, []
            return "no system message" if self.system is None else f"system: {self.system}"
        return None

    def _fitting(self, asked: Sequence[dict[str, str]]) -> tuple[list[int], int]:
        """Return the tokens of the latest messages that leave room for an answer, and how many were left out."""
        limit = self._served.context_length
        for left_out in range(0, len(asked), 2):
            ids = self._encode(asked[left_out:])
            if limit is None or len(ids) + self._config.max_new_tokens <= limit:
                return ids, left_out
        raise UserError(
            f"the prompt has {len(ids)} tokens and the answer may have {self._config.max_new_tokens}, together more "
            f"than the model's context of {limit}; shorten the prompt, or lower --max_new_tokens"
        )

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if self._served.has_template:
            return self._served.encode_messages([*system, *messages])
        names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
        said = " ".join(names[message["role"]] + message["content"] for message in [*system, *messages])
        return self._served.encode_text(f"{said} Assistant:")


class AnswerStreamer(TextStreamer):
    """Prints an answer while it is generated, without its stop token.

    Args:
        served: The model that answers.
    """

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stops = set(served.stop_token_ids)

    def put(self, value: object) -> None:
        """Receive the next token; the first call has the prompt."""
        ids = getattr(value, "flatten", lambda: value)().tolist()  # type: ignore[union-attr]
        if self.next_tokens_are_prompt or not self._stops & set(ids):
            super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text that is complete."""
        print(printable(text), end="\n" if stream_end else "", flush=True)
