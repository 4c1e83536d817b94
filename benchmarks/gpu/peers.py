"""Train a cell with others' parts: a hand-tuned loop of transformers, PEFT and Liger's kernels, or TRL's trainer.

All get our rows: the same documents, packed to the same length, on random weights of the same shape.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.clock import Answer, StepClock
from benchmarks.gpu.inputs import LR, SHAPES
from sft_lightning.cli.app import SFTCommandLine
from sft_lightning.cli.commands import prepare


def require(library: str) -> None:
    """Check that a library is installed, without importing it.

    Raises:
        ImportError: If it is not; the table says so.
    """
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{library} is not installed")


def attention() -> str:
    """Return the fastest attention for packed rows that transformers finds here."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def random_model(cell: Cell, device: torch.device) -> Any:
    """Return transformers' model of a cell in bfloat16, with random weights drawn on the device, in training mode."""
    values = dict(SHAPES[cell.shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention())
    return model.train()


def lora() -> LoraConfig:
    """Return PEFT's configuration of the adapter that all cells train."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def peft(cell: Cell, config: Path, clock: StepClock) -> Answer:
    """Train with a loop around transformers and PEFT: Liger's kernels, adapters in bfloat16, no checkpointing.

    Args:
        cell: The cell.
        config: Our configuration of it, for the rows.
        clock: Times the steps.

    Raises:
        ImportError: If there is a GPU, and Liger is not installed; its kernels do not run on CPUs.
    """
    on_gpu = clock.device.type == "cuda"
    if on_gpu:
        require("liger_kernel")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
    data = SFTCommandLine("prepare", ["--config", str(config)], prepare.add_options).data
    data.setup("fit")
    model = get_peft_model(random_model(cell, clock.device), lora(), autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    clock.start()
    for _, batch in zip(range(clock.total), data.train_dataloader(), strict=False):
        inputs = {key: batch[key].to(clock.device) for key in ("input_ids", "position_ids", "labels")}
        if attention() == "flash_attention_2":  # transformers takes its input as packed in a single row only
            inputs = {key: each.view(1, -1) for key, each in inputs.items()}
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(batch["num_tokens"]), loss, norm)
    return {**clock.answer(), "attention": attention(), "liger": on_gpu}


def trl(cell: Cell, config: Path, clock: StepClock) -> Answer:
    """Train with TRL's `SFTTrainer`, tuned: packing, bfloat16, Liger where it is installed, no checkpointing.

    Args:
        cell: The cell.
        config: Our configuration of it; its folder has the documents and the tokenizer.
        clock: Times the steps.

    Raises:
        ImportError: If TRL is not installed.
    """
    require("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Times the steps."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step(trainer.num_tokens, trainer.last_loss, None)

    class Counting(SFTTrainer):  # type: ignore[misc]
        """Keeps the tokens and the loss of each step."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.num_tokens = int(inputs["input_ids"].numel() if mask is None else mask.sum())
            self.last_loss = super().training_step(model, inputs, *args, **kwargs)
            return self.last_loss

    on_gpu = clock.device.type == "cuda"
    options = SFTConfig(
        output_dir=str(config.parent / "trl"), max_length=cell.max_length, packing=True,
        per_device_train_batch_size=cell.batch_size, gradient_checkpointing=False, max_steps=clock.total,
        learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
        logging_steps=clock.total + 1, save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu, report_to="none",
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
    )  # fmt: skip
    texts = [json.loads(line) for line in (config.parent / "rows.jsonl").read_text().splitlines()]
    trainer = Counting(
        model=random_model(cell, clock.device), args=options, train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(config.parent / "tokenizer"), peft_config=lora(),
        callbacks=[Watch()],
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return {**clock.answer(), "attention": attention(), "liger": options.use_liger_kernel}
