"""Answers to the same prompts throughout a run, to be read by people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from rich.markup import escape

from callbacks.run_outputs import log_text, run_folder
from callbacks.throughput import not_counted
from sft_lightning.data.batches.generation_prompts import PromptBatch
from sft_lightning.errors import UserError
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.generate import generate
from sft_lightning.strategies.services import services_of
from sft_lightning.terminal import fenced, make_console
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.startup import datamodule_of
from sft_lightning.types import Message


class SampleGeneration(Callback):
    """Generate answers at the start, every N optimizer steps and at the end.

    They are printed, written to `samples.jsonl` and logged as text (`samples/<number>`). With an adapter, each row also
    has the answer of the base model. The run's random state does not change.

    Args:
        prompts: User messages, rendered with the run's template. Default: the first prompts of the validation data, or
            of the training data if there is none. An empty list turns samples off.
        num_prompts: Number of prompts to take from the data.
        every_n_steps: Optimizer steps between samples; 0: only at the start and at the end.
        generation: How answers are generated.

    Raises:
        UserError: If a number is negative.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_prompts: int = 3,
        every_n_steps: int = 200,
        generation: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
    ) -> None:
        for name, value in {"num_prompts": num_prompts, "every_n_steps": every_n_steps}.items():
            if value < 0:
                raise UserError(f"callbacks.SampleGeneration.{name}: must be at least 0 (got {value})")
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.generation = generation
        self._sampled_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._sample(trainer, pl_module)
        self._sampled_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step != self._sampled_at and step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end: checkpoints and exports are written first.
        if trainer.global_step != self._sampled_at:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, module: LightningModule) -> None:
        self._sampled_at = trainer.global_step
        if not (trainer.is_global_zero or services_of(trainer.strategy).shards_weights):
            return  # the processes of a sharded model generate together, each the same answers
        if not isinstance(module, CausalLMModule):
            raise TypeError(f"SampleGeneration works with a CausalLMModule, not {type(module).__name__}")
        examples = self._examples(trainer)
        if not examples:
            return
        with not_counted(trainer, module):
            rows = self._rows(trainer, module, examples)
        if trainer.is_global_zero:
            self._write(trainer, rows)

    def _rows(self, trainer: Trainer, module: CausalLMModule, examples: PromptBatch) -> list[dict[str, Any]]:
        answers = self._answers(trainer, module, examples)
        rows: list[dict[str, Any]] = [
            {"step": trainer.global_step, **example, "answer": answer}
            for example, answer in zip(examples, answers, strict=True)
        ]
        if isinstance(module.language_model, PeftModel):
            with module.language_model.disable_adapter():
                for row, answer in zip(rows, self._answers(trainer, module, examples), strict=True):
                    row["base_answer"] = answer
        return rows

    def _examples(self, trainer: Trainer) -> PromptBatch:
        datamodule = datamodule_of(trainer)
        if self.prompts is None:
            return datamodule.sample_prompts(self.num_prompts)
        role = "text" if datamodule.spec.task == "pretrain" else "user"
        conversations = [[Message(role, prompt)] for prompt in self.prompts]  # type: ignore[arg-type]
        return [{"prompt": datamodule.template.generation_prompt(messages)} for messages in conversations]

    def _answers(self, trainer: Trainer, module: CausalLMModule, examples: PromptBatch) -> list[str]:
        datamodule = datamodule_of(trainer)
        return generate(
            module.language_model,
            datamodule.tokenizer,
            [example["prompt"] for example in examples],
            stop_token_id=datamodule.stop_token_id,
            config=self.generation,
        )

    def _write(self, trainer: Trainer, rows: Sequence[dict[str, Any]]) -> None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        out = make_console()
        out.print(f"[bold]samples at optimizer step {trainer.global_step}[/bold]")
        for row in rows:
            out.print(f"  [dim]prompt[/dim] {escape(repr(row['prompt'][-100:]))}")
            for key, label in (("base_answer", "base     "), ("answer", "answer   "), ("reference", "reference")):
                if key in row:
                    out.print(f"  [dim]{label}[/dim] {escape(repr(row[key]))}")
        for number, row in enumerate(rows):
            log_text(trainer, f"samples/{number}", _markdown(row))


def _markdown(row: dict[str, Any]) -> str:
    return "\n\n".join(f"**{key}**\n\n{fenced(str(value))}" for key, value in row.items() if key != "step")
