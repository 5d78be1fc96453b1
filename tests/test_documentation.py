"""The documentation is complete: every page stands in the site's menu, every public name in the API reference."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = ("ops", "modules", "models", "data", "evaluation", "training", "inference", "visualization")


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted(menu) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_api_reference(room):
    described = re.findall(r"^::: [\w.]*\.(\w+)$", (DOCS / "api" / f"{room}.md").read_text(), re.MULTILINE)
    assert not set(import_module(f"bridge_stg.{room}").__all__) - set(described)
    assert len(described) == len(set(described))


def test_every_example_has_a_tutorial():
    pages = "".join(path.read_text() for path in (DOCS / "tutorials").glob("*.md"))
    assert all(f"examples/{path.name}" in pages for path in (ROOT / "examples").glob("*.py"))
