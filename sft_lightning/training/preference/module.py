"""DPOModule: CausalLMModule with a loss on pairs of answers instead of one on tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel

from sft_lightning.compat.bitsandbytes import without_int8_outliers
from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.compat.transformers import attention_of
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.pairs.collate import PairBatch
from sft_lightning.data.pairs.kind import PairPart, Pairs, pair_parts, reference_folder
from sft_lightning.errors import UserError
from sft_lightning.models.attention.packed import PACKED
from sft_lightning.models.export.fingerprint import weight_fingerprint
from sft_lightning.models.head.whole import Head
from sft_lightning.models.inspection import evaluating
from sft_lightning.training.forward import decoder_inputs, logits_at, router_loss
from sft_lightning.training.losses import find_targets, log_probs_of, projected_log_probs
from sft_lightning.training.metrics import SourceMeans
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.preference.losses import PairScores, score_pairs
from sft_lightning.training.preference.metrics import NAMES, PairMeans, pair_sums
from sft_lightning.training.preference.reference import (
    ReferenceChoice,
    adapter_off,
    choose_reference,
    load_table,
    save_table,
    table_key,
)
from sft_lightning.training.preference.sharing import measure_sharing, shared_fraction
from sft_lightning.training.spec import PreferenceSpec


class Answers(NamedTuple):
    """What a model says of a micro-batch's P pairs."""

    log_probs: torch.Tensor
    """Log-probabilities of the chosen and the rejected answers, sums over their supervised tokens, (P, 2) float32."""

    routers: torch.Tensor | None
    """The routers' loss of a mixture of experts, its coefficient included."""


