"""PreferenceObjective: a loss on pairs of answers, for `task: dpo`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from sft_lightning.data.pairs.collate import PairBatch
from sft_lightning.data.plan.split_reader import Split
from sft_lightning.training.objective import Objective, SourceMeans
from sft_lightning.training.preference.forward import AnswerLogProbs, answer_log_probs
from sft_lightning.training.preference.losses import PairScores, PreferenceConfig, score_pairs
from sft_lightning.training.preference.metrics import NAMES, PairMeans, pair_sums
from sft_lightning.training.preference.reference_log_probs import ReferenceLogProbs, pair_data_of
from sft_lightning.training.preference.sharing import shared_fraction, why_prompts_are_not_shared
from sft_lightning.training.step import StepShare

if TYPE_CHECKING:
    from sft_lightning.training.module import CausalLMModule


class PreferenceObjective(Objective):
    """The mean loss per pair of answers; the model learns to prefer the chosen one to the rejected one.

    Every pair has the same weight however the work is split: the loss of an optimizer step is the sum over its pairs
    divided by their weight, which the plan knows.

    Args:
        config: `model.preference`.
    """

    step_means = NAMES[1:]  # the loss itself is the module's

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config
        self.reference = ReferenceLogProbs(config)

    def on_model_loaded(self, module: CausalLMModule) -> None:
        """Decide where the reference's log-probabilities come from."""
        self.reference.choose(module)

    def on_fit_start(self, module: CausalLMModule) -> None:
        """Decide on prompt sharing, and compute the reference's log-probabilities if they are precomputed."""
        self._decide_prompt_sharing(module)
        self.reference.prepare(module)

    def on_evaluation_start(self, module: CausalLMModule) -> None:
        """Decide on prompt sharing."""
        self._decide_prompt_sharing(module)

    def _decide_prompt_sharing(self, module: CausalLMModule) -> None:
        """Decide on the loaded model whether a prompt is computed once for both of its answers."""
        data = pair_data_of(module)
        reason = why_prompts_are_not_shared(module, wanted=self.config.share_prompts)
        module.layout = replace(data.layout, share_prompts=reason is None)
        if reason is not None:
            rank_zero_info(f"prompt sharing: off ({reason})")
        elif "train" in data.reader.read:
            rank_zero_info(f"prompt sharing: on, {shared_fraction(data):.0%} fewer tokens to compute")

    def step_share(self, module: CausalLMModule, batch: PairBatch) -> StepShare:
        """Return a micro-batch's share of the optimizer step's mean loss per pair, a scalar.

        Args:
            module: The model.
            batch: P pairs.
        """
        answers, scores = self._score(module, batch, "train")
        weights, denominator = batch["pair_weights"], batch["denominator"] or 1.0
        loss = (scores.losses * weights).sum() / denominator
        if answers.router_loss is not None:  # each pair of the step carries its part of the routers' loss
            loss = loss + answers.router_loss * weights.sum() / denominator
        return StepShare(loss, (pair_sums(scores, answers.log_probs, weights) / denominator)[1:])

    def start_means(self, module: CausalLMModule, names: list[str]) -> SourceMeans:
        """Return loss, rewards and log-probabilities per pair.

        Args:
            module: The model.
            names: The sources that are evaluated.
        """
        self.reference.prepare(module)
        return SourceMeans(names, lambda: PairMeans().to(module.device))

    def update_means(
        self, module: CausalLMModule, means: SourceMeans, batch: PairBatch, split: Split, source: int
    ) -> None:
        """Add the sums over a micro-batch's pairs.

        Args:
            module: The model.
            means: From `start_means`.
            batch: P pairs of one source.
            split: What the source is evaluated for.
            source: Number of the source, from 0.
        """
        answers, scores = self._score(module, batch, split, source)
        weights = batch["pair_weights"]
        means.update(source, pair_sums(scores, answers.log_probs, weights), weights.sum())

    def _score(
        self, module: CausalLMModule, batch: PairBatch, split: Split, source: int = 0
    ) -> tuple[AnswerLogProbs, PairScores]:
        # The reference first, while nothing of the model's own graph takes memory.
        reference = self.reference.log_probs(module, batch, split, source)
        answers = answer_log_probs(module, batch)
        return answers, score_pairs(self.config, answers.log_probs, reference, batch["num_answer_tokens"])

    def state_dict(self) -> dict[str, Any]:
        """Return the reference's log-probabilities."""
        return {"reference_log_probs": dict(self.reference.tables)}

    def load_state_dict(self, module: CausalLMModule, checkpoint: dict[str, Any]) -> None:
        """Take the reference's log-probabilities, and compute missing ones while the model is as it was loaded.

        Args:
            module: The model.
            checkpoint: The whole checkpoint.
        """
        self.reference.tables |= checkpoint.get("reference_log_probs", {})
        self.reference.prepare(module)
