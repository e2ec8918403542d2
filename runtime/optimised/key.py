"""The key of an optimised model: its sources, the ONNX Runtime, the CPU, and the device if it is for one.

A difference in any of these is another key. Weights packed for one CPU may crash or slow down another one, so
the key has the kinds of CPU in /proc/cpuinfo (proc(5)) and their features. Frequencies, core numbers and
microcode revisions are left out: they change while the CPU stays the same, and the features show a microcode
that takes one away. So is the number of threads: for 1, 2, 3, 8 and 16 threads the packed weights of five
networks were equal byte for byte, and their graphs differed only in random names, as those of two runs with
one thread do.

For a load on a device, the key also has the device, its provider with the version, its hardware, and whether
nodes may fall back to the CPU.
"""

import hashlib
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from events.codec import encode_canonical
from runtime.wire import FoundDevice, TargetDevice

PROC = Path("/proc")
LAYOUT: Literal[5] = 5
"""Version of how optimised models are made and stored; a new number is a new key for each."""
X86 = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")
MAX_TEXT_BYTES = 16 * 2**20
"""Limit of what is read: enough for 8,000 cores of 2 kB each."""
_PACKAGE, _LIBRARIES = "onnxruntime", "capi"
"""ONNX Runtime's package, and its folder of libraries."""
_DESCRIPTION = "build_and_package_info.py"
"""The file beside the libraries with the package's name and version."""


@cache
def cpu_features(proc: Path = PROC) -> str:
    """Return the SHA-256, in 64 hex digits, of the kinds of CPU of this machine and their features.

    It is the same on all machines without that information. Cached: with hundreds of cores the file takes
    milliseconds. A virtual machine that moves to another CPU while it runs keeps its hash.
    """
    try:
        with (proc / "cpuinfo").open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    lines = (line.partition(":") for line in text.splitlines())
    named = ((name.strip(), sorted(set(value.split()))) for name, _, value in lines)
    found = {(name, *words) for name, words in named if name in X86 + ARM}  # of all kinds of cores
    return hashlib.sha256(encode_canonical(sorted(found)).encode()).hexdigest()


def make_key(digest: str, device: Sequence[str | bool] | None = None) -> str:
    """Return the key of an optimised model: SHA-256, in 64 hex digits, of all that it depends on.

    The other session options are the same for all models; whoever changes them increments `LAYOUT`.

    Args:
        digest: of the version's files (`events.types.digest_of`).
        device: the description of that of the load (`describe_target`); None is the CPU.
    """
    parts: dict[str, object] = {
        "layout": LAYOUT,
        "runtime": _describe_runtime(),
        "machine": platform.machine(),
        "cpu": cpu_features(),
        "sources": digest,
    }
    if device is not None:
        parts["device"] = device
    return hashlib.sha256(encode_canonical(parts).encode()).hexdigest()


def describe_target(target: TargetDevice, found: FoundDevice) -> tuple[str | bool, ...]:
    """Return what of a device an optimised model depends on; the CPU's features are in each key."""
    return target.library.ep_name, found.version, target.name, found.hardware, target.falls_back


def runtime_was_replaced(pid: int, proc: Path = PROC) -> bool:
    """Return whether a process has mapped an ONNX Runtime that was replaced; False if it is gone."""
    try:
        lines = (proc / str(pid) / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(f"/{_PACKAGE}/{_LIBRARIES}/" in line and line.endswith(" (deleted)") for line in lines)


def _describe_runtime() -> str:
    """Describe the installed ONNX Runtime, which this process must not import.

    It may come from any of several distributions, and be replaced while this process runs. To look its
    distribution up takes a second; the package's own description and the sizes of its libraries identify it,
    too, and stay the same after a reinstallation.
    """
    found = _find_package()
    for package in (found.submodule_search_locations if found is not None else None) or ():
        folder = Path(package, _LIBRARIES)
        with suppress(OSError):
            return _describe_folder(folder, folder.stat().st_mtime_ns)
    return ""


@cache
def _find_package() -> ModuleSpec | None:
    return find_spec(_PACKAGE)


@lru_cache(maxsize=1)
def _describe_folder(folder: Path, _changed_ns: int) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = [[path.name, path.stat().st_size] for path in files if ".so" in path.suffixes]
    description = [path.read_text(errors="replace") for path in files if path.name == _DESCRIPTION]
    return encode_canonical([description, sizes])
