"""The shape of the code: unique class names, true names in the docs, and maps that leave nothing out."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("answers", "events", "features", "runtime", "nodes", "server", "loadledger")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MIRRORS = {ROOT / "loadledger" / "errors.py"}
"""The client's exceptions have the names of what they show."""

STRUCTURE = ROOT / "docs" / "structure.md"
REFERENCE = re.compile(r"`([\w./]+\.py)`(?::\s+`([\w.]+)`)?")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined_in(path: Path) -> Iterator[str]:
    """Yield the names that a module defines: functions, classes, their methods, and constants."""
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            )
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_public_class_names_are_unique() -> None:
    found = defaultdict[str, list[str]](list)
    for path in set(MODULES) - MIRRORS:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_names_in_structure_page_exist() -> None:
    references = REFERENCE.findall(STRUCTURE.read_text(encoding="utf-8"))
    assert len(references) >= 30
    for file, name in references:
        assert (ROOT / file).is_file(), file
        assert not name or name in defined_in(ROOT / file), f"{file}: {name}"


@pytest.mark.parametrize(
    ("page", "heading"),
    [("README.md", "Where things go in the code"), ("CONTRIBUTING.md", "Where things go")],
)
def test_map_of_the_code_names_all_packages(page: str, heading: str) -> None:
    """The packages are the list `PACKAGES` of setup.py."""
    installed = re.search(r"^PACKAGES = (.+)$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert installed
    assert [each for each in ast.literal_eval(installed[1]) if f"`{each}`" not in section] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/structure.md"])
def test_pages_count_the_requests_that_structure_page_follows(page: str) -> None:
    ways = STRUCTURE.read_text(encoding="utf-8").count("\n## The way of ")
    count = ("two", "three", "four", "five", "six")[ways - 2]
    assert f"follows {count} requests" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["events", "features", "runtime", "server"])
def test_map_of_a_package_names_all_its_modules(package: str) -> None:
    folder = ROOT / package
    named = re.findall(r"`(\w+)[`./]", ast.get_docstring(tree_of(folder / "__init__.py")) or "")
    parts = {path.stem for path in folder.glob("*.py")}
    parts |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert parts - set(named) == {"__init__"}
