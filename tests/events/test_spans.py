"""A log that is checked in spans, by several processes, is judged as one that is checked in one."""

import asyncio
import os
import select
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import PLAIN, START, child, opened, write
from support.ledgers import SIGN, rows_of, told_history

from events import snapshots, spanprocess, spans
from events.archive import archive
from events.canonical import GENESIS
from events.commands import Record
from events.findings import Bad, Kind
from events.schema import connect, connect_read_only
from events.spans import Proof, Span
from events.types import Draft, Unknown
from events.verify import verify

LIMIT_S = 30.0
HISTORY = told_history(rounds=3)
APART = 9
"""Events between two snapshots."""

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor checks all by itself")


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have short logs divided, as long ones are."""
    monkeypatch.setattr(spanprocess, "LEAST_EVENTS", 5)


def sound_ledger() -> bytes:
    """Return a ledger that has a snapshot every few events."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(_written(path))
        return path.read_bytes()


async def _written(path: Path) -> None:
    async with opened(path, now=lambda: START, monotonic=float) as log:
        for fact in HISTORY:
            assert not isinstance(fact.data, Unknown)
            draft = Draft(
                fact.id, fact.data, fact.actor, fact.job_id, fact.model_id, fact.version, fact.worker_id
            )
            await log.submit(Record((draft,)))
            if fact.position % APART == 0:
                with closing(connect(path)) as connection:
                    snapshots.write(connection, fact.position)
        await log.server_stopped()


LEDGER = sound_ledger()
HEAD = len(HISTORY) + 1


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the ledger in a folder of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(LEDGER)
        yield path


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A snapshot as verification has it."""
    with closing(connect_read_only(path)) as connection:
        connection.text_factory = bytes
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM events").fetchone()
        yield connection


def change(path: Path, *statements: str) -> None:
    """Change a ledger without regard to what keeps it as it is."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)


def is_proved(path: Path, most: int) -> bool:
    """Whether the spans prove what the last one believes, in this process."""
    with reading(path) as connection:
        divided = spans.spans(connection, 0, GENESIS, most)
        assert len(divided) == most
        try:
            proofs = [spans.prove(connection, span) for span in divided[:-1]]
            begins = [span.begin(connection).mark() for span in (divided[0], divided[-1])]
        except (Bad, sqlite3.Error):
            return False
        return spans.reach(begins[0], proofs, begins[1])


def helpers_agree(path: Path, *, base: int = 0, digest: bytes = GENESIS) -> bool:
    """Whether the other processes prove what the last span begins with."""
    with reading(path) as connection, spanprocess.helped(connection, path, base, digest) as others:
        assert others is not None
        others.begin(connection)
        return others.hold()


# What the spans are.


@pytest.mark.parametrize("most", [2, 3, 4, 5])
def test_the_spans_are_the_log_and_prove_one_another(most: int) -> None:
    with copy() as path:
        with reading(path) as connection:
            divided = spans.spans(connection, 0, GENESIS, most)
            assert [span.after for span in divided[1:]] == [span.until for span in divided[:-1]]
            rows = [row for span in divided for row in span.rows(connection)]
            assert rows == connection.execute("SELECT position, body, hash FROM events").fetchall()
        assert is_proved(path, most)


def test_a_log_without_snapshots_is_one_span() -> None:
    with copy() as path:
        change(path, "DELETE FROM snapshots", "DELETE FROM job_snapshots", "DELETE FROM model_snapshots")
        with reading(path) as connection:
            assert spans.spans(connection, 0, GENESIS, 4) == [Span(0, GENESIS)]
            with spanprocess.helped(connection, path, 0, GENESIS) as others:
                assert others is None
        assert verify(path).verified


