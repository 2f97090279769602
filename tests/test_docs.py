"""The documentation is complete. `make test-docs` runs its examples and builds it."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import fisherkern
import fisherkern.info

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPS = [name for name in fisherkern.ops.__all__ if inspect.isfunction(getattr(fisherkern, name))]
FUNCTIONS = [name for name in fisherkern.__all__ if inspect.isroutine(getattr(fisherkern, name))]


def _docstring(name: str) -> str:
    return inspect.getdoc(getattr(fisherkern, name)) or ""


@pytest.mark.parametrize("name", fisherkern.__all__)
def test_public_name_is_in_the_reference_and_has_a_docstring(name: str) -> None:
    directive = rf"^\.\. auto(function|class|exception):: (fisherkern\.)?{name}$"
    assert re.search(directive, (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    assert _docstring(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(_docstring(name))


@pytest.mark.parametrize("name", OPS)
def test_op_documents_its_arguments_errors_and_source(name: str) -> None:
    text = _docstring(name)
    for section in ("Args:", "Returns:", "Raises:", "Source: "):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"no {section!r}"
    described = re.findall(
        r"^    (\w+): ", text.split("Args:")[1].split("Returns:")[0], re.MULTILINE
    )
    assert described == list(inspect.signature(getattr(fisherkern, name)).parameters)


@pytest.mark.parametrize("name", OPS)
def test_op_is_in_the_tables(name: str) -> None:
    family = getattr(fisherkern, name).__module__.split(".")[2]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"`{name}`" in readme or f"`{name.removesuffix('_')}`, `…_`" in readme
    assert f"`{name}`" in (ROOT / "docs" / f"{family}.md").read_text("utf-8")


def test_links_between_pages_of_the_repository() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
