"""The pages about the server itself: their examples are run, and what they print is compared."""

import os
import shutil
import sys
from pathlib import Path

from support.pages import ROOT, expected, printed_as, run_page
from support.process import clean_environment
from support.standing import standing
from yarl import URL


def test_the_examples_of_the_page_about_models_do_what_it_says(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=ignored)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with standing(tmp_path / "examples") as server:
        port = str(URL(server.url).port)
        compared = 0
        environment = clean_environment() | {"PATH": path}
        for block, printed in run_page("docs/models.md", tmp_path, port, environment):
            if block.answer is not None:
                assert printed_as(block, printed) == expected(block), block.text
                compared += 1
    assert compared == 2
