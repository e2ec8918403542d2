"""A tree of our code in which workers run what `takeover` has, as if a model had taken them over."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from runtime.worker import landlock
from support import takeover


def patch_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch, added: Mapping[str, str]) -> None:
    """Have the fork servers of this process import a copy of `runtime`.

    Args:
        folder: where the copy is made.
        monkeypatch: restores the import path.
        added: code at the end of modules of `runtime.worker`, by name.
    """
    patched = folder / "patched"
    shutil.copytree(Path(landlock.__file__).parents[1], patched / "runtime")
    shutil.copy(takeover.__file__, patched)
    for module, code in added.items():
        with (patched / "runtime" / "worker" / f"{module}.py").open("a") as file:
            file.write(code)
    monkeypatch.syspath_prepend(str(patched))  # the fork server's path is this process's
