"""Documentation pages as tests: their blocks run in order, and their output is compared.

A page has blocks of `sh` and of `python`; those of `python` between two of `sh` are one program. A block of
`json` or `text` is the output of the block before it. Other kinds are errors, since nothing would check them.
A block between tildes is not run; a test requires that the page says so.

A line that runs a server in the foreground is a terminal of its own: the rest of the page runs beside it,
once it is ready, and its output until then is what the line prints.

Pages run as a person would type them: from an empty home, those that go on from another page after it, with
no server, folder or address of the test's. Only the first digits of ports differ.

Where `says` compares, times, ids and figures with a unit may differ, and in a `text` an ellipsis stands for
anything.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from support.servers import copy_examples

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END = "-- end of the block --"
LIMIT_S = 300.0
"""The longest page takes 20 s, on a busy machine ten times that. One that fails may wait for ever."""
SUBREAPER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("subreaper.py")))


@dataclass(frozen=True, slots=True)
class Block:
    """A program of a page and its output; None where the page shows none."""

    page: str
    kind: str
    text: str
    answer_kind: str = ""
    answer: str | None = None


def blocks(page: str) -> list[Block]:
    """Return the page's blocks in their order."""
    found: list[Block] = []
    for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind in ("sh", "python"):
            found.append(Block(page, kind, text))
        else:
            assert kind in ("json", "text"), f"a block of {kind or 'no kind'} is not held to anything"
            asked = found.pop()
            assert asked.answer is None, f"two answers to {asked.text}"
            found.append(Block(page, asked.kind, asked.text, kind, text))
    return found


def script(found: list[Block]) -> str:
    """Return the blocks as one program of the shell."""
    shell = ""
    for kind, group in groupby(found, key=attrgetter("kind")):
        if kind == "sh":
            shell += "".join(f"{_with_servers(block.text)}\necho '{END}'\n" for block in group)
        else:
            python = "".join(f"{block.text}\nprint('{END}', flush=True)\n" for block in group)
            shell += f"{sys.executable} -W error - <<'THE-END'\n{python}\nTHE-END\n"
    return shell


SERVER = re.compile(r"^loadledger serve\b(?:[^&|>\\\n]|\\\n)*$", re.MULTILINE)
"""A server in the foreground; its command may go on in the next line."""
LAST_LINE = "^next: "
"""Of what a server prints when it is ready."""
LOG = "server.log"
"""The file with the servers' log lines, or all their output where a page redirects it."""
SCREEN = "server.txt"
"""The file with what a server in the foreground prints."""


AT_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
"""Runs a command at a terminal of its own, and copies what it prints there."""


def _with_servers(text: str) -> str:
    """Return a block whose servers run at terminals in the background, and are waited for."""
    waiting = f"until grep -qs '{LAST_LINE}' {SCREEN} || ! kill -0 $!; do sleep 0.1; done"

    def start(found: re.Match[str]) -> str:
        on_screen = f"LOADLEDGER_LOG_LEVEL=warning python3 -c '{AT_TERMINAL}' {found[0]} < /dev/null"
        plain = r"sed -u 's|\r$||; s|\x1b\[[0-9;]*m||g'"
        return f"{{ {on_screen} | {plain}; }} > {SCREEN} 2> {LOG} &\n{waiting}\ncat {SCREEN}"

    return SERVER.sub(start, text)


