"""Public docstrings say what their users need: arguments, shapes of tensors, the meaning of each field."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "sft_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])
HOOKS = re.compile(r"^(on_|configure_|setup|teardown|training_|validation_|test_|predict_|load_state|state_dict)")
"""Methods that Lightning documents."""

SHAPE = re.compile(r"\([A-Za-z0-9_ ,+·*.…]*,?\)|\b(scalar|tensors?|state|weights?|parameters?|shape)\b", re.IGNORECASE)
"""`(B, S)`, or a word that says there is no single shape."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions of the module and methods of its public classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for body in (tree.body, *(each.body for each in classes)):
        yield from (node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))


def missing(path: Path) -> list[str]:
    """Return what the docstrings of a module leave out, with file and line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in public_functions(tree):
        doc = ast.get_docstring(node) or ""
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given = [arg for arg in every if arg.arg not in ("self", "cls")]
        is_hook = HOOKS.match(node.name) or any("override" in ast.dump(each) for each in node.decorator_list)
        if len(given) >= 2 and "Args:" not in doc and not is_hook:
            found.append(f"{path.name}:{node.lineno} {node.name}: no Args")
        unnamed = [arg.arg for arg in given if "Args:" in doc and f"{arg.arg}:" not in doc.partition("Args:")[2]]
        found += [f"{path.name}:{node.lineno} {node.name}: Args lacks {name}" for name in unnamed]
        annotated = " ".join(ast.unparse(arg.annotation) for arg in given if arg.annotation)
        if "Tensor" in annotated and not is_hook and not SHAPE.search(doc):
            found.append(f"{path.name}:{node.lineno} {node.name}: no shape of its tensors")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and is_dataclass(node):
            doc = ast.get_docstring(node) or ""
            found += [
                f"{path.name}:{each.lineno} {node.name}.{each.target.id}: not documented"
                for each, after in zip(node.body, [*node.body[1:], None], strict=True)
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
                if not each.target.id.startswith("_") and f"{each.target.id}:" not in doc
                if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
            ]
    return found


def is_dataclass(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass, a NamedTuple or a TypedDict."""
    marks = [ast.unparse(each) for each in [*node.decorator_list, *node.bases]]
    return any(mark.split("(")[0] in ("dataclass", "NamedTuple", "TypedDict") for mark in marks)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_arguments_shapes_and_fields(path: Path) -> None:
    assert not missing(path)


def test_a_missing_argument_shape_and_field_are_named(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '@dataclass\nclass A:\n    """A."""\n    b: int\n\ndef f(x: torch.Tensor, y: int) -> None:\n    """Add."""\n'
    )
    assert missing(file) == [
        "module.py:6 f: no Args", "module.py:6 f: no shape of its tensors", "module.py:4 A.b: not documented",
    ]  # fmt: skip
