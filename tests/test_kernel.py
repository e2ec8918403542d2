"""The kernel, which a newcomer reads to change a load, knows no feature: their words are not in its files."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What remembers, decides and runs loads. The proof of a ledger (`events/audit`) is not in it, and neither is
# `eventtext`, the one table that words the events of all features for people.
KERNEL = sorted(
    file
    for pattern in (
        *("events/*.py", "events/sqlite/*.py", "runtime/router.py", "runtime/repository.py"),
        *(f"runtime/{folder}/*.py" for folder in ("consumer", "process", "scheduler", "store", "worker")),
    )
    for path in ROOT.glob(pattern)
    if (file := path.relative_to(ROOT).as_posix()) != "events/eventtext.py"
)
# Words of each feature, where names are read as their parts (`node_id` is "node id"). Linux has
# `/proc/devices`, ONNX Runtime has `NodeArg`.
WORDS = {
    "signatures": r"LoadSignature|\b[Bb]undles?\b|\b[Tt]rust(ed)?\b|\buntrusted\b",
    "approvals": r"[Aa]pprov(e|al)",
    "labels": r"\b[Ll]abel(s|led)?\b|Label[A-Z]",
    "devices": r"(?<!/)\b[Dd]evices?\b|Device[A-Z]",
    "nodes": r"\b[Nn]odes?\b|Node(?!Arg)[A-Z]|\b([Ee]poch|[Ll]ease|[Pp]eer)s?\b|\b[Cc]luster|\bmembership\b",
    "grpc": r"[Gg]?[Rr]pc|gRPC",
    "on demand": r"\b[Oo]n.demand\b|OnDemand",
}
# Files where a word is another one: labels of metrics, a clock that is trusted, a provider's operators.
OTHERS = {
    *(("events/counters.py", "labels"), ("runtime/consumer/usage.py", "labels")),
    *(("events/clock.py", "signatures"), ("runtime/worker/refusals.py", "nodes")),
}
# The lines that name a feature, each by a part of it, and why: ten at most.
KNOWN = {
    (
        "events/errors.py",
        'code = "node_name_in_use"',
    ): "a code that operators know",
    ("events/history.py", '_NAMES = {"server": "node"}'): "rows of the past are stored with this name",
    (
        "events/jobs.py",
        '"device_unavailable": Consequence.RETRY',
    ): "one table has all codes",
    ("runtime/router.py", 'code = "unknown_label"'): "a code that clients know",
}


def lines_with_words(file: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number and the text of each line with a word of a feature, and the feature."""
    for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
        for feature, words in WORDS.items():
            if (file, feature) not in OTHERS and re.search(words, line.replace("_", " ")):
                yield number, line, feature


@pytest.mark.parametrize("file", KERNEL)
def test_file_of_kernel_names_no_feature(file: str) -> None:
    """Nor does it import one: it asks the lists at the top of `features`."""
    known = [part for place, part in KNOWN if place == file]
    found = lines_with_words(file)
    assert not [line for line in found if not any(part in line[1] for part in known)]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.findall(r"(?:from|import) features\.\w+(?:\.\w+)+", text)


def test_known_lines_are_still_there_and_ten_at_most() -> None:
    assert len(KNOWN) <= 10
    assert not {
        (file, part) for file, part in KNOWN if not any(part in line for _, line, _ in lines_with_words(file))
    }
