"""Archives beside their log: they lead to its base, come to what it stores there, and replay to the past."""

import gzip
import hashlib
import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ledgers
from support.history import FEWER

from events.audit.audit import audit
from events.audit.export import JSONL, export
from events.audit.exportreader import InvalidArchive, audit_file
from events.audit.replay import replay
from events.audit.signing import key_id
from events.audit.verify import FindingKind
from events.clock import add_seconds
from events.errors import Archived, ArchiveMissing, LedgerDamaged, LedgerProblem, LogUnavailable, NothingThere
from events.sqlite import storage
from events.sqlite.bases import list_archives, read_stored_base, suspended_triggers
from events.sqlite.queries import as_text
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import connect
from events.sqlite.timetravel import BeforeFirst, BeyondHead, Moment, models_at, read_moment
from events.storage import digest_state
from events.types import Anchor

LEDGER = ledgers.sound_ledger(3, seconds=0.5)
"""At most two of its events have the same time."""


def exported(path: Path, name: str, until: int | None = None) -> Path:
    file = path.with_name(name)
    file.write_bytes(b"".join(export(path, JSONL, ledgers.SIGN, until=until)))
    return file


def replayed(path: Path, until: object, archives: list[Path]) -> tuple[Moment, list[str], list[str]]:
    with open_read_only(path) as ledger:
        moment, state = replay(ledger, None if until is None else str(until), archives)
        return moment, sorted(map(as_text, state.models.values())), list(map(as_text, state.unended()))


with ledgers.copy_of(LEDGER) as _path:
    ROWS = ledgers.rows_of(_path)
    HEAD = len(ROWS)
    TIMES = [json.loads(body)["recorded_at"] for _, body, _ in ROWS]
    MOMENTS = [None, *range(HEAD + 1), "2099-01-01T00:00:00Z", *sorted(set(TIMES))]
    PAST = {moment: replayed(_path, moment, []) for moment in MOMENTS}
CUTS = st.lists(st.integers(2, HEAD), min_size=1, max_size=4, unique=True).map(sorted)


# What archives prove.


@FEWER
@given(CUTS, st.integers(0, 5), st.randoms(), st.sampled_from(MOMENTS))
def test_archives_in_any_order_prove_and_replay_the_past(
    cuts: list[int], boundary: int, dice: Random, moment: object
) -> None:
    position = (1, cuts[0] - 1, cuts[0], cuts[-1] - 1, cuts[-1], HEAD)[boundary]
    with ledgers.copy_of(LEDGER) as path:
        files = ledgers.archive_before(path, *cuts)
        dice.shuffle(files)
        found = audit(path, Anchor(position, ROWS[position - 1][2]), archives=files)
        assert found.finding is None
        assert [each.proved.position for each in found.behind] == [cut - 1 for cut in cuts]
        wrong = audit(path, Anchor(position, b"\1" * 32), archives=files).finding
        assert ledgers.place_of(wrong) == (position, FindingKind.EXPECTATION)
        assert replayed(path, moment, files) == PAST[moment]


@pytest.mark.parametrize("cuts", [[2], [20], [8, 33, HEAD]], ids=str)
def test_every_past_moment_replays_as_before_archiving(cuts: list[int]) -> None:
    with ledgers.archived_copy(LEDGER, *cuts) as (path, files):
        for moment in MOMENTS:
            assert replayed(path, moment, files) == PAST[moment], moment
        with pytest.raises(BeyondHead):
            replayed(path, HEAD + 1, files)
        with pytest.raises(BeforeFirst, match="2025-12-31T23:59:59Z is before the first event"):
            replayed(path, "2025-12-31T23:59:59Z", files)
        if cuts[0] > 2:
            for moment in (1, TIMES[1]):
                with pytest.raises(Archived, match=f" in '{cuts[0]}.gz'"):
                    replayed(path, moment, [])


def test_time_between_two_archives_or_before_the_log() -> None:
    ledger = ledgers.sound_ledger(2, seconds=600)
    with ledgers.archived_copy(ledger, 12, 20) as (path, files):
        with open_read_only(path) as connection:
            first, base = (each.recorded_at for each in list_archives(connection))
        for time, words in (
            (add_seconds(first, -1), r"in '12\.gz', up to position 19"),
            (first, r"in '12\.gz' or '20\.gz', up to position 19"),
            (add_seconds(first, 1), r"in '12\.gz' or '20\.gz', up to position 19"),
            (add_seconds(base, -1), r"in '12\.gz' or '20\.gz', up to position 19"),
        ):
            with pytest.raises(Archived, match=words):
                replayed(path, time, [])
            assert replayed(path, time, files)[0].position < 19
        for time in (base, add_seconds(base, 1)):
            found, by_archives = replayed(path, time, []), replayed(path, time, files)
            assert (found[0].position, found[1:]) == (by_archives[0].position, by_archives[1:])
            assert (found[0].position, by_archives[0].recorded_at) == (19, base)
            with open_read_only(path) as connection:
                moment, models = read_moment(connection, time, models_at)
            assert (moment.position, len(models)) == (19, len(found[1]))


