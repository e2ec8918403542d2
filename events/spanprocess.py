"""Spans of the log checked by processes of their own, at the same time as the last one by this process.

A helper reads the file itself, in a snapshot of its own, and answers with one line. Where anything is not as
it has to be, it answers nothing: what is wrong is told by who checks the log in one span. It ends with this
process, whatever ends this one: a pipe tells it.
"""

from __future__ import annotations

import json
import os
import select
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgspec

from events import rebuild, spans
from events.checkedfold import CheckedFold
from events.schema import connect_read_only
from events.spans import Proof, Rows, Span

MOST = 4
"""Processes together: each has 35 MB, and more gain less and less."""

LEAST_EVENTS = 50_000
"""Events of a span at least: they take longer than the start of a process, 0.3 s."""

PATIENCE_S = 60.0
"""For a helper that takes longer than this process took for its own span, and as long again."""

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from events.spanprocess import main; main()"


class Others:
    """The last span, which is this process's, and the helpers that check the ones before."""

    def __init__(self, mark: str, last: Span, helpers: list[subprocess.Popen[bytes]]) -> None:
        self._mark, self._last, self.helpers = mark, last, helpers
        self._believed = ""
        self._began_s = time.monotonic()

    def begin(self, connection: sqlite3.Connection) -> tuple[CheckedFold, Rows]:
        """Return the fold where the last span begins, and the rows of that span."""
        fold = self._last.begin(connection)
        self._believed = fold.mark()
        return fold, self._last.rows(connection)

    def hold(self) -> bool:
        """Whether the spans before the last one are as they have to be, and come to what it began with."""
        now_s = time.monotonic()
        until_s = now_s + (now_s - self._began_s) + PATIENCE_S
        proofs = (_answer(helper, until_s) for helper in self.helpers)
        return spans.reach(self._mark, proofs, self._believed)


@contextmanager
def helped(connection: sqlite3.Connection, path: Path, base: int, digest: bytes) -> Iterator[Others | None]:
    """Divide the log and have all spans but the last one checked; None if that cannot be, or gains nothing.

    Args:
        connection: in a read transaction, whose head is what is verified.
        path: of the same file.
        base: where the log begins.
        digest: the hash there.
    """
    divided, mark = _divided(connection, base, digest)
    with ExitStack() as stack:
        helpers = _started(stack, path, divided[:-1])
        yield Others(mark, divided[-1], helpers) if helpers else None


def _divided(connection: sqlite3.Connection, base: int, digest: bytes) -> tuple[list[Span], str]:
    """Return the spans, and the mark of the state in which the first one begins."""
    try:
        (head,) = connection.execute("SELECT max(position) FROM events").fetchone()
        most = min(MOST, len(os.sched_getaffinity(0)), (head - base) // LEAST_EVENTS)
        if most < 2 or not rebuild.is_current(connection) or spans.has_nulls(connection):  # noqa: PLR2004 - this one and a helper
            return [], ""
        divided = spans.spans(connection, base, digest, most)
        return divided, divided[0].begin(connection, compared=False).mark()
    except Exception:  # noqa: BLE001 - what is wrong here is told by who checks the log in one span
        return [], ""


def _started(stack: ExitStack, path: Path, divided: list[Span]) -> list[subprocess.Popen[bytes]]:
    """Start a helper for each span; they end with the stack."""
    helpers = []
    for span in divided:
        asked = msgspec.json.encode(span).decode()
        command = [sys.executable, "-I", "-c", _CODE, _search_path(), str(path.absolute()), asked]
        try:
            helper = subprocess.Popen(  # noqa: S603 - our own interpreter
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except (OSError, TypeError):  # an interpreter within something else may not know its own name
            return []
        helpers.append(stack.enter_context(helper))
        stack.callback(helper.kill)
    return helpers


def _search_path() -> str:
    return json.dumps([each for each in sys.path if each])  # which has words for names that are no UTF-8


def _answer(helper: subprocess.Popen[bytes], until_s: float) -> Proof | None:
    """Return what a helper proved, or None where it says nothing, or not in time."""
    assert helper.stdout is not None
    poll = select.poll()
    poll.register(helper.stdout, select.POLLIN)
    if not poll.poll(max(0.0, until_s - time.monotonic()) * 1_000):
        return None
    began, _, ended = helper.stdout.readline().decode().strip().partition(" ")
    return Proof(began, ended)


def main() -> None:
    """Check the span that the arguments say; what it began and ended with goes to standard output."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    span = msgspec.json.decode(sys.argv[3], type=Span)
    with closing(connect_read_only(Path(sys.argv[2]))) as connection:
        connection.text_factory = bytes
        connection.execute("BEGIN")
        proof = spans.prove(connection, span)
    if proof is not None:
        sys.stdout.write(f"{proof.began} {proof.ended}\n")


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)
