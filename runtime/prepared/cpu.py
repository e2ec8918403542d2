"""Which CPU this is: weights that were packed for one may be useless on another, or worse.

/proc/cpuinfo is text for people, which differs from architecture to architecture and from kernel to kernel
(proc(5)). Only what names a kind of CPU, and what it can do, is taken from it; what is not there is passed
over. Frequencies, numbers and the microcode's revision are left out: they change while the CPU stays what it
is. A microcode that takes a feature away is seen by the features.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from events.canonical import canonical

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
    return hashlib.sha256(canonical(sorted(_kinds(text))).encode()).hexdigest()


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
