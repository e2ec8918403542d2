"""The wheel: what is in it, and that it runs without the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from contextlib import suppress
from email.parser import BytesParser
from pathlib import Path

import pytest
from support.servers import CONFINED_LESS, CTRL_C, at_terminal, copy_examples
from support.workers import until

ROOT = Path(__file__).parents[2]
PACKAGES = ("answers", "events", "features", "loadledger", "migrations", "nodes", "runtime", "server")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRY_IT = README.partition("## Try it\n")[2].partition("\n## ")[0]
EXAMPLES = ("*.py", "digits.json", "digits/*/model.onnx")


def source_files() -> set[str]:
    """Return the paths in the wheel of all files that must ship."""
    code = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in code if "__pycache__" not in path.parts}
    examples = {path for pattern in EXAMPLES for path in (ROOT / "examples").glob(pattern)}
    return names | {f"server/{path.relative_to(ROOT).as_posix()}" for path in examples}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without a network: a build leaves files that a later one would pack."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in (*PACKAGES, "examples", "tests", "bench", "tools"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*pip, "--wheel-dir", str(built), str(tree)], cwd=tree)
    [path] = built.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, before the packages of this environment."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    [packages] = home.glob("lib/python*/site-packages")
    # The folders come after the environment's own, and the .pth files in them are not followed: if the
    # distribution is installed there too, even as editable, what is imported is the wheel's.
    ours = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    run([*pip, "--no-compile", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], cwd=home)
    return home


def run(command: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Return what the command printed; it must end with 0."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env or environment(cwd),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(home: Path) -> dict[str, str]:
    """Return an environment without a way back to the tree, such as PYTHONPATH."""
    return {"PATH": os.defpath, "HOME": str(home), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_wheel_has_all_source_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [commands] = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert archive.read(commands) == b"[console_scripts]\nloadledger = loadledger.cli.main:main\n"
    assert names == source_files()


async def test_first_line_of_the_readme_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    """The fixtures do what the line does before the demo, but fetch nothing from a network."""
    line, _ = re.findall(r"^```sh\n(.*?)^```$", TRY_IT, re.MULTILINE | re.DOTALL)
    assert line == "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/loadledger demo\n"
    show = "import events, runtime, server; print(events.__file__, runtime.__file__, server.__file__)"
    files = run([str(installed / "bin" / "python"), "-c", show], cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    out = run([str(installed / "bin" / "loadledger"), "demo"], cwd=tmp_path)
    assert "version 1 reads 97.2% of 599 handwritten digits right" in out
    assert "version 2 reads 99.3% of 599 handwritten digits right" in out
    assert re.search(r"process \d+ is gone", out)
    assert re.search(r"MB before, .* MB with a model, .* MB after", out)
    assert re.search(r"^chain verified: \d+ events", out, re.MULTILINE)
    assert "not so" not in out
    await until(lambda: not processes_of(installed))


async def test_run_prints_what_the_readme_shows_and_a_working_curl(installed: Path, tmp_path: Path) -> None:
    """`pip install .`, `loadledger run FILE.onnx`, and the `curl` that it prints."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed here")
    example = re.findall(r"^```console\n\$ (.*?)```$", README, re.MULTILINE | re.DOTALL)[0]
    line, _, shown = example.partition("\n")
    program, *arguments = line.split()
    copy_examples(tmp_path)
    arguments[1] = str(tmp_path / arguments[1])
    surroundings = environment(tmp_path) | {"LOADLEDGER_PORT": "0"}
    surroundings["PATH"] = os.pathsep.join([str(installed / "bin"), os.defpath])
    command = [str(installed / "bin" / program)]
    with at_terminal(*arguments, environment=surroundings, command=command) as terminal:
        await terminal.until("Ctrl-C stops the server")
        plain = terminal.plain.replace("\r", "")
        said = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8080", plain)
        said = re.sub(rf"^.*{CONFINED_LESS.pattern}\n", "", said)
        assert said.replace(str(tmp_path), "/home/you").startswith(shown)
        asked = plain.partition("\n\n(printf")[2].partition("\n\n")[0]
        answer = json.loads(run(["bash", "-c", f"(printf{asked}"], cwd=tmp_path, env=surroundings))
        name = answer["model_name"]
        assert [output["name"] for output in answer["outputs"]] == ["label", "probabilities"]
        again = run([*command, *arguments], cwd=tmp_path, env=surroundings)
        assert again.startswith(f"{name} version 1: loaded\n")  # on this server, not added again
        terminal.press(CTRL_C)
        assert await terminal.end() == 0


def test_metadata_names_license_and_what_the_readmes_second_line_needs(wheel: Path) -> None:
    """The line cannot run in its own suite: the extra and pytest's settings are checked instead."""
    _, line = re.findall(r"^```sh\n(.*?)^```$", TRY_IT, re.MULTILINE | re.DOTALL)
    assert line == "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest\n"
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = BytesParser().parsebytes(archive.read(name))
    required = about.get_all("Requires-Dist", [])
    assert about["License-Expression"] == "Apache-2.0 AND MIT"
    assert {"LICENSE", "server/static/vendor/LICENSE-preact.txt"} <= set(about.get_all("License-File", []))
    assert "aiohttp-apispec==3.0.0b2" in required
    needed = {
        re.split(r"[^\w-]", text)[0] for text in required if re.search(r"""; extra == ["']test["']$""", text)
    }
    assert {"pytest", "pytest-aiohttp", "hypothesis", "onnx", "openapi-spec-validator"} <= needed
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


def processes_of(home: Path) -> list[bytes]:
    """Return the command lines of all processes that run the interpreter of this environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found.append(entry.read_bytes())
    return [line for line in found if line.startswith(os.fsencode(home))]
