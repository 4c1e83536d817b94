"""Tokens per second of a training step: ours beside a bare PyTorch loop on the same rows, model, attention and loss.

    python benchmarks/train.py [--dtype bfloat16] [--repeats 3]

A 19.5 M parameter Llama (hidden 256, 4 layers, vocabulary 32000), 256 documents of Alpaca-like lengths packed to 2048,
fused AdamW, eight steps of which the first is dropped. The two take turns, the best of each counts, and their losses
are compared.
Results, with hardware and versions, go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from callbacks import Throughput
from sft_lightning.cli import quiet_libraries
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.examples import Corpus
from sft_lightning.data.report import SourceReport
from sft_lightning.data.sources import SourceConfig
from sft_lightning.data.store import TokenStore
from sft_lightning.models.attention import PACKED
from sft_lightning.training.losses import predicting_columns, weighted_cross_entropy
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.optim import LRScheduleConfig
from sft_lightning.types import Batch, TokenizedExample

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
STEPS = 8
RESULTS = Path(__file__).parent / "results"


class SyntheticData(SFTDataModule):
    """Random token ids of Alpaca-like lengths, every token supervised."""

    def __init__(self) -> None:
        super().__init__(sources={"random": SourceConfig(path="-")}, max_length=2048)
        backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
        self.__dict__["tokenizer"] = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
        )

    def setup(self, stage: str) -> None:
        generator = np.random.default_rng(1)
        lengths = generator.lognormal(4.8, 0.8, 256).astype(np.int64).clip(16, 1024)
        examples = [
            TokenizedExample(generator.integers(2, 32000, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths
        ]
        store = TokenStore.from_examples(examples)
        self._train = [Corpus("random", store, store.lengths, SourceReport("train"))]


class StepTimes(Callback):
    """Seconds and loss of each optimizer step."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, *args: Any) -> None:
        self.marks.append(time.perf_counter())


def adamw(parameters: Any) -> torch.optim.AdamW:
    """Return the optimizer of both."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)


def ours(dtype: str) -> tuple[list[float], list[float]]:
    """Train with the trainer; return the seconds and the loss of each step."""
    torch.manual_seed(0)
    module = CausalLMModule(
        from_config=CONFIG,
        dtype=dtype,
        gradient_checkpointing=False,
        optimizer=adamw,
        lr_scheduler=LRScheduleConfig(name="constant"),
    )
    times = StepTimes()
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=[times, Throughput()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(module, SyntheticData())
    return np.diff(times.marks).tolist(), times.losses


def bare(dtype: str, batches: Sequence[Batch]) -> tuple[list[float], list[float]]:
    """Train with a loop of a dozen lines; return the seconds and the loss of each step."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIG)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=PACKED).train()
    optimizer = adamw(model.parameters())
    marks, losses = [time.perf_counter()], []
    for batch in batches:
        columns = predicting_columns(batch["labels"])
        out = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"],
            document_lengths=batch["document_lengths"], logits_to_keep=columns, use_cache=False,
        )  # fmt: skip
        sums = weighted_cross_entropy(out.logits, columns, batch["labels"], batch["loss_weights"])
        loss = sums.loss / batch["denominator"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        marks.append(time.perf_counter())
    return np.diff(marks).tolist(), losses


def main() -> None:
    """Take turns, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    quiet_libraries()
    warnings.filterwarnings("ignore")
    data = SyntheticData()
    data.setup("fit")
    batches = [batch for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False)]
    tokens = sum(batch["num_tokens"] for batch in batches[1:])
    best = {"ours": float("inf"), "bare loop": float("inf")}
    losses: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for name in best:
            seconds, losses[name] = ours(args.dtype) if name == "ours" else bare(args.dtype, batches)
            best[name] = min(best[name], sum(seconds[1:]))
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning")},
        "dtype": args.dtype,
        "tokens_per_second": {name: round(tokens / seconds) for name, seconds in best.items()},
        "ours_over_bare": round(best["bare loop"] / best["ours"], 3),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"train_cpu_{args.dtype}_{result['date']}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
