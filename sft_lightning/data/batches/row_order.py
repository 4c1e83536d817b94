"""What the order of the training rows depends on; a checkpoint's position means nothing in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from sft_lightning.data.plan.epoch_plan import Layout, PackingSetting
from sft_lightning.data.spec import DataSpec
from sft_lightning.errors import UserError

_TEMPLATE_TEXT = "text of data.template"
_STREAMED = "streamed"


def decided_layout(model: object, packing: PackingSetting) -> Layout | None:
    """Return how documents share rows; `None` while a model has not decided about `packing: auto`.

    Args:
        model: The trainer's model, whose `layout` says what it decided; without one, `auto` counts as `best_fit`.
        packing: `data.packing` as written.
    """
    decided: Layout | None = getattr(model, "layout", None)
    if packing != "auto" and (decided is None or decided.packing != packing):
        return Layout(packing=packing)  # a model that trains again still has the layout of its earlier run
    return decided if hasattr(model, "layout") else Layout(packing="best_fit")


def row_order(
    spec: DataSpec, layout: Layout, *, rows_per_step: int, tokens: str | None, chat_template: str
) -> dict[str, Any]:
    """Return what the order of the training rows depends on, for a checkpoint.

    Args:
        spec: The YAML's keys under `data`.
        layout: How documents share rows.
        rows_per_step: The global batch.
        tokens: A hash of the training tokens; `None` if they were not read ahead.
        chat_template: The tokenizer's chat template.
    """
    return {
        "data.template": spec.template,
        _TEMPLATE_TEXT: xxhash.xxh3_64_hexdigest(chat_template.encode()),
        "data.loss_on": spec.loss_on,
        "seed": spec.seed,
        "packing": layout.packing,
        "max_length": spec.max_length,
        "global batch (rows)": rows_per_step,
        "blend": f"{spec.blend.by}, temperature {spec.blend.temperature}",
        "weights": [(source.weight, source.max_epochs) for source in spec.sources_of("train").values()],
        "tokens": _streamed_tokens(spec) if spec.streams else tokens,
    }


def check_row_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a checkpoint's position means the same rows here.

    Args:
        saved: `row_order` of the run that saved the checkpoint.
        now: `row_order` of this run.

    Raises:
        UserError: If it does not, with what changed.
    """
    changed = {key: f"{key}: {value} → {now[key]}" for key, value in saved.items() if now[key] != value}
    if _TEMPLATE_TEXT not in changed:
        changed.pop("data.template", None)  # the same template under another name
    elif "data.template" in changed:
        changed.pop(_TEMPLATE_TEXT)
    if "tokens" not in changed and not str(now["tokens"]).startswith(_STREAMED):
        changed.pop("data.loss_on", None)  # no record has a message that it is about
    if changed.keys() & {"data.template", _TEMPLATE_TEXT, "data.loss_on"}:
        changed.pop("tokens", None)  # they follow from these
    if "tokens" in changed:
        changed["tokens"] = f"data.sources: other {changed['tokens']}"
    if changed and now["tokens"] is not None:
        raise row_order_error(list(changed.values()))


def row_order_error(changed: Sequence[str]) -> UserError:
    """Return the error of a run that would continue a checkpoint in another order of rows.

    Args:
        changed: Each setting that differs, as `packing: best_fit → none`.
    """
    return UserError(
        f"--ckpt_path: the checkpoint was saved with different data settings: {'; '.join(changed)}; restore the old "
        "values, or start a new run from its weights with model.adapter.path (or model.model_name_or_path)"
    )


def _streamed_tokens(spec: DataSpec) -> str:
    """Return what decides which examples of streamed sources are seen; their tokens are compared by `StreamLoader`."""
    taken = [(name, config.max_examples) for name, config in spec.sources_of("train").items()]
    return f"{_STREAMED}: {taken}, min_length {spec.min_length}, overlong {spec.overlong}"
