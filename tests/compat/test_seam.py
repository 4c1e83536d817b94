"""Nothing outside `sft_lightning/compat` touches what a library does not document, or patches it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_lightning.strategies.fsdp2.strategy import FSDP2

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "sft_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])
OUTSIDE = [file for file in FILES if ROOT / "sft_lightning" / "compat" not in file.parents]

DOCUMENTED = {
    "accelerate": ("utils",),
    "bitsandbytes": ("functional", "nn.modules", "optim"),  # nn.modules: nn itself, which has no types
    "datasets": (),
    "deepspeed": ("ops.adam", "ops.op_builder"),
    "jsonargparse": ("typing",),
    "lightning": (
        "fabric.plugins.io.torch_io", "pytorch", "pytorch.callbacks", "pytorch.cli", "pytorch.loggers",
        "pytorch.plugins.precision.deepspeed", "pytorch.strategies", "pytorch.utilities",
    ),
    "peft": ("tuners", "tuners.tuners_utils", "utils"),  # tuners_utils: the reference has BaseTunerLayer there
    "tokenizers": (),
    "torch": (
        "autograd.function", "distributed", "distributed.device_mesh", "distributed.fsdp", "distributed.tensor",
        "nn", "nn.functional", "optim", "optim.lr_scheduler", "utils.checkpoint",
    ),
    "torchmetrics": ("functional.text",),
    "transformers": (
        "generation.streamers", "modeling_layers", "pytorch_utils",  # exported by transformers itself
        "utils.logging",
    ),
}  # fmt: skip
"""Library → its modules, besides the top one, that its reference documents."""

NAMED_TUPLE = {"_asdict", "_fields", "_replace"}
"""Documented; the underscore keeps them apart from fields."""

OURS = {name for file in OUTSIDE for name in re.findall(r"def (_[a-z]\w*)\(", file.read_text(encoding="utf-8"))}
"""Private functions of this package, which its own modules may call on each other's objects."""


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in NAMED_TUPLE


def undocumented(module: str, *names: str) -> list[str]:
    """Return what an import takes that its library does not document."""
    library, _, rest = module.partition(".")
    if library not in DOCUMENTED:
        return []
    return [module] if rest and rest not in DOCUMENTED[library] else [name for name in names if is_private(name)]


def touched_by(node: ast.AST) -> list[str]:
    """Return the undocumented names that a piece of source touches, and the attributes that it patches."""
    match node:
        case ast.ImportFrom(module=str(module), names=names):
            return undocumented(module, *(each.name for each in names))
        case ast.Import(names=names):
            return [name for each in names for name in undocumented(each.name)]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
            return undocumented(module)
        case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
            return [name] if is_private(name) and name not in OURS else []
        case ast.Attribute(value=ast.Name(id="self" | "cls")):
            return []
        case ast.Attribute(attr=name, ctx=context):
            patched = isinstance(context, ast.Store) and name in ("forward", "__class__")
            return [name] if patched or (is_private(name) and name not in OURS) else []
    return []


def broken_rules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for name in touched_by(node):
            yield f"{file.name}:{getattr(node, 'lineno', 0)}: {name} belongs into sft_lightning/compat/<library>.py"


def test_no_undocumented_name_of_a_library_is_touched_outside_compat() -> None:
    assert [rule for file in OUTSIDE for rule in broken_rules(file)] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from peft.utils.other import AuxiliaryTrainingWrapper", "peft.utils.other"),
        ("from transformers import _x", "_x"),
        ("import torch._subclasses", "torch._subclasses"),
        ("trainer.fit_loop._should_accumulate()", "_should_accumulate"),
        ("super()._init_optimizers()", "_init_optimizers"),
        ("getattr(model, '_resize_cache', None)", "_resize_cache"),
        ("importlib.import_module('deepspeed.runtime.zero.stage3')", "deepspeed.runtime.zero.stage3"),
        ("layer.forward = print", "forward"),
        ("layer.__class__ = Other", "__class__"),
    ],
)
def test_a_touched_name_is_named_with_its_line(source: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"\n{source}\n")
    assert list(broken_rules(tmp_path / "module.py")) == [
        f"module.py:2: {name} belongs into sft_lightning/compat/<library>.py"
    ]


@pytest.mark.parametrize(
    "source",
    ["self._own", "row._replace(a=1)", "from torch.nn import functional", "import json._x", "layer.forward(x)"],
)
def test_what_is_ours_or_documented_is_allowed(source: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert list(broken_rules(tmp_path / "module.py")) == []


def private_names_of(kind: type) -> set[str]:
    try:
        return set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", inspect.getsource(kind)))
    except (OSError, TypeError):  # not written in Python
        return set()


def library_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] in DOCUMENTED]


def test_no_class_of_ours_uses_a_private_name_of_the_library_class_that_it_extends() -> None:
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in OUTSIDE]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    kinds = [each for module in modules for _, each in inspect.getmembers(module, inspect.isclass)]
    ours = {kind for kind in kinds if kind.__module__ in names and library_bases(kind)}
    assert FSDP2 in ours
    theirs = {kind: set().union(*map(private_names_of, library_bases(kind))) for kind in ours}
    assert {kind: shared for kind in ours if (shared := private_names_of(kind) & theirs[kind])} == {}
