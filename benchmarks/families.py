"""Every family of models in every mode of tuning, end to end on tiny random models; prints `docs/families.md`.

    python benchmarks/families.py [--only Llama BLOOM] > docs/families.md

Each pair is a run of its own: a model in a folder, two optimizer steps, the weights that changed compared with those
that were meant to, the adapter exported and verified against the live model.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from family_models import FAMILIES, save_family
from lightning.pytorch import Trainer
from peft import PeftModel

from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.export.write import export_adapter
from sft_lightning.models.isolation import Isolation, measure_isolation
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": AdapterConfig(r=4)},
    "qlora": {"adapter": AdapterConfig(r=4), "quantization": QuantizationConfig(bits=4, quant_type="nf4")},
}

_LEARNS = {"full": "", "lora": r"\.lora_[AB]\.", "qlora": r"\.lora_[AB]\."}
_MAX_LENGTH = 256


@dataclass(frozen=True)
class Outcome:
    """What a run of a family in a mode showed."""

    family: str
    mode: str

    losses: tuple[float, ...]
    """Mean loss per supervised token of each optimizer step, in nats."""

    packing: str
    """What `data.packing: auto` became."""

    isolation: Isolation

    attention: str
    """transformers' name of the attention that the model ran with."""

    chunked_loss: bool
    """Whether the loss was taken from hidden states, so that logits of masked positions never existed."""

    changed: frozenset[str]
    """Names of the parameters that changed."""

    meant: frozenset[str]
    """Names of the parameters that were meant to."""

    export_difference: float | None
    """Largest difference between the logits of the exported adapter and the live ones; `None` without an adapter."""


def run(family: str, mode: str, model: Path, folder: Path) -> Outcome:
    """Train two optimizer steps, and look at what came of it.

    Args:
        family: The family's name.
        mode: A key of `MODES`.
        model: The model's folder, as `save_family` made it.
        folder: For the run's files.
    """
    torch.manual_seed(0)
    data = SFTDataModule(
        DataSpec(
            sources={"toy": SourceConfig(path=str(model / "records.json"))},
            template="alpaca",
            max_length=_MAX_LENGTH,
            packing="auto",
            tokenizer_name_or_path=str(model),
            store_dir=str(folder / "stores"),
        )
    )
    module = _Watched(
        TrainingSpec(
            model_name_or_path=str(model),
            dtype="float32",
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
            **MODES[mode],
        )
    )
    trainer = Trainer(
        max_steps=2, accumulate_grad_batches=8, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data)
    language_model = module.language_model
    changed = {name for name, p in language_model.named_parameters() if not _same_bytes(p, module.before[name])}
    report = None
    if isinstance(language_model, PeftModel):
        report = export_adapter(language_model, data.tokenizer, folder / "adapter", {})
    return Outcome(
        family=family,
        mode=mode,
        losses=tuple(module.losses),
        packing=data.layout.packing,
        isolation=measure_isolation(language_model, len(data.tokenizer), module.device, max_length=_MAX_LENGTH),
        attention=str(module.base_model.config._attn_implementation),
        chunked_loss=module._head is not None,
        changed=frozenset(changed),
        meant=frozenset(name for name in module.before if re.search(_LEARNS[mode], name)),
        export_difference=None if report is None else report.logit_difference,
    )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare bits, not numbers: packed 4-bit weights may read as NaN in the type that they are stored as."""
    one, other = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)


class _Watched(CausalLMModule):
    """Keeps the weights from before training, and the losses."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.before = {name: p.detach().clone() for name, p in self.language_model.named_parameters()}
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._step_loss is not None and not is_accumulating(self.trainer):
            self.losses.append(float(self._step_loss))
        super().on_train_batch_end(outputs, batch, batch_idx)


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as a Markdown table, a row for each family."""
    by_family: dict[str, list[Outcome]] = {}
    cells: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.family, []).append(outcome)
        cells[outcome.family, outcome.mode] = " → ".join(f"{loss:.3f}" for loss in outcome.losses)
    lines = [
        "| family | full | LoRA | QLoRA (NF4) | packing | packed − separate logits | attention | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, row in by_family.items():
        losses = " | ".join(cells.get((family, mode), "—") for mode in MODES)
        worst = max(row, key=lambda outcome: outcome.isolation.difference)
        lines.append(
            f"| {family} | {losses} | "
            f"{_packing(row)} | {worst.isolation.difference:.1e} | {_attention(row[0].attention)} | {_loss(row)} |"
        )
    return "\n".join(lines)


def _packing(row: Sequence[Outcome]) -> str:
    if all(outcome.packing == "best_fit" for outcome in row):
        return "best_fit"
    leak = max(outcome.isolation.leak for outcome in row)
    return f"none: one document moves another's logits by {leak:.1e}"


def _attention(name: str) -> str:
    return {"packed": "ours", "document_mask": "its own, our mask"}.get(name, "its own")


def _loss(row: Sequence[Outcome]) -> str:
    return "chunked" if all(outcome.chunked_loss for outcome in row) else "the model's logits"


def document(outcomes: Sequence[Outcome]) -> str:
    """Return `docs/families.md`."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    wrong = [f"{each.family}, {each.mode}" for each in outcomes if each.changed != each.meant]
    if wrong:
        raise RuntimeError(f"other weights changed than were meant to: {'; '.join(wrong)}")
    largest = max((outcome.export_difference or 0.0 for outcome in outcomes), default=0.0)
    return f"""# Families of models

Written by `python benchmarks/families.py > docs/families.md` ({versions}; CPU, float32).

Each cell is a run of its own on a random two-layer model: two optimizer steps with AdamW, each on all of the same
records. Losses are nats per supervised token, before each step. In every run exactly the weights that were meant to
changed; every exported adapter was opened again by PEFT, and its logits differed from the live ones by {largest:.0e} at
most.

{table(outcomes)}

- **packing** is what `data.packing: auto` became. `best_fit` where it was proven, on the loaded model, that packed
  documents do not see each other: changing one moves the logits of the other by no more than rounding. Where it is not,
  `data.packing: best_fit` stops the run, and `auto` gives each example a row of its own.
- **packed − separate logits** is the largest difference between a document's logits in a packed row and alone, over the
  three modes.
- **attention**: «ours» is `model.attn_implementation: auto` where the family uses transformers' attention interface;
  «its own, our mask» is `auto` where it does not, so that only the mask keeps documents apart.
- **loss**: «chunked» never makes logits of positions without a loss, nor those of all others at once; Mixtral's has the
  loss of its routers added.
- **QLoRA** quantizes what a family calls by its modules: of Mamba that is `in_proj` alone, because its kernels read the
  weights of `x_proj`, `dt_proj` and `out_proj` past their modules.
"""


def main() -> None:
    """Run what is asked for and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    only = parser.parse_args().only
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        for family in only:
            model = save_family(family, Path(temporary))
            outcomes += [run(family, mode, model, model / mode) for mode in MODES]
    print(document(outcomes), end="")


if __name__ == "__main__":
    main()
