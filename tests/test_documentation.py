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
    paths = re.findall(r"^::: ([\w.]+)$", (DOCS / "api" / f"{room}.md").read_text(), re.MULTILINE)
    described = [path.rpartition(".")[2] for path in paths]
    assert not set(import_module(f"bridge_stg.{room}").__all__) - set(described)
    assert len(described) == len(set(described))
    # A module of the same name would be described in place of the function.
    assert not [path for path in paths if module_exists(ROOT / path.replace(".", "/"))]


def module_exists(path):
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_every_example_has_a_tutorial():
    pages = "".join(path.read_text() for path in (DOCS / "tutorials").glob("*.md"))
    assert all(f"examples/{path.name}" in pages for path in (ROOT / "examples").glob("*.py"))


FOLDERS = "bridge_stg|triton_kernels|csrc|benchmarks|tests|examples|docs|" + "|".join(ROOMS) + "|cli"
NAMED_FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*\.(?:py|md|cpp|h|cu|cuh|sh|yaml|json|svg))`")


def test_files_that_pages_name_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    named = {(page.name, file) for page in pages for file in NAMED_FILE.findall(page.read_text())}
    assert len(named) > 20
    missing = {
        (page, file) for page, file in named if not any((top / file).is_file() for top in (ROOT, ROOT / "bridge_stg"))
    }
    assert not missing
