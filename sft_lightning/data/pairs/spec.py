"""PairDataSpec: the keys under `data` with `task: dpo`, where an example is a pair of answers."""

from __future__ import annotations

from dataclasses import dataclass

from sft_lightning.data.pairs.examples import PairHistory
from sft_lightning.data.pairs.store import Shortening
from sft_lightning.data.spec import DataSpec, Task
from sft_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairDataSpec(DataSpec):
    """The data of a preference run: the keys under `data` with `task: dpo`.

    An example is a pair: `max_length`, packing, blends and reports count both conversations of it together. They share
    a row; with `packing: none` each has its own row in the same micro-batch.

    Raises:
        UserError: If a value is out of range, two keys contradict each other, or a key cannot be used with pairs.
    """

    task: Task = "dpo"
    """Set by the top-level `task`."""

    max_prompt_length: int | None = None
    """With `overlong: truncate`, tokens at the end of a prompt that are always kept. Long pairs are then shortened, as
    in Firefly, until each answer with its prompt has at most half of `max_length`."""

    pair_history: PairHistory = "own"
    """The messages before a rejected answer: `own` (its conversation must have the chosen one's prompt) or `chosen`
    (those of the chosen conversation, as in Firefly)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on == "all":
            raise UserError("data.loss_on: all, but task: dpo compares answers; use assistant or last_turn")
        if self.packing == "concat":
            raise UserError("data.packing: concat cuts examples, but a pair is compared whole; use best_fit or none")
        if self.streams:
            raise UserError(
                "data.sources: task: dpo plans its pairs before training, but streamed sources are read while "
                "training; remove `streaming`"
            )
        self._check_shortening()

    @property
    def shortening(self) -> Shortening | None:
        """How long pairs are shortened; `None`: not at all."""
        if self.max_prompt_length is None:
            return None
        return Shortening(self.max_length // 2, self.max_prompt_length)

    def _check_shortening(self) -> None:
        truncates = self.overlong == "truncate"
        if self.max_prompt_length is None:
            if truncates:
                raise UserError(
                    "data.overlong: truncate requires data.max_prompt_length with task: dpo, because the prompt of a "
                    "pair is cut first; set it to the tokens of the prompt to keep, or use drop"
                )
            return
        if not truncates:
            raise UserError(
                f"data.max_prompt_length: {self.max_prompt_length}, but data.overlong: {self.overlong} cuts nothing; "
                "set data.overlong: truncate, or remove max_prompt_length"
            )
        share = self.max_length // 2
        if not 1 <= self.max_prompt_length < share:
            raise UserError(
                f"data.max_prompt_length: must be at least 1 and below {share}, half of data.max_length "
                f"({self.max_length}), so that long answers keep some tokens (got {self.max_prompt_length})"
            )
