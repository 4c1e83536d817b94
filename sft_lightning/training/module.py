"""CausalLMModule: one model in Lightning's hooks. Each hook hands its work to a function or an object beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from sft_lightning.batch import Batch
from sft_lightning.checks import CheckLog
from sft_lightning.compat.lightning.loops import is_accumulating, set_logged_step
from sft_lightning.data.batches.generation_prompts import PromptBatch
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.models.adapters.trained_base import base_fingerprint
from sft_lightning.models.assembly import copies_weights
from sft_lightning.models.generation.generate import generate
from sft_lightning.models.head.sharded import ShardedHead
from sft_lightning.models.head.whole import Head
from sft_lightning.models.inspection import base_model
from sft_lightning.strategies.services import ModuleServices, services_of
from sft_lightning.training import startup
from sft_lightning.training.checkpoint import state
from sft_lightning.training.checkpoint.continuation import Continuation
from sft_lightning.training.checkpoint.files import NONFINITE_LOSSES
from sft_lightning.training.checks.run_checks import RunChecks
from sft_lightning.training.forward import find_any_head, token_loss_sums
from sft_lightning.training.losses import LossSums
from sft_lightning.training.objective import NextToken, Objective
from sft_lightning.training.optim import build_optimizer, check_float16, clip_gradients, lr_factor
from sft_lightning.training.preference.objective import PreferenceObjective
from sft_lightning.training.spec import PreferenceSpec, TrainingSpec
from sft_lightning.training.step import LossScale, NonfiniteLosses, StepSums


class CausalLMModule(LightningModule):
    """A causal language model that is fine-tuned in full or with an adapter.

    Args:
        spec: The model, and how it is trained; a `PreferenceSpec` to learn from pairs of answers.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.objective: Objective = (
            PreferenceObjective(spec.preference) if isinstance(spec, PreferenceSpec) else NextToken()
        )
        self.model: PreTrainedModel | PeftModel | None = None
        self.layout: Layout | None = None
        """How documents share rows; the data module asks for it. `None` until it is decided."""

        self.base_fingerprint: str | None = None
        """Tells the base from others; `None` if its files cannot be read, or before it is loaded."""

        self.step = StepSums()
        """The optimizer step under way."""

        self.checks = CheckLog()
        """What was checked in this run."""

        self._nonfinite_losses = NonfiniteLosses(spec.max_nonfinite_losses)
        self._loss_scale = LossScale()
        self._random_states = state.RandomStates()
        self._continuation = Continuation(rank_zero_info)

    # --- the model -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the layout from `data.packing`; `auto` waits for the model."""
        self.layout = startup.layout_before_loading(self.data.spec.packing, stage, self.layout)

    def configure_model(self) -> None:
        """Load the model once, whichever stages follow."""
        if self.model is None:
            self.base_fingerprint = base_fingerprint(self.spec.model_name_or_path, self.spec.from_config)
            self.model = startup.load_model(self)
            self.objective.on_model_loaded(self)

    @property
    def copies_weights(self) -> bool:
        """Whether `configure_model` is about to make its own tensors instead of mapping those in the files."""
        return self.model is None and copies_weights(self.spec)

    @property
    def language_model(self) -> PreTrainedModel | PeftModel:
        """The loaded model."""
        if self.model is None:
            raise RuntimeError("the model is loaded by configure_model, which the trainer calls")
        return self.model

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model inside, without an adapter around it."""
        return base_model(self.language_model)

    @property
    def _services(self) -> ModuleServices:
        return services_of(self.trainer.strategy)

    @property
    def data(self) -> SFTDataModule:
        """The data module of the run, which has the tokenizer and the plan; any other kind is a `UserError`."""
        return startup.datamodule_of(self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        """Return the checks of the run; no setting removes them."""
        return [RunChecks()]

    def on_fit_start(self) -> None:
        """Check packing isolation, name the kernel of the attention, and decide how the layers run."""
        startup.check_attention(self, packs=self.data.packs)
        startup.set_up_layers(self)
        self.objective.on_fit_start(self)
        self._continuation.on_fit_start(self)

    def forward(self, batch: Batch) -> LossSums:
        """Return the loss sums of a micro-batch."""
        return token_loss_sums(self.language_model, self.head, batch)

    @functools.cached_property
    def head(self) -> Head | ShardedHead | None:
        """The model's head, for the loss in chunks; `None` if only the model itself can make its logits."""
        # Found and checked when it is first used: the model is on its device then.
        head = find_any_head(self.language_model, len(self.data.tokenizer), self.device)
        if head is None:
            rank_zero_info("loss: chunked loss is not available for this model; using its own logits")
        return head

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the micro-batch's share of the optimizer step's loss, a scalar."""
        self._continuation.check_first_batch(self, batch)
        share = self.objective.step_share(self, batch)
        self.step.add(share)
        # Lightning divides by the number of micro-batches, and data-parallel strategies average over ranks.
        scaled: torch.Tensor = share.loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return scaled

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Continue the random generators of a checkpoint, after everything that runs before the first step."""
        self._continuation.note_batch(self.trainer.current_epoch, batch_idx)
        if self._random_states.continue_loaded():
            set_logged_step(self.trainer)
        if self.step.loss is None and self.trainer.accumulate_grad_batches > 1:
            self._random_states.note_step_start()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the optimizer step that this micro-batch completed."""
        if self.step.loss is not None and not is_accumulating(self.trainer):
            self._log_step(self.step.loss, self.step.means)
            self.step.clear()

    def _log_step(self, loss: torch.Tensor, means: torch.Tensor | None) -> None:
        several = self.trainer.world_size > 1
        self.log("train/loss", loss, sync_dist=several, reduce_fx=torch.sum)
        # The rate that the step was taken with; the schedule has already moved on. A tensor on the CPU, because
        # Lightning would move a number to the device, and wait.
        self.log("train/lr", torch.tensor(self._lr))
        for name, value in zip(self.objective.step_means, () if means is None else means.unbind(), strict=True):
            self.log(f"train/{name}", value, sync_dist=several, reduce_fx=torch.sum)
        if (norm := self._services.grad_norm) is not None:
            self.log("train/grad_norm", norm)
        if self._scaler is not None:
            self.log_dict(self._loss_scale.note(self._scaler))
        self._nonfinite_losses.note(loss, self.trainer.global_step)
        every = getattr(self.trainer, "log_every_n_steps", 0) or 1
        if self.trainer.global_step % every == 0:  # logging waits for the device then
            self._check_losses()

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of `trainer.precision: 16-mixed`; `None` with any other precision."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_train_epoch_end(self) -> None:
        """Check the losses since the last logging interval."""
        self._check_losses()

    def _check_losses(self) -> None:
        strategy, device = self.trainer.strategy, self.device
        self._nonfinite_losses.check(
            lambda step: strategy.reduce(step.to(device), reduce_op="max"), lambda step: self.data.rows.describe(step)
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the learning rate of the step."""
        self._lr = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, and log the norm before clipping: one computation for both, no device sync."""
        if self._services.manages_gradients:
            return  # DeepSpeed has the gradients, and clips them itself
        norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, self._scaler)
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over what trains, and the schedule over the planned optimizer steps."""
        self.layout = startup.decide_layout(self)
        groups = startup.optimizer_groups(self)
        optimizer = build_optimizer(self.spec.optimizer, groups)
        num_steps = self.data.num_optimizer_steps
        self._continuation.note_optimizer(optimizer, num_steps)
        optimizer = self._services.prepare_optimizer(optimizer)
        if not self._services.manages_gradients:
            check_float16(optimizer, scales_loss=self._scaler is not None)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(self.spec.lr_scheduler, step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation ------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Check packing isolation."""
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """Check packing isolation, unless training has done so."""
        if self.trainer.state.fn == "fit":
            return
        startup.check_attention(self, packs=self.data.layout.packing != "none")
        self.objective.on_evaluation_start(self)

    def on_validation_epoch_start(self) -> None:
        self.means = self.objective.start_means(self, self.data.source_names("val"))

    def on_test_epoch_start(self) -> None:
        self.means = self.objective.start_means(self, self.data.source_names("test"))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch of one source to the metrics."""
        self.objective.update_means(self, self.means, batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch of one source to the metrics."""
        self.objective.update_means(self, self.means, batch, "test", dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        """Log the metrics of all sources together, and those of each source."""
        for name, value in self.means.compute().items():
            self.log(f"{stage}/{name}", value)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Return the prompt, the generated answer and, where the data has one, the reference of each example.

        An empty batch takes part in the forward passes of the other processes if they share the weights.
        """
        answers = generate(
            self.language_model,
            self.data.tokenizer,
            [example["prompt"] for example in batch],
            stop_token_id=self.data.stop_token_id,
            config=self.spec.generation,
        )
        return [{**example, "answer": answer} for example, answer in zip(batch, answers, strict=True)]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, the random states, and the state of the objective."""
        checkpoint["state_dict"] = state.trainable_state(self, checkpoint["state_dict"])
        within_step = self.step.loss is not None and is_accumulating(self.trainer)
        states = checkpoint["random_states"] = self._random_states.gather(within_step=within_step)
        checkpoint |= self._continuation.state(self, states, within_step=within_step)
        checkpoint[NONFINITE_LOSSES] = self._nonfinite_losses.in_a_row
        checkpoint |= self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states for the first step, and set the position to the start of an optimizer step."""
        self._continuation.load(self, checkpoint)
        self._random_states.load(checkpoint["random_states"], self.trainer.global_rank)
        if self.trainer.state.fn == "fit":
            if self.layout is None:  # `auto`: checked again by `decide_layout`
                self.layout = Layout(packing=checkpoint[type(self.data).__qualname__]["packing"])
            state.rewind_to_step_start(checkpoint["loops"]["fit_loop"], self.data.rows)
        self.objective.load_state_dict(self, checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights that train; the frozen base was loaded from its own files."""
        state.check_trainable_state(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)
