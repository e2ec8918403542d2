"""The examples from training to a served answer: the notebook, and the commands of their README."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.pages import ROOT, run_alone, says
from support.servers import QUIET, fresh_environment

NOTEBOOK = ROOT / "examples/pictures.ipynb"
LIMIT_S = 300
"""The longest takes 5 s, on a busy machine ten times that."""


def skip_without(*packages: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"the example uses {' and '.join(missing)}, not installed here")


def printed(notebook: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each cell that printed something, and what it printed."""
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        streams = [
            "".join(each["text"]) for each in cell.get("outputs", ()) if each["output_type"] == "stream"
        ]
        if streams:
            yield number, "".join(streams).replace("\r\n", "\n")


def test_notebook_in_jupyter_prints_what_it_shows(tmp_path: Path) -> None:
    """`jupyter execute` runs all cells in a kernel of its own, and fails at the first error."""
    skip_without("ipykernel", "nbclient", "onnx", "PIL", "sklearn")
    ran = tmp_path / "ran.ipynb"
    jupyter = Path(sys.executable).with_name("jupyter-execute")
    finished = subprocess.run(
        [jupyter, f"--timeout={LIMIT_S}", f"--output={ran}", NOTEBOOK],
        cwd=tmp_path,
        env=fresh_environment(tmp_path / "home") | QUIET,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    shown = list(printed(NOTEBOOK))
    assert len(shown) == 8
    assert list(printed(ran)) == shown


def test_readme_of_the_examples_prints_what_it_says(tmp_path: Path) -> None:
    skip_without("onnx", "skl2onnx", "sklearn")
    if shutil.which("curl") is None:
        pytest.skip("the page uses curl, not installed here")

    def copy(here: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "examples", here / "examples", ignore=ignored)

    environment = fresh_environment(tmp_path / "home") | QUIET
    ran = run_alone("examples/README.md", tmp_path, environment, copy)
    answers = [(block, text) for block, text in ran if block.answer is not None]
    for block, text in answers:
        assert says(block, text), f"{block.text}\nprinted\n{text}"
    assert len(answers) == 4