@pytest.mark.parametrize("cuts", [[], [20]], ids=str)
def test_replay_ignores_forged_history(cuts: list[int]) -> None:
    with ledgers.archived_copy(LEDGER, *cuts) as (path, files):
        ledgers.change_ledger(
            path, "DELETE FROM model_history", "UPDATE presence SET state = 'running', seen_at = at"
        )
        for moment in MOMENTS:
            assert replayed(path, moment, files) == PAST[moment], moment


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([0, 2], r"8 to 19 are missing: 33.gz begins after 19.*: '20.gz', up to position 19"),
        ([0, 1], r"20 to 32 are missing: the log begins after 32.*: '33.gz', up to position 32"),
        ([1, 2], r"1 to 7 are missing: 20.gz begins after 7.*: '8.gz', up to position 7"),
        ([0, 0, 1, 2], r"8.gz begins after 0, and the archive before goes on to position 7"),
    ],
    ids=str,
)  # fmt: skip
def test_missing_or_repeated_archive_is_named(chosen: list[int], words: str) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20, 33) as (path, files):
        for archives in ([files[each] for each in chosen], [files[each] for each in chosen[::-1]]):
            with pytest.raises(ArchiveMissing, match=words):
                audit(path, archives=archives)
            with pytest.raises(ArchiveMissing, match=words):
                replayed(path, 5, archives)


def test_export_replaces_archives_whose_events_it_has() -> None:
    with ledgers.copy_of(LEDGER) as path:
        whole, later = exported(path, "whole.jsonl", 32), exported(path, "later.jsonl")
        with pytest.raises(NothingThere):
            audit(path, archives=[later])  # nothing is archived yet
        with pytest.raises(NothingThere):
            replayed(path, None, [later])
        ledgers.archive_before(path, 8, 20, 33)
        assert audit(path, archives=[whole]).finding is None
        assert replayed(path, 25, [whole]) == PAST[25]
        with pytest.raises(
            ArchiveMissing,
            match=f"the log begins after 32, .* goes on to position {HEAD}",
        ):
            audit(path, archives=[later])
        with pytest.raises(LedgerProblem):
            audit(path.with_name("none.db"), archives=[whole])


def test_archive_signed_by_another_key_is_found() -> None:
    with ledgers.archived_copy(LEDGER, 8) as (path, files):
        files.extend(ledgers.archive_before(path, 20, sign=ledgers.OTHER_SIGN))
        assert audit(path, archives=files).finding is None
        found = audit(path, archives=files, key=key_id(ledgers.SIGN.public_key))
        assert (found.at, *ledgers.place_of(found.finding)) == (files[1], 19, FindingKind.EXPECTATION)


# What somebody makes of them.


def forge(file: Path, change: tuple[str, str]) -> None:
    """Change an archive's bodies, make all its hashes anew, and sign its head with another key."""
    opening, *events, _ = map(json.loads, gzip.decompress(file.read_bytes()).splitlines())
    digest = bytes.fromhex(opening["after"]["hash"])
    for event in events:
        event["body"] = event["body"].replace(*change)
        digest = hashlib.sha256(digest + event["body"].encode()).digest()
        event["hash"] = digest.hex()
    lines = [json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in (opening, *events)]
    head = audit_file(file).head
    assert head is not None
    lines.append(JSONL.last(ledgers.OTHER_SIGN(replace(head.statement, hash=digest))))
    file.write_bytes(gzip.compress(b"".join(lines)))
    assert audit_file(file).finding is None


@pytest.mark.parametrize(("number", "position"), [(0, 7), (1, 19)])
def test_forged_archive_does_not_lead_to_the_base(number: int, position: int) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        forge(files[number], ("alice", "mallory"))
        found = audit(path, archives=files)
        assert (found.at, *ledgers.place_of(found.finding)) == (files[1], position, FindingKind.BASE)
        with pytest.raises(InvalidArchive, match=f"20.gz does not verify: position {position}"):
            replayed(path, 5, files)


@pytest.mark.parametrize("number", [0, 1])
def test_archive_whose_head_says_another_state_is_found(number: int) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        head, lines = audit_file(files[number]).head, gzip.decompress(files[number].read_bytes()).splitlines()
        assert head is not None
        lines[-1] = JSONL.last(ledgers.SIGN(replace(head.statement, state_sha256=b"\1" * 32))).rstrip()
        files[number].write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines)))
        assert audit_file(files[number]).finding is None
        found = audit(path, archives=files)
        position = head.statement.position
        assert (found.at, *ledgers.place_of(found.finding)) == (files[number], position, FindingKind.BASE)


