"""Fixtures that migrate the commands of a system and parse the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_lightning.__main__ import main

Migrate = Callable[..., dict[str, Any]]


@pytest.fixture
def migrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Migrate:
    """Migrate a script, a JSON file of options or words, and return the parsed YAML, with its text as `text`."""

    def run(system: str, given: str | dict[str, Any] | list[str]) -> dict[str, Any]:
        if isinstance(given, list):
            args = given
        else:
            path = tmp_path / ("args.json" if isinstance(given, dict) else "train.sh")
            path.write_text(json.dumps(given) if isinstance(given, dict) else given, encoding="utf-8")
            args = [str(path)]
        capsys.readouterr()
        assert main(["migrate", system, *args]) == 0
        text = capsys.readouterr().out
        (tmp_path / "migrated.yaml").write_text(text, encoding="utf-8")
        return {**yaml.safe_load(text), "text": text}

    return run


@pytest.fixture
def accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    """Let our own parser read the YAML that was migrated last, and return the whole configuration."""

    def run() -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["fit", f"--config={tmp_path / 'migrated.yaml'}", "--print_config"])
        assert not end.value.code
        config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return config

    return run
