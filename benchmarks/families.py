"""Train each family of models in each mode of tuning, end to end on tiny random models; writes `docs/families.md`.

    python benchmarks/families.py                     # all families
    python benchmarks/families.py --only Llama BLOOM  # prints the table of some families, and writes no file

Each combination is a separate run: two optimizer steps, a comparison of the weights that changed with those that should
change, and an exported adapter that is verified against the live model.
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
from markdown_table import markdown_table
from peft import PeftModel
from tiny_runs import cpu_trainer

from sft_lightning.compat.lightning.loops import is_accumulating
from sft_lightning.data.datamodule import SFTDataModule
from sft_lightning.data.sources.source import SourceConfig
from sft_lightning.data.spec import DataSpec
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.attention.isolation import Isolation, measure_isolation
from sft_lightning.models.base.config import QuantizationConfig
from sft_lightning.models.export.write import export_adapter
from sft_lightning.training.forward import inputs_of_rows
from sft_lightning.training.module import CausalLMModule
from sft_lightning.training.spec import TrainingSpec

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": AdapterConfig(r=4)},
    "qlora": {"adapter": AdapterConfig(r=4), "quantization": QuantizationConfig(bits=4, quant_type="nf4")},
}

_LEARNS = {"full": "", "lora": r"\.lora_[AB]\.", "qlora": r"\.lora_[AB]\."}
_MAX_LENGTH = 256
PAGE = Path(__file__).parents[1] / "docs" / "families.md"


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    family: str
    """Name of the family."""

    mode: str
    """A key of `MODES`."""

    losses: tuple[float, ...]
    """Mean loss per supervised token of each optimizer step, in nats."""

    packing: str
    """The decision of `data.packing: auto`."""

    isolation: Isolation
    """How much packed documents depend on each other."""

    attention: str
    """transformers' name of the attention that was used."""

    chunked_loss: bool
    """Whether the loss was computed from hidden states, without logits at masked positions."""

    changed: frozenset[str]
    """Names of the parameters that changed."""

    intended: frozenset[str]
    """Names of the parameters that should change."""

    export_difference: float | None
    """Largest difference between the logits of the exported adapter and the live ones; `None` without an adapter."""


def run(family: str, mode: str, model: Path, folder: Path) -> Outcome:
    """Train two optimizer steps, and return the result.

    Args:
        family: The family's name.
        mode: A key of `MODES`.
        model: The model's folder, from `save_family`.
        folder: Folder for the run's files.
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
    trainer = cpu_trainer(folder, max_steps=2, accumulate_grad_batches=8, log_every_n_steps=1)
    trainer.fit(module, data)
    language_model = module.language_model
    changed = {name for name, p in language_model.named_parameters() if not _same_bytes(p, module.before[name])}
    report = None
    if isinstance(language_model, PeftModel):
        report = export_adapter(
            language_model, data.tokenizer, folder / "adapter", {}, stop_token_id=data.stop_token_id
        )
    return Outcome(
        family=family,
        mode=mode,
        losses=tuple(module.losses),
        packing=data.layout.packing,
        isolation=measure_isolation(
            language_model,
            len(data.tokenizer),
            inputs_of_rows(module.device),
            max_length=_MAX_LENGTH,
            batch_size=3,
        ),
        attention=str(module.base_model.config._attn_implementation),
        chunked_loss=module.head is not None,
        changed=frozenset(changed),
        intended=frozenset(name for name in module.before if re.search(_LEARNS[mode], name)),
        export_difference=None if report is None else report.logit_difference,
    )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare bits: packed 4-bit weights may read as NaN in the type that they are stored as."""
    one, other = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)


class _Watched(CausalLMModule):
    """Keeps the initial weights, and the losses."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.before = {name: p.detach().clone() for name, p in self.language_model.named_parameters()}
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.step.loss is not None and not is_accumulating(self.trainer):
            self.losses.append(float(self.step.loss))
        super().on_train_batch_end(outputs, batch, batch_idx)


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the outcomes as a Markdown table with a row for each family."""
    by_family: dict[str, list[Outcome]] = {}
    cells: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.family, []).append(outcome)
        cells[outcome.family, outcome.mode] = " → ".join(f"{loss:.3f}" for loss in outcome.losses)
    head = ("family", "full", "LoRA", "QLoRA (NF4)", "packing", "packed − separate logits", "attention", "loss")
    rows = []
    for family, row in by_family.items():
        losses = [cells.get((family, mode), "—") for mode in MODES]
        worst = max(row, key=lambda outcome: outcome.isolation.difference)
        attention = _attention(row[0].attention)
        rows.append([family, *losses, _packing(row), f"{worst.isolation.difference:.1e}", attention, _loss(row)])
    return markdown_table(head, rows)


def _packing(row: Sequence[Outcome]) -> str:
    if all(outcome.packing == "best_fit" for outcome in row):
        return "best_fit"
    leak = max(outcome.isolation.leak for outcome in row)
    return f"none: replacing a document changes another's logits by {leak:.1e}"


def _attention(name: str) -> str:
    return {"packed": "packed", "document_mask": "own, document mask"}.get(name, "own")


def _loss(row: Sequence[Outcome]) -> str:
    return "chunked" if all(outcome.chunked_loss for outcome in row) else "model's logits"


def document(outcomes: Sequence[Outcome]) -> str:
    """Return `docs/families.md`."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    wrong = [f"{each.family}, {each.mode}" for each in outcomes if each.changed != each.intended]
    if wrong:
        raise RuntimeError(f"the weights that changed are not those that should: {'; '.join(wrong)}")
    largest = max((outcome.export_difference or 0.0 for outcome in outcomes), default=0.0)
    return f"""# Families of models

Written by `python benchmarks/families.py` ({versions}; CPU, float32).

Each cell is a separate run on a random two-layer model: two optimizer steps with AdamW, each on the same records. It
shows the loss before each step, in nats per supervised token. In every run, exactly the intended weights changed. Every
exported adapter was loaded again with PEFT, and its logits differed from the live ones by at most {largest:.0e}.

{table(outcomes)}

- **packing** is the decision of `data.packing: auto`. It is `best_fit` if packed documents do not see each other in the
  loaded model: replacing one changes the logits of the other by no more than rounding. Otherwise, `auto` gives each
  example a row of its own, and `data.packing: best_fit` stops the run.
- **packed − separate logits** is the largest difference between a document's logits in a packed row and alone, over the
  three modes.
- **attention**: "packed" is our attention function, which `model.attn_implementation: auto` uses for families with
  transformers' attention interface. "own, document mask" is the family's own attention with our mask, which keeps
  documents apart. "own" is the family's own code, unchanged.
- **loss**: "chunked" computes logits only for positions with a loss, and only some of them at a time. For Mixtral, the
  load-balancing loss of the routers is added.
- **QLoRA** quantizes the layers that a family calls. For Mamba this is only `in_proj`: its kernels read the weights of
  `x_proj`, `dt_proj` and `out_proj` without calling the layers.
"""


def main() -> None:
    """Run the families, and write the page or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help="print only these families")
    only = parser.parse_args().only
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        for family in only or FAMILIES:
            model = save_family(family, Path(temporary))
            outcomes += [run(family, mode, model, model / mode) for mode in MODES]
    if only:
        print(table(outcomes))
    else:
        PAGE.write_text(document(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