@FEWER
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_changed_byte_of_an_archive_is_named(index: int, bits: int) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        packed = files[0].read_bytes()
        files[0].write_bytes(ledgers.flip_byte(packed, index, bits))
        found = audit(path, archives=files)
        if found.finding is None:
            assert gzip.decompress(files[0].read_bytes()) == gzip.decompress(packed)
        else:
            assert found.at == files[0]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE base_state SET body = replace(body, 'alice', 'mallory') WHERE kind = 'model'",
        (
            "INSERT INTO base_state SELECT kind, 'zoo', replace(body, 'digits', 'zoo') FROM base_state"
            " WHERE key = 'digits'"
        ),
        "DELETE FROM base_state WHERE kind = 'job'",
        "UPDATE base_state SET body = replace(body, 'alice', 'mallory') WHERE kind = 'job'",
    ],
)
def test_forged_base_state_is_found_by_archives_alone(change: str) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        with closing(connect(path)) as connection:
            assert connection.execute(change).rowcount > 0
            digest = digest_state(read_stored_base(connection).entities)
            with suspended_triggers(connection):
                connection.execute("UPDATE base SET state_sha256 = ?", (digest,))
            storage.rebuild(connection)
        assert audit(path).finding is None  # who can write the file can write its hash, too
        found = audit(path, archives=files)
        assert ledgers.place_of(found.finding) == (19, FindingKind.BASE)
        assert "not what the archives give" in str(found.finding)
        assert replayed(path, None, files) == PAST[None]


def test_newer_export_shows_that_the_log_was_cut() -> None:
    with ledgers.copy_of(LEDGER) as path:
        late = exported(path, "late.jsonl")
        assert audit(path, files=[audit_file(late)]).finding is None
        ledgers.archive_before(path, 8)
        files = [audit_file(late)]
        assert audit(path, files=files).finding is None
        ledgers.change_ledger(path, f"DELETE FROM events WHERE position = {HEAD}")
        with closing(connect(path)) as connection:
            storage.rebuild(connection)
            connection.execute("PRAGMA journal_mode = DELETE")
        found = audit(path, files=files)
        assert (found.at, *ledgers.place_of(found.finding)) == (late, HEAD, FindingKind.EXPECTATION)


@pytest.mark.parametrize("end", [0, 5, 7, 8, 18])
def test_export_that_ends_before_the_base_is_compared_with_archives(end: int) -> None:
    with ledgers.copy_of(LEDGER) as path, ledgers.copy_of(LEDGER) as other:
        ledgers.forge_bodies(other, lambda _, body: body.replace("alice", "mallory"))
        own, foreign = exported(path, "own.jsonl", end), exported(other, "foreign.jsonl", end)
        archives = ledgers.archive_before(path, 8, 20)
        for file in (own, foreign):
            with pytest.raises(Archived, match=r"is archived, in '\d+.gz', up to position \d+:"):
                audit(path, files=[audit_file(file)])
        assert audit(path, archives=archives, files=[audit_file(own)]).finding is None
        found = audit(path, archives=archives, files=[audit_file(foreign)])
        if end:  # without any events they are the same
            assert (found.at, *ledgers.place_of(found.finding)) == (foreign, end, FindingKind.EXPECTATION)


@pytest.mark.parametrize("until", ["3", "7", "8", "19", "25", None, TIMES[5]])
def test_archive_that_changes_after_its_proof_fails_the_replay(until: str | None) -> None:
    with ledgers.archived_copy(LEDGER, 8, 20) as (path, files):
        forgery = path.with_name("forgery.gz")
        forgery.write_bytes(files[0].read_bytes())
        forge(forgery, ("alice", "mallory"))
        with open_read_only(path) as connection:
            statements = list[str]()

            def swap(statement: str) -> None:
                statements.append(statement)
                if statement == "BEGIN":  # all was proved by then
                    files[0].write_bytes(forgery.read_bytes())

            connection.set_trace_callback(swap)
            with pytest.raises(LogUnavailable, match=r"8\.gz was changed while it was read"):
                replay(connection, until, files)
            assert "BEGIN" in statements


def test_file_name_that_is_not_utf_8_can_be_printed() -> None:
    with ledgers.archived_copy(LEDGER, 8) as (path, [file]):
        odd = path.with_name(os.fsdecode(b"\xff.gz"))
        odd.write_bytes(file.read_bytes()[:-20])
        finding = audit(path, archives=[odd]).finding
        assert finding is not None
        assert finding.problem.encode()
        with pytest.raises(LedgerDamaged) as raised:
            replayed(path, 5, [odd])
        assert str(raised.value).encode()