def _run(program: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run a shell program; at its end, or after `LIMIT_S`, all that it has started is killed.

    Returns:
        Its exit code, what it printed, and what to stderr.
    """
    process = subprocess.Popen(
        [*SUBREAPER, "bash", "--noprofile", "--norc", "-eu", "-o", "pipefail", "-c", program],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            printed, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise AssertionError(f"has not ended in time: {process.communicate()}") from None
        finally:
            process.terminate()
    return process.returncode, printed, errors


def _by_block(found: list[Block], printed: str) -> Iterator[tuple[Block, str]]:
    parts = printed.split(f"{END}\n")
    assert len(parts) == len(found) + 1, printed
    return zip(found, parts, strict=False)


# Pages that run from an empty home, with the servers that they start.

PORTS = range(1000, 2000)
"""The first digits of the ports, below the kernel's ephemeral ports, which other tests may get."""
DISTANCES = {"808": 0, "800": 1000}
"""How far a run's ports are from its first digits, by those in the page; the second ones are gRPC's."""
MAX_TRIES = 5
IN_USE = re.compile("address already in use|cannot be listened on")
ON_PORT = "export LOADLEDGER_PORT=8080\n"
"""The default port, for pages that leave the port to it; its last digit and the others stay."""


def run_pages(
    pages: Iterable[str],
    folder: Path,
    environment: Mapping[str, str],
    has: Callable[[Path], object] | None = None,
) -> Iterator[tuple[Block, str]]:
    """Run pages in one shell, one after the other; return each block with its output.

    Args:
        pages: paths of the pages in the tree; their ports are 8080 to 8089, and 8000 to 8009 for gRPC.
        folder: where the working directory is made.
        environment: of the shell, whose home is an empty folder.
        has: makes the working directory; by default it contains `examples/`.
    """
    found = [block for page in pages for block in blocks(page)]
    tries = some_ports()
    for digits in tries:
        here = folder / str(digits)
        (has or copy_examples)(here)
        home = here.with_name(f"{digits}-home")
        home.mkdir()
        ports = {first: str(digits + distance) for first, distance in DISTANCES.items()}
        program = _replace_ports(ON_PORT + script(found), ports)
        code, printed, errors = _run(program, here, {**environment, "HOME": str(home)})
        if code and _is_taken(here):
            continue
        assert code == 0, f"{printed}\n{errors}\n{_log(here)}"
        yield from _by_block(found, _replace_ports(printed, {new: old for old, new in ports.items()}))
        return
    raise AssertionError(f"ports that begin with {tries} are taken")


def _replace_ports(text: str, digits: Mapping[str, str]) -> str:
    return re.sub(rf"\b({'|'.join(digits)})(?=\d\b)", lambda found: digits[found[1]], text)


def some_ports() -> list[int]:
    """Return the first digits of ports to try."""
    return random.sample(PORTS, MAX_TRIES)


def _log(here: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(here.glob("*server.*")))


def _is_taken(here: Path) -> bool:
    return IN_USE.search(_log(here)) is not None


VOLATILE = {"id", "job_id", "position", "created_at", "started_at", "finished_at", "loaded_at", "load_job_id"}
"""Members that differ from run to run; only whether they exist and are null is compared."""
_CHANGING = (
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?Z?"), "TIME"),
    (re.compile(r"\b(\d+):[0-9a-f]{64}\b"), r"\1:HASH"),
    (re.compile(r"\bkey [0-9a-f]{32}\b"), "key ID"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "ID"),
    (re.compile(r"\b\d[\d.,]* ?(µs|ms|s|m|h|d|B|KB|MB|GB|KiB|MiB|GiB)\b"), "FIGURE"),
    (re.compile(r"\bthreads \d+,"), "threads COUNT,"),
)
_IN_THE_LEDGER = re.compile(r"^TIME +\d+ ")
"""The beginning of an event's line; concurrent events may have another order."""
ANYTHING = "…"


def printed_as(block: Block, printed: str) -> Any:
    """Return a block's output for comparison: JSON, or words."""
    return json.loads(printed) if block.answer_kind == "json" else printed.split()


def expected(block: Block) -> Any:
    """Return the output in the page for comparison."""
    assert block.answer is not None
    return printed_as(block, block.answer)


def says(block: Block, printed: str) -> bool:
    """Whether the output is that of the page, except what differs from run to run."""
    if block.answer_kind == "json":
        return bool(_settled(json.loads(printed)) == _settled(expected(block)))
    assert block.answer is not None
    wanted, got = _words(block.answer), _words(printed)
    return len(wanted) == len(got) and all(map(_fits, wanted, got))


def _words(text: str) -> list[str]:
    for pattern, name in _CHANGING:
        text = pattern.sub(name, text)
    lines = text.splitlines()
    if all(map(_IN_THE_LEDGER.match, lines)):
        positions = sorted(line.split()[1] for line in lines)
        lines = [*positions, *sorted(_IN_THE_LEDGER.sub("", line) for line in lines)]
    return " ".join(lines).split()


def _fits(wanted: str, got: str) -> bool:
    pattern = ".*".join(map(re.escape, wanted.split(ANYTHING)))
    return re.fullmatch(pattern, got) is not None


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        hidden = {key for key in VOLATILE if value.get(key) is not None}
        return {key: ANYTHING if key in hidden else _settled(item) for key, item in value.items()}
    return [_settled(item) for item in value] if isinstance(value, list) else value


_METRIC_ROW = re.compile(r"^\| `(loadledger_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", re.MULTILINE)


class Family(NamedTuple):
    """A metric, as its row of docs/metrics.md says."""

    name: str
    kind: str
    labels: frozenset[str]
    text: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a query finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))


FAMILIES = [
    Family(name, kind, frozenset(re.findall(r"\w+", labels)), text)
    for name, kind, labels, text in _METRIC_ROW.findall(
        (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    )
]
