"""CausalLMModule: one model, its steps, its optimizer; what is decided is decided in pure functions elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from sft_lightning.compat.bitsandbytes import store_4bit_as_bytes
from sft_lightning.compat.lightning.loops import align_progress, is_accumulating, reopen_epoch, set_logged_step
from sft_lightning.data.batches.generation_prompts import PromptBatch
from sft_lightning.data.batches.row_order import row_order_error
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.plan.epoch_plan import Layout
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.trainable import trainable_base_names
from sft_lightning.models.assembly import assemble_model
from sft_lightning.models.attention.document_mask import use_document_mask
from sft_lightning.models.base.loading import copies_weights
from sft_lightning.models.base.rope import check_packing
from sft_lightning.models.checkpointing import (
    decide_checkpointing,
    enable_gradient_checkpointing,
    free_memory_gib,
)
from sft_lightning.models.compiling import compile_layers
from sft_lightning.models.generation.generate import generate
from sft_lightning.models.head.sharded import ShardedHead, find_sharded_head
from sft_lightning.models.head.whole import Head, find_head
from sft_lightning.models.inspection import base_model, computing_device, is_sharded
from sft_lightning.models.isolation import choose_packing, verify_isolation
from sft_lightning.models.neftune import EmbeddingNoise
from sft_lightning.strategies.services import ModuleServices, services_of
from sft_lightning.training.checkpoint import (
    check_trainable_state,
    gather_random_states,
    random_state,
    set_random_state,
    trainable_state,
)
from sft_lightning.training.forward import token_loss_sums
from sft_lightning.training.loss_scale import LossScale
from sft_lightning.training.losses import LossSums
from sft_lightning.training.metrics import SourceMeans, TokenMeans
from sft_lightning.training.nonfinite import NonfiniteLosses, nonfinite_error
from sft_lightning.training.optim import (
    build_optimizer,
    check_float16,
    clip_gradients,
    lr_factor,
    parameter_groups,
)
from sft_lightning.training.spec import TrainingSpec
from sft_lightning.types import Batch


class CausalLMModule(LightningModule):
    """A causal language model that is fine-tuned in full or by an adapter.

    Args:
        spec: The model, and how it is trained.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.nonfinite_losses = NonfiniteLosses(spec.max_nonfinite_losses)
        self.loss_scale = LossScale()
        self.layout: Layout | None = None
        """How documents share rows; the datamodule asks for it. `None` until it is decided."""
        self.model: PreTrainedModel | PeftModel | None = None
        self._random_state: dict[str, Any] | None = None  # of a checkpoint, until the first step continues it
        self._step_random_state: dict[str, Any] | None = None  # before the optimizer step that is under way
        self._step_loss: torch.Tensor | None = None

    # --- the model -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the layout from `data.packing`; `auto` waits for the model, and means `none` without training."""
        packing = self._data.spec.packing
        if packing != "auto":
            self.layout = Layout(packing=packing)
        elif stage == "fit":
            self.layout = None
        elif self.layout is None:
            self.layout = Layout(packing="none")

    def configure_model(self) -> None:
        """Load the model once, whichever stages follow."""
        if self.model is not None:
            return
        spec = self.spec
        self.model = assemble_model(
            spec,
            self._data.tokenizer,
            log=rank_zero_info,
            on_cpu=self._services.shards_weights,
        )
        if self.trainer.precision.endswith("-true"):
            store_4bit_as_bytes(self.model)  # the trainer casts everything else
        if spec.neftune_alpha is not None:
            EmbeddingNoise(spec.neftune_alpha).attach(self.base_model)
        if spec.attn_implementation == "auto" and use_document_mask(self.model):
            family = self.base_model.config.model_type
            rank_zero_info(f"attention: {family}'s own, with a mask that keeps documents apart")

    @property
    def copies_weights(self) -> bool:
        """Whether `configure_model` is about to make weights of its own, where it could map those in the files."""
        return self.model is None and copies_weights(
            self.spec.model_name_or_path,
            dtype=self.spec.dtype,
            quantization=self.spec.quantization,
            trust_remote_code=self.spec.trust_remote_code,
        )

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

    def full_weights(self) -> AbstractContextManager[None]:
        """Hold the full weights on rank 0 while the context is open; all processes must enter it together."""
        return self._services.full_weights()

    @property
    def _data(self) -> SFTDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, SFTDataModule):
            raise UserError(
                "CausalLMModule takes its tokenizer and its plan from an SFTDataModule; give the trainer one"
            )
        return datamodule

    def _decide_layout(self) -> None:
        """Decide `data.packing: auto` on the loaded model, before the number of optimizer steps is asked for.

        Raises:
            UserError: If a continued run had packed its rows otherwise.
        """
        data, continued = self._data, self.layout
        if data.spec.packing != "auto" or (continued is not None and continued.packing == "none"):
            return
        packing, reason = choose_packing(
            self.language_model,
            len(data.tokenizer),
            computing_device(self.language_model),  # DeepSpeed moves the model only later
            max_length=data.spec.max_length,
            rope_scaling=self.spec.rope_scaling,
        )
        rank_zero_info(f"packing: {packing} (auto: {reason})")
        self.layout = Layout(packing=packing)
        if continued is not None and continued != self.layout:
            raise row_order_error([f"packing: {continued.packing} → {packing}"])

    def on_fit_start(self) -> None:
        """Prove packing isolation on the loaded model, decide on gradient checkpointing, and compile."""
        if self._data.packs:
            self._prove_packing()
        decision = decide_checkpointing(
            self.spec.gradient_checkpointing,
            self.base_model.config,
            tokens=self._data.spec.batch_size * self._data.spec.max_length,
            bytes_per_value=getattr(torch, self.spec.dtype).itemsize,
            free_gib=free_memory_gib(self.device),
        )
        rank_zero_info(f"gradient checkpointing: {'on' if decision.enabled else 'off'} ({decision.reason})")
        if decision.enabled:
            enable_gradient_checkpointing(self.base_model, decision.every)
        if self.spec.torch_compile:
            rank_zero_info(
                f"torch_compile: {compile_layers(self.base_model)} decoder layers, compiled in the first steps"
            )

    def _prove_packing(self) -> None:
        data = self._data
        if self.spec.rope_scaling is not None:
            check_packing(self.base_model.config, self.spec.rope_scaling, data.spec.max_length)
        difference = verify_isolation(
            self.language_model, len(data.tokenizer), self.device, max_length=data.spec.max_length
        )
        rank_zero_info(f"packing isolation: proven on this model; packed = separate logits to {difference:.1e}")

    def forward(self, batch: Batch) -> LossSums:
        """Return the loss sums of a micro-batch."""
        return token_loss_sums(self.language_model, self._head, batch)

    @functools.cached_property
    def _head(self) -> Head | ShardedHead | None:
        """The model's head, proven on the first micro-batch, when the model is where it will be."""
        find = find_sharded_head if is_sharded(self.language_model) else find_head
        head = find(self.language_model, len(self._data.tokenizer), self.device)
        if head is None:
            rank_zero_info("loss: this model makes its logits itself, those of supervised tokens all at once")
        return head

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the micro-batch's share of the optimizer step's mean loss per supervised token."""
        share = self(batch).loss / (batch["denominator"] or 1.0)
        self._step_loss = share.detach() if self._step_loss is None else self._step_loss + share.detach()
        # Lightning divides by the number of micro-batches, and data-parallel strategies average over ranks.
        scaled: torch.Tensor = share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return scaled

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Continue the random generators of a checkpoint, after everything that runs before the first step."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None
            set_logged_step(self.trainer)
        if self._step_loss is None and self.trainer.accumulate_grad_batches > 1:
            self._step_random_state = random_state()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the optimizer step that this micro-batch completed."""
        if self._step_loss is None or is_accumulating(self.trainer):
            return
        several = self.trainer.world_size > 1
        self.log("train/loss", self._step_loss, sync_dist=several, reduce_fx=torch.sum)
        # The rate that the step was taken with; the schedule has already moved on.
        # On the host: Lightning would send a number to the device, and wait.
        self.log("train/lr", torch.tensor(self._lr))
        self.nonfinite_losses.note(self._step_loss, self.trainer.global_step)
        self._step_loss = None
        norm = self._services.grad_norm
        if norm is not None:
            self.log("train/grad_norm", norm)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.log_dict(self.loss_scale.note(scaler))
        every = getattr(self.trainer, "log_every_n_steps", 0) or 1
        if self.trainer.global_step % every == 0:  # metrics wait for the device then
            self._stop_at_nonfinite_losses()

    def on_train_epoch_end(self) -> None:
        """Look at the losses since the last logging interval."""
        self._stop_at_nonfinite_losses()

    def _stop_at_nonfinite_losses(self) -> None:
        limit = self.spec.max_nonfinite_losses
        if limit is None:
            return
        found = self.nonfinite_losses.found.to(self.device)
        step = int(self.trainer.strategy.reduce(found, reduce_op="max"))  # all ranks stop, whoever found it
        if step:
            raise nonfinite_error(limit, step, self._data.rows.describe(step))

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
        self.log("train/grad_norm", clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm))

    def configure_optimizers(self) -> Any:
        """Return the optimizer over what trains, and the schedule over the planned optimizer steps."""
        self._decide_layout()
        adapter = self.spec.adapter or AdapterConfig()
        groups = parameter_groups(
            self.language_model.named_parameters(),
            base_names=trainable_base_names(self.language_model),
            base_lr=adapter.base_lr,
            lora_plus_ratio=adapter.lora_plus_ratio,
        )
        optimizer = self._services.prepare_optimizer(build_optimizer(self.spec.optimizer, groups))
        if not self._services.manages_gradients:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            check_float16(optimizer, scales_loss=scaler is not None)
        num_steps = self._data.num_optimizer_steps
        schedule = LambdaLR(optimizer, lambda step: lr_factor(self.spec.lr_scheduler, step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Prove packing isolation where there was no training before."""
        self._prove_packing_to_evaluate()

    def on_test_start(self) -> None:
        """Prove packing isolation."""
        self._prove_packing_to_evaluate()

    def _prove_packing_to_evaluate(self) -> None:
        if self.trainer.state.fn != "fit" and self._data.layout.packing != "none":
            self._prove_packing()

    def on_validation_epoch_start(self) -> None:
        self._means = self._start_means(self._data.source_names("val"))

    def on_test_epoch_start(self) -> None:
        self._means = self._start_means(self._data.source_names("test"))

    def _start_means(self, names: list[str]) -> SourceMeans:
        return SourceMeans(names, lambda: TokenMeans().to(self.device), of_each=["loss", "perplexity"])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch of one source to the metrics."""
        self._means.update(dataloader_idx, self(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch of one source to the metrics."""
        self._means.update(dataloader_idx, self(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        """Log the metrics of all sources together, and the loss of each."""
        for name, value in self._means.compute().items():
            self.log(f"{stage}/{name}", value)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Return the prompt, the generated answer and, where the data has one, the reference of each example.

        An empty batch is no idle step: where processes share the weights, it takes part in the others' passes.
        """
        data = self._data
        answers = generate(
            self.language_model,
            data.tokenizer,
            [example["prompt"] for example in batch],
            stop_token_id=data.stop_token_id,
            config=self.spec.generation,
        )
        return [{**example, "answer": answer} for example, answer in zip(batch, answers, strict=True)]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and the random states."""
        checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])
        # Gradients are not in a checkpoint: a step that is under way will be taken again from its first micro-batch.
        under_way = self._step_loss is not None and is_accumulating(self.trainer)
        before = self._step_random_state if under_way else self._random_state  # of a run with no step left, the latter
        checkpoint["random_states"] = gather_random_states(before or random_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the random states for the first step, and stand at the start of an optimizer step."""
        states = checkpoint["random_states"]
        self._random_state = states[self.trainer.global_rank % len(states)]
        if self.trainer.state.fn == "fit" and self.layout is None:
            self.layout = Layout(packing=checkpoint[type(self._data).__qualname__]["packing"])  # to be proven again
        fit_loop = checkpoint["loops"]["fit_loop"]
        for position in fit_loop["state_dict"].get("combined_loader", []):
            if self.trainer.state.fn == "fit":
                align_progress(fit_loop, self._data.rows.micro_batches_done(position))
                if self._data.rows.is_within_epoch(position):
                    reopen_epoch(fit_loop, position["epoch"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains; the base is loaded from where it came from."""
        check_trainable_state(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def model_from_keys(**keys: Any) -> CausalLMModule:
    """A causal language model that is fine-tuned in full or with an adapter."""  # heads its keys in the help
    return CausalLMModule(TrainingSpec(**keys))
