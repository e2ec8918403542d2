"""Libraries of a few lines of C that stand between a server and the C library, and the numbers they read."""

import mmap
import shutil
import struct
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Shim:
    """A built library, and the variables that it reads."""

    library: Path
    variables: Mapping[str, str]
    _numbers: mmap.mmap
    _format: str

    def set(self, *numbers: int) -> None:
        """Set the first numbers that the library reads."""
        self._numbers[:] = struct.pack(self._format, *numbers, *self.numbers[len(numbers) :])

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers, some of which the library may have changed."""
        return struct.unpack(self._format, self._numbers[:])


def build_shim(
    source: Path,
    folder: Path,
    numbers: str,
    variable: str,
    others: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
) -> Shim:
    """Build a library; the test is skipped without a C compiler.

    Args:
        source: its only file.
        folder: where it is built.
        numbers: the format of its numbers, for `struct`; they begin with 0.
        variable: names their file to it.
        others: further variables of the server.
        name: by which programs load it, if it stands in for a library; else its file's.
    """
    require_compiler()
    library, file = folder / f"{source.stem}.so", folder / source.stem
    build = ("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")
    named = f"-Wl,-soname,{name or library.name}"
    subprocess.run([*build, named, "-o", library, source, "-ldl"], check=True)
    file.write_bytes(bytes(struct.calcsize(numbers)))
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0)
    return Shim(library, {variable: str(file), **(others or {})}, mapped, numbers)


def require_compiler() -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")


def environment_of(shims: Iterable[Shim]) -> dict[str, str]:
    """Return the variables with which a server loads libraries; its workers do not."""
    environment = {"LD_PRELOAD": ":".join(str(shim.library) for shim in shims)}
    for shim in shims:
        environment.update(shim.variables)
    return environment
