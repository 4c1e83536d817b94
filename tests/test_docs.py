from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("generate")


def test_the_page_of_the_configuration_is_what_the_code_says(generate: ModuleType) -> None:
    said = "docs/configuration.md is not what the code says; run make docs"
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), said


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the page has DeepSpeed's names too")
def test_the_page_of_compatibility_is_what_the_code_says() -> None:
    written = script("generate_compatibility")
    said = "docs/compatibility.md is not what the code says; run make docs"
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), said


def test_every_key_of_the_configuration_has_a_meaning(generate: ModuleType) -> None:
    rows = [line.split(" | ") for line in generate.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row[0] for row in rows if not row[3].strip(" |")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def literals_of(package: Path) -> list[str]:
    """The literal parts, of at least 10 characters, of all strings in a package; a docstring is one of them."""
    texts = (path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    constants = (node.value for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return [each for each in constants if isinstance(each, str) and len(each.strip()) >= 10]


def test_the_messages_quoted_in_troubleshooting_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) >= 8
    literals = literals_of(ROOT / "sft_lightning")
    parts = [part for message in quoted for part in re.split(r"…|\d+", message) if len(part.strip()) >= 10]
    assert [part for part in parts if not any(each in part or part.strip() in each for each in literals)] == []