class DPOModule(CausalLMModule):
    """A causal language model that learns to prefer one answer to another, in full or by an adapter: `task: dpo`.

    Everything but the loss is `CausalLMModule`'s. Every pair weighs the same, however the work is split: an optimizer
    step's loss is the sum over its pairs divided by their weight, which the plan knows.

    Args:
        spec: The model, and how it is trained.
    """

    spec: PreferenceSpec

    def __init__(self, spec: PreferenceSpec) -> None:
        super().__init__(spec)
        self.preference = spec.preference
        self._reference: ReferenceChoice | None = None
        self._start = ""  # fingerprint of the model before training
        self._tables: dict[str, torch.Tensor] = {}
        self._of_parts: dict[str, list[torch.Tensor]] = {}
        self._step_sums: torch.Tensor | None = None

    # --- the reference model ---------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model once, and decide where the reference's log-probabilities come from."""
        if self.model is not None:
            return
        super().configure_model()
        if not self.preference.has_reference:
            return
        self._reference = choose_reference(self.preference.reference, self.language_model, self.spec.adapter)
        rank_zero_info(f"reference model: {self._reference.kind} ({self._reference.reason})")
        if self._reference.kind == "precomputed":
            self._start = weight_fingerprint(self.language_model)

    @property
    def _pairs(self) -> SFTDataModule:
        if not isinstance(self._data.kind, Pairs):
            raise UserError("DPOModule takes pairs from its datamodule; make it as SFTDataModule(spec, Pairs)")
        return self._data

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._share_prompts()
        self._find_references()

    def _prove_packing_to_evaluate(self) -> None:
        super()._prove_packing_to_evaluate()
        if self.trainer.state.fn != "fit":
            self._share_prompts()

    # --- prompts ---------------------------------------------------------------------------------------------------

    def _share_prompts(self) -> None:
        """Decide on the loaded model whether a prompt is computed once for both of its answers."""
        reason, data = self._why_not_shared(), self._pairs
        self.layout = replace(data.layout, share_prompts=reason is None)
        if reason is not None:
            rank_zero_info(f"prompts: with each answer ({reason})")
        elif "train" in data.reader.read:
            rank_zero_info(f"prompts: once for both answers, {shared_fraction(data):.0%} fewer tokens to compute")

    @torch.no_grad()
    def _why_not_shared(self) -> str | None:
        """Return why each answer needs its prompt for itself; `None` if it does not."""
        model, config = self.language_model, self.base_model.config
        if not self.preference.share_prompts:
            return "as model.preference.share_prompts says"
        if attention_of(config) != PACKED:
            return f"the model's attention is {attention_of(config)}, which cannot keep the two apart"
        if self.spec.neftune_alpha is not None:
            return "model.neftune_alpha has noise for each conversation"
        if getattr(config.get_text_config(), "output_router_logits", False):
            return "the routers' loss counts a prompt with each of its answers"
        with evaluating(self), without_int8_outliers(model):
            rounding = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
            found = measure_sharing(
                lambda batch: self.answers(batch).log_probs, len(self._data.tokenizer), self.device, rounding
            )
        return None if found.proven else found.describe()

    # --- the reference model's log-probabilities --------------------------------------------------------------------

    def _find_references(self) -> None:
        """See to it that every pair's reference log-probabilities are there, as of the model before training."""
        if self._reference is None or self._reference.kind == "adapter_off":
            return
        if set(self._of_parts) == set(self._pairs.reader.read):
            return  # found before
        of_parts: dict[str, list[torch.Tensor]] = {}
        for part in pair_parts(self._pairs):
            key = table_key(self._start, part.content, str(self.trainer.precision), self.spec.attn_implementation)
            key = self.trainer.strategy.broadcast(key)  # of sharded models every rank has another fingerprint
            if key not in self._tables:
                self._tables[key] = self._find_table(part, key)
            of_parts.setdefault(part.split, []).append(self._tables[key])
        self._of_parts = of_parts
        if "train" in of_parts:  # a batch's pairs are counted through all training sources
            self._of_parts["train"] = [torch.cat(of_parts["train"])]

    def _find_table(self, part: PairPart, key: str) -> torch.Tensor:
        """Return the log-probabilities of a part's pairs, from the disk or from the model, (pairs, 2)."""
        folder, writes = reference_folder(self._pairs), self.trainer.is_global_zero
        table = self.trainer.strategy.broadcast(load_table(folder, key, part.num_pairs) if writes else None)
        if table is not None:
            return table
        table = self._compute_table(part)
        if writes:
            save_table(folder, key, table)
        rank_zero_info(f"reference log-probabilities: computed for the pairs of {part.split}/{part.name}")
        return table

    @torch.no_grad()
    def _compute_table(self, part: PairPart) -> torch.Tensor:
        if self.device != self.trainer.strategy.root_device:
            self.to(self.trainer.strategy.root_device)  # a checkpoint is loaded before the trainer moves the model
        table = torch.zeros(part.num_pairs, 2, device=self.device)
        with evaluating(self), self.trainer.precision_plugin.forward_context():
            for batch in part.loader:
                batch = self.trainer.strategy.batch_to_device(batch, self.device)
                table[batch["pairs"]] = self.answers(batch).log_probs
        whole: torch.Tensor = self.trainer.strategy.reduce(table, reduce_op="sum")
        return whole.cpu()

    @torch.no_grad()
    def _reference_log_probs(self, batch: PairBatch, split: str, source: int = 0) -> torch.Tensor | None:
        """Return the reference's log-probabilities of a micro-batch's answers, (P, 2); `None` for losses without."""
        if self._reference is None:
            return None
        if self._reference.kind == "precomputed":
            tables = self._of_parts[split]
            tables[source] = tables[source].to(self.device)  # once; indexing on the device makes nothing wait
            return tables[source][batch["pairs"]]
        model = self.language_model
        if not isinstance(model, PeftModel):
            raise TypeError(f"a {type(model).__name__} has no adapter to switch off")
        _ = self._head  # proven on the model as it trains
        with evaluating(self), adapter_off(model):
            return self.answers(batch).log_probs

    # --- log-probabilities -----------------------------------------------------------------------------------------

    def answers(self, batch: PairBatch) -> Answers:
        """Return the log-probabilities of a micro-batch's answers under the model as it is."""
        targets = find_targets(batch["labels"], batch["loss_weights"])
        inputs, head = decoder_inputs(batch), self._head
        if isinstance(head, Head):
            out = head.decoder(**inputs)
            hidden = out.last_hidden_state.flatten(0, 1)[targets.positions]
            tokens = projected_log_probs(hidden, head.project, targets.ids, self.base_model.config.vocab_size)
        else:
            logits, out = logits_at(self.language_model, inputs, targets.positions)
            tokens = log_probs_of(logits, targets.ids)
        routers = router_loss(self.language_model, out, batch)
        # Sums of slices, not an `index_add`, which adds in another order on every run of a GPU.
        sums = [part.sum() for part in tokens.split(batch["answer_lengths"])]
        # Without a pair the sum still carries a graph: every rank has a backward.
        return Answers(torch.stack(sums).view(-1, 2) if sums else tokens.sum().expand(0, 2), routers)

    def _score(self, batch: PairBatch, split: str, source: int = 0) -> tuple[Answers, PairScores]:
        # The reference first: nothing of the model's own graph takes memory yet.
        reference = self._reference_log_probs(batch, split, source)
        answers = self.answers(batch)
        lengths = torch.tensor(batch["answer_lengths"], device=self.device).view(-1, 2)
        return answers, score_pairs(self.preference, answers.log_probs, reference, lengths)

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        """Return the micro-batch's share of the optimizer step's mean loss per pair."""
        answers, scores = self._score(batch, "train")
        weights, denominator = batch["pair_weights"], batch["denominator"] or 1.0
        share = (scores.losses * weights).sum() / denominator
        if answers.routers is not None:  # each pair of the step carries its share of the routers' loss, as of its own
            share = share + answers.routers * weights.sum() / denominator
        self._step_loss = share.detach() if self._step_loss is None else self._step_loss + share.detach()
        sums = pair_sums(scores, answers.log_probs, weights) / denominator
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        # Lightning divides by the number of micro-batches, and data-parallel strategies average over ranks.
        scaled: torch.Tensor = share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return scaled

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Log the optimizer step that this micro-batch completed."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self._step_sums is None or is_accumulating(self.trainer):
            return
        several = self.trainer.world_size > 1
        for name, value in zip(NAMES[1:], self._step_sums[1:].unbind(), strict=True):
            self.log(f"train/{name}", value, sync_dist=several, reduce_fx=torch.sum)
        self._step_sums = None

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _start_means(self, names: list[str]) -> SourceMeans:
        self._find_references()
        return SourceMeans(names, lambda: PairMeans().to(self.device))

    def validation_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        """Add a micro-batch of one source to the metrics."""
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: PairBatch, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        """Add a micro-batch of one source to the metrics."""
        self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: PairBatch, split: str, source: int) -> None:
        answers, scores = self._score(batch, split, source)
        weights = batch["pair_weights"]
        self._means.update(source, pair_sums(scores, answers.log_probs, weights), weights.sum())

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, the random states, and what the model said before training."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_log_probs"] = dict(self._tables)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference's log-probabilities; what is not among them is asked while the model is what it was."""
        super().on_load_checkpoint(checkpoint)
        self._tables |= checkpoint.get("reference_log_probs", {})
        self._find_references()


def preference_model_from_keys(**keys: Any) -> DPOModule:
    """A causal language model that learns to prefer one answer to another."""  # heads its keys in the help
    return DPOModule(PreferenceSpec(**keys))
