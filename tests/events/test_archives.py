"""Archives and the log together: they lead to the base, come to what it says, and replay to the past."""

import asyncio
import gzip
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, START
from support.ledgers import SIGN, rows_of, write_ledger

from events import rebuild
from events.archive import archive
from events.archivefile import audit_file
from events.archives import BadArchive
from events.audit import Audit, audit
from events.basestate import base_state_digest
from events.errors import Archived, ArchiveMissing, LedgerDamaged, LedgerProblem, LogUnavailable, NothingThere
from events.export import export, jsonl
from events.findings import Expected, Kind
from events.history import BeyondHead, Moment
from events.replay import replay
from events.schema import connect, opened_to_read
from events.signing import HeadSigner, key_id
from events.state import State
from events.store import as_text

LATER = START + timedelta(days=30)
ROUNDS = 3


def sound_ledger() -> bytes:
    """Return a ledger whose events have times of their own, at most two the same."""
    seconds = iter(range(10_000))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        asyncio.run(write_ledger(path, ROUNDS, now=lambda: START + timedelta(seconds=next(seconds) // 2)))
        return path.read_bytes()


LEDGER = sound_ledger()


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the ledger in a folder of its own."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(LEDGER)
        yield path


with copy() as _path:
    ROWS = rows_of(_path)
HEAD = len(ROWS)
TIMES = [json.loads(body)["recorded_at"] for _, body, _ in ROWS]
CUTS = st.lists(st.integers(2, HEAD), min_size=1, max_size=4, unique=True).map(sorted)


def archived(path: Path, cuts: list[int], sign: HeadSigner = SIGN) -> list[Path]:
    """Archive up to before each of these positions, and return the files."""
    files = [path.with_name(f"{cut}.gz") for cut in cuts]
    for cut, file in zip(cuts, files, strict=True):
        archive(path, str(cut), file, sign, LATER)
    return files


def said(told: tuple[Moment, State]) -> tuple[Moment, list[str], list[str]]:
    """Return what was so, to compare: the moment, the models, the jobs that have not ended."""
    moment, state = told
    return moment, sorted(map(as_text, state.models.values())), list(map(as_text, state.unended()))


def replayed(path: Path, until: object, archives: list[Path]) -> tuple[Moment, list[str], list[str]]:
    with opened_to_read(path) as connection:
        return said(replay(connection, None if until is None else str(until), archives))


MOMENTS = [None, *range(HEAD + 1), "2025-12-31T23:59:59Z", "2099-01-01T00:00:00Z", *sorted(set(TIMES))]
with copy() as _path:
    PAST = {moment: replayed(_path, moment, []) for moment in MOMENTS}


# What archives prove.


@FEWER
@given(CUTS, st.randoms())
def test_archives_in_any_order_lead_from_the_first_event_to_the_base(cuts: list[int], random: object) -> None:
    with copy() as path:
        files = archived(path, cuts)
        random.shuffle(files)  # type: ignore[attr-defined]
        found = audit(path, archives=files)
        assert found.finding is None
        assert found.behind is not None
        assert found.behind.is_folded
        assert [each.proved.position for each in found.behind.files] == [cut - 1 for cut in cuts]
        for position in (1, cuts[0] - 1, cuts[-1], HEAD):
            expected = Expected(position, ROWS[position - 1][2])
            assert audit(path, expected, archives=files).finding is None
            wrong = audit(path, Expected(position, b"\1" * 32), archives=files).finding
            assert wrong is not None
            assert (wrong.position, wrong.kind) == (position, Kind.EXPECTATION)


@FEWER
@given(CUTS, st.sampled_from(MOMENTS))
def test_replay_with_archives_gives_what_it_gave_before_archiving(cuts: list[int], moment: object) -> None:
    with copy() as path:
        files = archived(path, cuts)
        assert replayed(path, moment, files[::-1]) == PAST[moment]


@pytest.mark.parametrize("cuts", [[2], [20], [8, 33, HEAD]], ids=str)
def test_every_moment_of_the_past_is_replayed_as_before(cuts: list[int]) -> None:
    with copy() as path:
        files = archived(path, cuts)
        for moment in MOMENTS:
            assert replayed(path, moment, files) == PAST[moment], moment
        with pytest.raises(BeyondHead):
            replayed(path, HEAD + 1, files)
        if cuts[0] > 2:
            with pytest.raises(Archived):
                replayed(path, 1, [])


def test_archives_that_do_not_begin_with_the_first_event_say_from_where_they_prove() -> None:
    with copy() as path:
        files = archived(path, [8, 20, 33])
        found = audit(path, archives=files[:0:-1])
        assert found.finding is None
        assert found.behind is not None
        assert not found.behind.is_folded
        assert found.behind.after.position == 7
        with pytest.raises(Archived, match="up to position 7"):
            audit(path, Expected(3, bytes(32)), archives=files[1:])
        with pytest.raises(ArchiveMissing, match="positions 1 to 7"):
            replayed(path, None, files[1:])


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([0, 2], r"8 to 19 are missing: 8.gz ends at 7, and 33.gz begins .*: positions 8 to 19, '20.gz'"),
        ([0, 1], r"20 to 32 are missing: 20.gz ends at 19, and the log .*: positions 20 to 32, '33.gz'"),
        ([0, 0, 1, 2], r"8.gz goes on to position 7, and 8.gz begins after 0"),
    ],
    ids=str,
)  # fmt: skip
def test_archives_that_are_missing_or_named_twice_are_told(chosen: list[int], words: str) -> None:
    with copy() as path:
        files = archived(path, [8, 20, 33])
        for archives in ([files[each] for each in chosen], [files[each] for each in chosen[::-1]]):
            with pytest.raises(ArchiveMissing, match=words):
                audit(path, archives=archives)
            with pytest.raises(ArchiveMissing, match=words):
                replayed(path, 5, archives)


def test_an_export_stands_for_archives_that_it_has_all_events_of() -> None:
    with copy() as path:
        whole = path.with_name("whole.jsonl")
        whole.write_bytes(b"".join(export(path, jsonl(), SIGN, until=32)))
        later = path.with_name("later.jsonl")
        later.write_bytes(b"".join(export(path, jsonl(), SIGN)))
        archived(path, [8, 20, 33])
        assert audit(path, archives=[whole]).finding is None
        assert replayed(path, 25, [whole]) == PAST[25]
        with pytest.raises(ArchiveMissing, match=f"goes on to position {HEAD}, and the log begins after 32"):
            audit(path, archives=[later])


def test_a_ledger_of_which_nothing_was_archived_has_no_archives(tmp_path: Path) -> None:
    with copy() as path:
        file = path.with_name("export.jsonl")
        file.write_bytes(b"".join(export(path, jsonl(), SIGN)))
        with pytest.raises(NothingThere):
            audit(path, archives=[file])
        with pytest.raises(NothingThere):
            replayed(path, None, [file])
        assert audit(path, files=[audit_file(file)]).compared == ((file, None),)
    with pytest.raises(LedgerProblem):
        audit(tmp_path / "ledger.db", archives=[tmp_path / "none.gz"])


def test_whose_signature_is_expected_decides() -> None:
    other = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
    with copy() as path:
        files = [*archived(path, [8]), *archived(path, [20], other)]
        assert audit(path, archives=files).finding is None
        found = audit(path, archives=files, key=key_id(SIGN.public_key))
        assert found.at == files[1]
        assert found.finding is not None
        assert (found.finding.position, found.finding.kind) == (19, Kind.EXPECTATION)


# What somebody makes of them.


def forged(file: Path, change: tuple[str, str]) -> None:
    """Change an archive with care: all its hashes and its head are made anew, with another key."""
    lines = gzip.decompress(file.read_bytes()).splitlines()
    opening, *events, last = map(json.loads, lines)
    digest = bytes.fromhex(opening["after"]["hash"])
    for event in events:
        event["body"] = event["body"].replace(*change)
        digest = hashlib.sha256(digest + event["body"].encode()).digest()
        event["hash"] = digest.hex()
    written = [json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in (opening, *events)]
    statement = audit_file(file).head
    assert statement is not None
    assert last
    other = HeadSigner(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
    head = other(type(statement.statement)(
        statement.statement.position, digest, statement.statement.recorded_at, statement.statement.base
    ))  # fmt: skip
    file.write_bytes(gzip.compress(b"".join([*written, jsonl().last(head)])))
    assert audit_file(file).finding is None


@pytest.mark.parametrize(("number", "position"), [(0, 7), (1, 19)])
def test_an_archive_that_was_forged_with_care_does_not_lead_on(number: int, position: int) -> None:
    with copy() as path:
        files = archived(path, [8, 20])
        forged(files[number], ("alice", "mallory"))
        found = audit(path, archives=files)
        assert found.finding is not None
        assert (found.finding.position, found.finding.kind) == (position, Kind.BASE)
        assert found.at == files[1]
        with pytest.raises(BadArchive, match=f"20.gz does not verify: position {position}"):
            replayed(path, 5, files)


@FEWER
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_an_archive_that_was_changed_anywhere_is_named(index: int, bits: int) -> None:
    with copy() as path:
        files = archived(path, [8, 20])
        packed = files[0].read_bytes()
        index %= len(packed)
        files[0].write_bytes(packed[:index] + bytes([packed[index] ^ bits]) + packed[index + 1 :])
        found = audit(path, archives=files)
        if found.finding is None:
            assert gzip.decompress(files[0].read_bytes()) == gzip.decompress(packed)
        else:
            assert found.at == files[0]


BASE_CHANGES = [
    "UPDATE model_snapshots SET body = replace(body, 'alice', 'mallory') WHERE position = 19",
    "DELETE FROM model_snapshots WHERE position = 19 AND model_id = 'digits'",
    (
        "INSERT INTO model_snapshots (model_id, position, body)"
        " SELECT 'zoo', position, replace(body, 'digits', 'zoo') FROM model_snapshots"
        " WHERE position = 19 AND model_id = 'digits'"
    ),
    "DELETE FROM job_snapshots WHERE position = 19",
    "UPDATE job_snapshots SET body = replace(body, 'alice', 'mallory') WHERE position = 19",
]


@pytest.mark.parametrize("change", BASE_CHANGES)
def test_a_base_state_that_was_forged_with_care_is_found_by_its_archives_alone(change: str) -> None:
    with copy() as path:
        files = archived(path, [8, 20])
        with closing(connect(path)) as connection:
            assert connection.execute(change).rowcount > 0
            connection.execute(
                "UPDATE archives SET state_sha256 = ? WHERE last_position = 19",
                (base_state_digest(connection, 19),),
            )
            rebuild.rebuild(connection)
        assert audit(path).finding is None  # who can write the file can write its hash, too
        found: Audit = audit(path, archives=files)
        assert found.finding is not None
        assert (found.finding.position, found.finding.kind) == (19, Kind.BASE)
        assert "not what the archives give" in found.finding.problem
        assert replayed(path, None, files) == PAST[None]


def test_a_load_that_answers_for_a_model_and_ended_long_before_is_a_part_of_the_state() -> None:
    with copy() as path:
        files = archived(path, [3, 6, 9])
        with closing(sqlite3.connect(path)) as connection:
            bodies = [json.loads(body) for (body,) in connection.execute("SELECT body FROM job_snapshots")]
        assert any(body["status"] == "completed" for body in bodies)
        assert audit(path, archives=files).finding is None


def test_files_beside_a_ledger_are_compared_with_it() -> None:
    with copy() as path:
        late = path.with_name("late.jsonl")
        late.write_bytes(b"".join(export(path, jsonl(), SIGN)))
        archived(path, [8])
        files = [audit_file(late)]
        assert audit(path, files=files).compared == ((late, None),)
        with closing(connect(path)) as connection:
            connection.execute("DROP TRIGGER events_never_go")
            connection.execute("DELETE FROM events WHERE position = ?", (HEAD,))
            rebuild.rebuild(connection)
            connection.execute("PRAGMA journal_mode = DELETE")
        found = audit(path, files=files)
        assert found.at == late
        assert found.finding is not None
        assert (found.finding.position, found.finding.kind) == (HEAD, Kind.EXPECTATION)


@pytest.mark.parametrize("end", [0, 5, 7, 8, 18])
def test_a_file_that_ends_before_the_base_is_compared_with_the_archives(end: int) -> None:
    with copy() as path, copy() as other:
        with closing(sqlite3.connect(other)) as connection:
            connection.execute("DROP TRIGGER events_never_change")
            digest = bytes(32)
            for position, body, _ in ROWS:
                changed = body.replace("alice", "mallory")
                digest = hashlib.sha256(digest + changed.encode()).digest()
                connection.execute(
                    "UPDATE events SET body = ?, hash = ? WHERE position = ?", (changed, digest, position)
                )
            connection.commit()
        own, foreign = path.with_name("own.jsonl"), path.with_name("foreign.jsonl")
        own.write_bytes(b"".join(export(path, jsonl(), SIGN, until=end)))
        foreign.write_bytes(b"".join(export(other, jsonl(), SIGN, until=end)))
        archives = archived(path, [8, 20])
        for file in (own, foreign):
            with pytest.raises(ArchiveMissing, match=r"name it with --archive, .*: positions \d+ to \d+, '"):
                audit(path, files=[audit_file(file)])
        assert audit(path, archives=archives, files=[audit_file(own)]).compared == ((own, None),)
        found = audit(path, archives=archives, files=[audit_file(foreign)])
        if end:  # without any events they are the same
            assert found.at == foreign
            assert found.finding is not None
            assert (found.finding.position, found.finding.kind) == (end, Kind.EXPECTATION)
        if end < 7:
            with pytest.raises(ArchiveMissing, match="positions 1 to 7"):
                audit(path, archives=archives[1:], files=[audit_file(own)])


@pytest.mark.parametrize("until", ["3", "7", "8", "19", "25", None, TIMES[5]])
def test_an_archive_that_is_another_after_it_was_proved_is_not_answered_from(until: str | None) -> None:
    with copy() as path:
        files = archived(path, [8, 20])
        forgery = path.with_name("forgery.gz")
        forgery.write_bytes(files[0].read_bytes())
        forged(forgery, ("alice", "mallory"))
        with opened_to_read(path) as connection:
            statements = list[str]()

            def swap(statement: str) -> None:
                statements.append(statement)
                if statement == "BEGIN":  # all was proved by then
                    files[0].write_bytes(forgery.read_bytes())

            connection.set_trace_callback(swap)
            with pytest.raises(LogUnavailable, match=r"8\.gz was changed while it was read"):
                replay(connection, until, files)
            assert "BEGIN" in statements


def test_names_that_are_no_text_can_be_told() -> None:
    with copy() as path:
        (file,) = archived(path, [8])
        odd = path.with_name(os.fsdecode(b"\xff.gz"))
        odd.write_bytes(file.read_bytes()[:-20])
        finding = audit(path, archives=[odd]).finding
        assert finding is not None
        assert finding.problem.encode()
        with pytest.raises(LedgerDamaged) as raised:
            replayed(path, 5, [odd])
        assert str(raised.value).encode()