@pytest.mark.parametrize("most", [2, 3])
@settings(PLAIN, max_examples=200)
@given(st.integers(1, HEAD), st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_of_an_event_before_the_last_span_is_proved(
    most: int, position: int, index: int, bits: int
) -> None:
    with copy() as path:
        last = divided(path, most)[-1]
        row = rows_of(path)[position - 1]
        body = bytearray(row[1].encode())
        body[index % len(body)] ^= bits
        change(
            path,
            "CREATE TABLE forged (position INTEGER PRIMARY KEY, body, hash)",
            "INSERT INTO forged SELECT position, body, hash FROM events",
            "DROP TABLE events",
            "ALTER TABLE forged RENAME TO events",
            f"UPDATE events SET body = CAST(x'{body.hex()}' AS TEXT) WHERE position = {position}",
        )
        assert is_proved(path, most) == (position > last.after)


def divided(path: Path, most: int) -> list[Span]:
    with reading(path) as connection:
        return spans.spans(connection, 0, GENESIS, most)


CHANGES = {
    "an event is gone": ("DELETE FROM events WHERE position = 12", 12),
    "the end is gone": (f"DELETE FROM events WHERE position > {HEAD - 2}", HEAD - 2),
    "a hash is another": ("UPDATE events SET hash = zeroblob(32) WHERE position = 3", 3),
    "a hash where a span ends": ("UPDATE events SET hash = zeroblob(32) WHERE position = 18", 18),
    "a hash in the last span": (f"UPDATE events SET hash = zeroblob(32) WHERE position = {HEAD}", HEAD),
    "the base is another": ("UPDATE base SET hash = randomblob(32)", 1),
    "an ended job is another": ("UPDATE jobs SET body = body || ' ' WHERE id = 'L0'", HEAD),
    "an ended job is gone": ("DELETE FROM jobs WHERE id = 'L0'", HEAD),
    "a job is too many": ("INSERT INTO jobs SELECT 1, 'ghost', body FROM jobs WHERE id = 'L0'", HEAD),
    "a late job is too many": ("INSERT INTO jobs SELECT 999, 'ghost', body FROM jobs WHERE id = 'L0'", HEAD),
    "an unended job is another": ("UPDATE jobs SET body = body || ' ' WHERE id = 'last'", HEAD),
    "an unended job is gone": ("DELETE FROM jobs WHERE id = 'last'", HEAD),
    "an ended job is a blob": ("UPDATE jobs SET id = CAST(id AS BLOB) WHERE id = 'L0'", HEAD),
    "an unended job is a blob": ("UPDATE jobs SET body = CAST(body AS BLOB) WHERE id = 'last'", HEAD),
    "a job is from nowhere": ("INSERT INTO jobs SELECT -1, 'ghost', body FROM jobs WHERE id = 'L0'", HEAD),
    "a model is another": ("UPDATE models SET body = body || ' ' WHERE id = 'other'", HEAD),
    "a model is gone": ("DELETE FROM models WHERE id = 'other'", HEAD),
    "the projections are elsewhere": ("UPDATE projected SET position = 18", HEAD),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_wrong_is_named_as_if_the_log_were_one_span(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement, position = CHANGES[what]
    with copy() as path:
        change(path, statement.replace("jobs SELECT", "jobs (created_position, id, body) SELECT"))
        in_spans = verify(path)
        monkeypatch.setattr(spanprocess, "LEAST_EVENTS", 2**62)
        assert verify(path) == in_spans
        assert in_spans.finding is not None
        assert in_spans.finding.position == position


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE model_snapshots SET body = replace(body, '\"last_version\":', '\"last_version\":1')",
        "UPDATE model_snapshots SET body = 'no JSON'",
        "DELETE FROM model_snapshots WHERE model_id = 'digits'",
        "UPDATE job_snapshots SET body = replace(body, '\"attempt\":', '\"attempt\":1')",
        "DELETE FROM job_snapshots",
        "UPDATE snapshots SET position = position + 1",
        "INSERT INTO model_snapshots SELECT 'zoo', -1, body FROM model_snapshots LIMIT 1",
        "UPDATE model_snapshots SET model_id = CAST(model_id AS BLOB)",
    ],
)
def test_snapshots_prove_nothing_and_are_named_after_all_else_was_proved(statement: str) -> None:
    with copy() as path:
        head = verify(path).position
        change(path, statement)
        assert not is_proved(path, 3)
        found = verify(path)
        assert found.position == head
        assert found.finding is not None
        assert found.finding.kind is Kind.PROJECTIONS


@pytest.mark.parametrize("table", ["events", "jobs"])
def test_rows_that_no_span_has_are_found(table: str) -> None:
    column = {"events": "position", "jobs": "created_position"}[table]
    with copy() as path:
        change(
            path,
            f"CREATE TABLE forged AS SELECT * FROM {table}",
            f"DROP TABLE {table}",
            f"ALTER TABLE forged RENAME TO {table}",
            f"INSERT INTO {table} ({column}) VALUES (NULL)",
        )
        with reading(path) as connection:
            assert spans.has_nulls(connection)
            with spanprocess.helped(connection, path, 0, GENESIS) as others:
                assert others is None


# The other processes.


def test_a_ledger_is_proved_together_with_other_processes() -> None:
    with copy() as path:
        assert helpers_agree(path)
        found = verify(path)
        assert (found.events, found.position, found.verified) == (HEAD, HEAD, True)
        assert found.hash == rows_of(path)[-1][2]


def test_a_proof_of_something_else_does_not_count() -> None:
    one, other = Proof("a", "b"), Proof("b", "c")
    assert spans.reach("a", [one, other], "c")
    assert spans.reach("a", [], "a")
    for proofs in ([one], [other], [other, one], [one, None], [one, Proof("x", "c")], []):
        assert not spans.reach("a", proofs, "c")


def test_what_is_appended_meanwhile_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(LEDGER)

    async def go_on() -> None:
        async with opened(path, now=lambda: START, monotonic=float) as log:
            with reading(path) as connection:
                await write(log, 20)
                with spanprocess.helped(connection, path, 0, GENESIS) as others:
                    assert others is not None
                    others.begin(connection)
                    await write(log, 20, first=21)
                    assert others.hold()
            assert verify(path).position == HEAD + 40

    asyncio.run(go_on())


def test_a_ledger_whose_first_events_were_archived_is_proved_from_its_base(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(LEDGER)
    archive(path, str(APART + 2), tmp_path / "archive.gz", SIGN, START + timedelta(days=30))
    with reading(path) as connection:
        base, digest = connection.execute("SELECT position, hash FROM base").fetchone()
    assert base == APART + 1
    assert helpers_agree(path, base=base, digest=digest)
    assert not helpers_agree(path, base=base, digest=bytes(32))
    assert verify(path).verified
    change(path, "UPDATE model_snapshots SET body = body || ' ' WHERE position <= 10")
    finding = verify(path).finding
    assert finding is not None
    assert (finding.position, finding.kind) == (base, Kind.BASE)


def endless(path: Path) -> Path:
    """Return what a process that opens it waits for, for ever."""
    fifo = path.with_name("fifo")
    os.mkfifo(fifo)
    return fifo


def killed(helper: subprocess.Popen[bytes]) -> None:
    helper.kill()
    helper.wait()


def stopped(helper: subprocess.Popen[bytes]) -> None:
    helper.send_signal(signal.SIGSTOP)


def left_alone(_: subprocess.Popen[bytes]) -> None:
    pass


@pytest.mark.parametrize("end", [killed, stopped, left_alone])
def test_a_process_that_does_not_answer_leaves_all_to_this_one(
    end: Callable[[subprocess.Popen[bytes]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spanprocess, "PATIENCE_S", 0.0)
    with copy() as path, reading(path) as connection:
        with spanprocess.helped(connection, endless(path), 0, GENESIS) as others:
            assert others is not None
            others.begin(connection)
            for helper in others.helpers:
                end(helper)
            assert not others.hold()
        assert all(helper.returncode is not None for helper in others.helpers)


def test_where_no_process_can_be_started_this_one_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with copy() as path:
        assert verify(path).verified
        with reading(path) as connection, spanprocess.helped(connection, path, 0, GENESIS) as others:
            assert others is None


DIE = """
import os, signal, sys
from contextlib import closing
from pathlib import Path
from events import spanprocess
from events.schema import connect_read_only
spanprocess.LEAST_EVENTS = 5
path, fifo = map(Path, sys.argv[1:])
with closing(connect_read_only(path)) as connection:
    connection.text_factory = bytes
    with spanprocess.helped(connection, fifo, 0, bytes(32)) as others:
        print(*(helper.pid for helper in others.helpers), flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(LEDGER)
    process = await asyncio.create_subprocess_exec(
        *child(DIE, path, endless(path)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    handles = [os.pidfd_open(int(pid)) for pid in (await process.stdout.readline()).split()]
    assert handles
    await process.communicate(b"")
    assert process.returncode == -signal.SIGKILL
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(LIMIT_S * 1_000), "it goes on"
        os.close(handle)
