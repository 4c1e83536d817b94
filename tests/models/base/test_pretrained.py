from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_lightning.errors import UserError
from sft_lightning.models.base.pretrained import load_pretrained

Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def changed(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[Weights], object]], str]:
    """Copies the model and changes its weights."""

    def change(how: Callable[[Weights], object]) -> str:
        folder = shutil.copytree(model_dir, tmp_path / "changed")
        weights = load_file(folder / "model.safetensors")
        how(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return change


def test_a_whole_model_is_loaded(model_dir: Path) -> None:
    stored = load_file(model_dir / "model.safetensors")
    torch.testing.assert_close(load_pretrained(str(model_dir)).state_dict()[UP], stored[UP], rtol=0, atol=0)


def test_a_missing_weight_is_named_instead_of_drawn(changed: Callable[..., str]) -> None:
    folder = changed(lambda weights: weights.pop(UP))
    with pytest.raises(UserError, match=rf"model_name_or_path: the files of .* lack 1 weights of the model \({UP}\)"):
        load_pretrained(folder)


def test_a_weight_of_another_shape_is_named(changed: Callable[..., str]) -> None:
    folder = changed(lambda weights: weights.update({UP: torch.zeros(7, 32)}))
    with pytest.raises(UserError, match=rf"{UP} has the shape \(7, 32\) .* config\.json describes \(64, 32\)"):
        load_pretrained(folder)


def test_a_truncated_file_is_damaged(changed: Callable[..., str]) -> None:
    folder = changed(lambda weights: None)
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a weight file of .* is damaged"):
        load_pretrained(folder)
