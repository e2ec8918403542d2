"""What a new user has: a folder, and an environment in which nobody has set anything."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("events", "loadledger", "migrations", "runtime", "server")


def copy_examples(here: Path) -> None:
    """Make a folder with what a new user has: the models and their inputs."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "examples", here / "examples", ignore=ignored)


def copy_tree(here: Path) -> None:
    """Make a folder with what a copy of the repository has, as far as it is installed."""
    here.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here)
    for name in (*PACKAGES, "examples"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))


def bare_environment(folder: Path) -> dict[str, str]:
    """Return the environment of somebody who has Python and nothing of ours, for a page that installs it.

    There need be no network: pip fetches nothing, and builds with what this environment has; that stands
    behind what is installed, whose own files come first.
    """
    programs = folder / "programs"
    programs.mkdir()
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    (programs / "python3").symlink_to(python)
    libraries = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
    return fresh_environment(folder / "home") | {
        "PATH": os.pathsep.join([str(programs), os.defpath]),
        "PYTHONPATH": os.pathsep.join(libraries),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **offline,
    }


def fresh_environment(home: Path) -> dict[str, str]:
    """Return the environment of somebody who has installed the command and done nothing else."""
    home.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"}
