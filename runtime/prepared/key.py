"""What a prepared form depends on: with anything of it another, the form is another, under another key."""

import hashlib
import platform
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from events.canonical import canonical
from runtime.prepared.cpu import cpu_features
from runtime.prepared.files import LAYOUT
from runtime.wire import SourceHash

PROC = Path("/proc")
_PACKAGE = "onnxruntime"
_LIBRARIES = "capi"
"""Where the package has its libraries."""
_SAYS = "build_and_package_info.py"
"""Where, beside them, it has its name and version."""


def key_of(sources: Sequence[SourceHash], threads: int) -> str:
    """Return the key of what is prepared: SHA-256, in 64 hex digits, of all that it depends on.

    What else is set for a session is the same for all of them, and a change of that is one of `LAYOUT`.

    Args:
        sources: all files of the version, in any order.
        threads: that a session computes with.
    """
    told = {
        "layout": LAYOUT,
        "runtime": _runtime(),
        "machine": platform.machine(),
        "cpu": cpu_features(),
        "threads": threads,
        "sources": sorted([source.path, source.sha256] for source in sources),
    }
    return hashlib.sha256(canonical(told).encode()).hexdigest()


def runtime_was_replaced(pid: int, proc: Path = PROC) -> bool:
    """Tell whether a process has an ONNX Runtime that is no longer the installed one, nor what the key says.

    Of a process that is gone it is not.
    """
    try:
        lines = (proc / str(pid) / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(f"/{_PACKAGE}/{_LIBRARIES}/" in line and line.endswith(" (deleted)") for line in lines)


def _runtime() -> str:
    """Name the ONNX Runtime that is installed, which this process must not import.

    It may come from any of several distributions, and be replaced while this process runs. To ask all that
    are installed whose it is takes a second; what the package says of itself, with the sizes of its
    libraries, tells as much, and the same after it was installed again.
    """
    folder = _libraries()
    try:
        return "" if folder is None else _described(folder, folder.stat().st_mtime_ns)
    except OSError:
        return ""


@cache
def _libraries() -> Path | None:
    found = find_spec(_PACKAGE)
    places = (found.submodule_search_locations if found is not None else None) or []
    return next((Path(place, _LIBRARIES) for place in places), None)


@lru_cache(maxsize=1)
def _described(folder: Path, _changed_ns: int) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = [[path.name, path.stat().st_size] for path in files if ".so" in path.suffixes]
    says = [path.read_text(errors="replace") for path in files if path.name == _SAYS]
    return canonical([says, sizes])
