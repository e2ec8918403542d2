"""The key of a cached model: its sources, the ONNX Runtime, the CPU and the number of threads.

A difference in any of these is another key. Weights packed for one CPU may crash or slow down another one, so
the key has the kinds of CPU in /proc/cpuinfo (proc(5)) and their features. Frequencies, core numbers and
microcode revisions are left out: they change while the CPU stays the same, and the features show a microcode
that takes one away.
"""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from events.clock import format_timestamp
from events.codec import encode_canonical
from runtime.cache.files import LAYOUT, Figure, Manifest
from runtime.wire import Form, HashedFile, SourceHash, Tensor

PROC = Path("/proc")
KIND = frozenset(
    (
        *("vendor_id", "cpu family", "model", "model name", "stepping"),  # x86
        *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),  # ARM
    )
)
FEATURES = frozenset(("flags", "Features"))
"""As x86 and ARM call the list of what a CPU can do."""
MAX_TEXT_BYTES = 16 * 2**20
"""Of what is read: enough for 8,000 cores, which have 2 kB each."""


@cache
def cpu_features(proc: Path = PROC) -> str:
    """Name the kinds of CPU that this machine has, and what they can do.

    Read once: with hundreds of cores the file takes milliseconds. Who moves to another CPU while running, in
    a virtual machine, keeps the name.

    Args:
        proc: where the proc file system is.

    Returns:
        A SHA-256, in 64 hex digits; the same one on all machines that do not say.
    """
    try:
        with (proc / "cpuinfo").open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    return hashlib.sha256(encode_canonical(sorted(_kinds(text))).encode()).hexdigest()


def _kinds(text: str) -> set[tuple[tuple[str, str], ...]]:
    """Describe each kind of processor once; there are several where some cores are small."""
    kinds = {tuple(sorted(_description(processor))) for processor in text.split("\n\n")}
    return kinds - {()}


def _description(processor: str) -> Iterator[tuple[str, str]]:
    for line in processor.splitlines():
        name, _, value = line.partition(":")
        name = name.strip()
        if name in KIND:
            yield name, value.strip()
        elif name in FEATURES:
            yield "features", " ".join(sorted(set(value.split())))


_PACKAGE = "onnxruntime"
_LIBRARIES = "capi"
"""Where the package has its libraries."""
_SAYS = "build_and_package_info.py"
"""Where, beside them, it has its name and version."""


def make_key(sources: Sequence[SourceHash], threads: int) -> str:
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
    return hashlib.sha256(encode_canonical(told).encode()).hexdigest()


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
    return encode_canonical([says, sizes])


MAX_TIME_S = 250_000_000_000
"""In the year 9892: a file's time can be later, but then no date can be written."""


@dataclass(frozen=True, slots=True)
class FinishedForm:
    """A form that was made and found to be of use.

    Attributes:
        form: which.
        files: what the worker said that it wrote, directly in the draft.
        sources: what it was made of.
        model_id: whose files those were.
        version: of that model.
        took_ms: what making and trying it took.
        figures: what was measured, for people.
        tried: why each form that was tried before it was left out.
    """

    form: Form
    files: tuple[HashedFile, ...]
    sources: tuple[SourceHash, ...]
    model_id: str
    version: int
    took_ms: int
    figures: Mapping[str, Figure] = field(default_factory=dict)
    tried: Mapping[Form, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known for a key.

    Attributes:
        key: as `make_key` makes it.
        model_id: what it was made of; other models with the same files use it too.
        version: of that model.
        form: None if no form is of use.
        sha256: of the form.
        bytes: what its files take.
        made_at: when, as the ledger writes times.
        used_at: when it was used last.
        took_ms: what making and trying it took.
        figures: what was measured.
        tried: why each other form was left out.
        untried_on: if nothing could be tried, the SHA-256 of the inputs that there were for it.
    """

    key: str
    model_id: str
    version: int
    form: Form | None
    sha256: str | None
    bytes: int
    made_at: str
    used_at: str
    took_ms: int
    figures: Mapping[str, Figure]
    tried: Mapping[Form, str]
    untried_on: str | None = None


@dataclass(frozen=True, slots=True)
class Cleared:
    """How many entries were removed, and what their forms took."""

    entries: int
    bytes: int


def make_entry(manifest: Manifest, used_ns: int) -> Entry:
    """Return what a manifest says, and when it was used."""
    return Entry(
        manifest.key,
        manifest.model_id,
        manifest.version,
        manifest.form,
        manifest.sha256,
        manifest.bytes,
        manifest.made_at,
        timestamp_of(used_ns),
        manifest.took_ms,
        manifest.figures,
        manifest.tried,
        manifest.untried_on,
    )


def timestamp_of(time_ns: int) -> str:
    """Return a time as the ledger writes it, from nanoseconds since 1970."""
    seconds = min(max(time_ns / 1e9, 0), MAX_TIME_S)
    return format_timestamp(datetime.fromtimestamp(seconds, UTC))


def hash_inputs(given: Iterable[Tensor]) -> str:
    """Return the SHA-256 of inputs, in 64 hex digits."""
    told = repr([(each.name, each.datatype, each.shape, bytes(each.data)) for each in given])
    return hashlib.sha256(told.encode()).hexdigest()


def needs_trial(entry: Entry | None, given: Iterable[Tensor]) -> bool:
    """Tell whether something is to be found out: nothing is known, or nothing but with other inputs."""
    return entry is None or (entry.untried_on is not None and entry.untried_on != hash_inputs(given))
