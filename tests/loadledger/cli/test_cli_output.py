"""Output for people: aligned tables, values with units, and no control characters of a server."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answers import fill
from support.history import PLAIN, History

from answers.approvals import ApprovalInfo, LoadApprovalInfo, UnapprovedVersion, VersionApprovals
from answers.errors import ErrorInfo
from answers.jobs import JobInfo
from answers.models import LoadedFileInfo, ModelCopy, ModelInfo, ModelRulesInfo, VersionOrigin
from answers.resources import Device, LoadUsage, Resources, WaitingJob
from answers.signatures import FileDigest, LoadSignatureInfo, VerifiedVersionInfo
from events.codec import encode_event
from events.types import TYPES, LoadFailed, Unknown, WorkerExited
from features.approvals import cli as approvals
from features.signatures import cli as signatures
from features.signatures.cli import describe_signature
from loadledger.cli import jobs, models, top
from loadledger.cli.events import event_line
from loadledger.cli.jobs import count_steps, describe_progress
from loadledger.cli.output import (
    PROBLEMS,
    display_width,
    format_age,
    format_cell,
    format_duration,
    format_elapsed,
    format_size,
    format_table,
    format_timestamp,
    pad,
    print_json,
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
NOW = datetime(2026, 1, 31, 14, 2, tzinfo=UTC)


HANGUL = "\u1112\u1161\u11ab"


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (
            [("x", "1", "loaded"), ("long", "1000", "failed")],
            ["BY       N  STATE", "x        1  loaded", "long  1000  failed"],
        ),
        (
            [("東京", "1", "loaded"), ("e\u0301", "\uff12", "failed"), (HANGUL, "9", "lost")],
            ["BY     N  STATE", "東京   1  loaded", "e\u0301     \uff12  failed", f"{HANGUL}     9  lost"],
        ),
    ],
    ids=["ASCII", "wide and combining letters"],
)
def test_table_columns_line_up_in_colour(rows: list[tuple[str, str, str]], lines: list[str]) -> None:
    table = list(format_table(("BY", "N", "STATE"), rows, right={"N"}))
    assert [click.unstyle(line) for line in table] == lines
    assert click.style("loaded", fg="green") in table[1]


def test_width_counts_wide_and_combining_letters() -> None:
    assert [display_width(text) for text in ("", "abc", "東京", "e\u0301", "…→")] == [0, 3, 4, 1, 2]
    assert (pad("東", 4), pad("東", 4, right=True), pad("東京", 3)) == ("東  ", "  東", "東京")


STAMP = "2026-01-31T14:01:00.000000Z"


def test_value_has_unit_or_dash() -> None:
    durations = [format_duration(seconds) for seconds in (-5, 9.94, 10, 59.9, 60, 7200, 2e5)]
    assert durations == ["0.0s", "9.9s", "10s", "59s", "1m", "2h", "2d"]
    sizes = [format_size(size) for size in (None, 0, 5_400_000, 25_280_000_000)]
    assert sizes == ["-", "0.0 MB", "5.4 MB", "25.28 GB"]
    cells = [format_cell(text) for text in (None, "", "a\x1b[2Jb", "x" * 500)]
    assert cells == ["-", "-", "a\ufffd[2Jb", "x" * 99 + "…"]
    assert [format_age(text, NOW) for text in (STAMP, None, "no time")] == ["1m", "-", "-"]
    assert [format_timestamp(text) for text in (STAMP, None)] == ["2026-01-31 14:01:00Z", "-"]
    assert [format_elapsed(STAMP, end) for end in ("2026-01-31T14:02:05Z", None)] == ["1m", "-"]


@pytest.mark.parametrize(
    ("status", "stage", "done", "told"),
    [
        ("pending", None, 0, "pending"),
        ("in_progress", "copying", 1, "copying"),
        ("in_progress", "starting", 2, "starting"),
        ("in_progress", "warming_up", 4, "warming up"),
        ("in_progress", "of a later release", 0, "of a later release"),
        ("completed", None, 6, "completed"),
        ("failed", None, 0, "failed"),
    ],
)
def test_job_progress_in_steps_and_words(status: str, stage: str | None, done: int, told: str) -> None:
    job = fill(JobInfo, id="j", kind="load", model_id="m", status=status, stage=stage)
    assert (count_steps(job), describe_progress(job)) == ((done, 6), told)
    job = fill(JobInfo, id="j", kind="load", model_id="m", status="pending", waiting_for="20 MB of memory")
    assert describe_progress(job) == "waits for 20 MB of memory"


ROOM = "memory: needs 168 MB, 55 of 300 MB are free"
WAITS = {"status": "pending", "created_at": STAMP, "waiting_for": ROOM}
WARMS_UP = {"status": "in_progress", "created_at": STAMP, "started_at": STAMP, "stage": "warming_up"}
FOR_MEMORY = f"1m: waits for {ROOM}"
FAILED = ErrorInfo(code="worker_died", message="it died")


@pytest.mark.parametrize(
    ("state", "load", "error", "shown"),
    [
        ("unloaded", None, None, ("unloaded", "")),
        ("unloaded", WAITS, None, ("waiting", f"for {FOR_MEMORY}")),
        ("failed", WAITS, FAILED, ("waiting", f"for {FOR_MEMORY}")),
        ("loading", WARMS_UP, None, ("loading", "for 1m: warming up")),
        ("failed", None, FAILED, ("failed", "worker_died: it died")),
        ("lost", WAITS, FAILED, ("lost", f"version 2 for {FOR_MEMORY}; worker_died: it died")),
        ("loaded", WAITS, None, ("loaded", f"version 2 for {FOR_MEMORY}")),
        ("loaded", WARMS_UP, None, ("loaded", "version 2 for 1m: warming up")),
    ],
)
def test_state_of_a_model_says_what_it_waits_for_or_why(
    state: str, load: dict[str, str] | None, error: ErrorInfo | None, shown: tuple[str, str]
) -> None:
    job = load and fill(JobInfo, id="j", kind="load", model_id="m", version=2, requested_by="alice", **load)
    model = fill(ModelInfo, id="m", state=state, open_load=job, error=error)
    now = datetime.fromisoformat(STAMP) + timedelta(seconds=60)
    assert models.describe_state(model, now) == shown
    assert shown[0] in next(models._details(model))
    assert models._row(model, NOW)[1] == shown[0]


def test_versions_from_sources_have_a_line_each() -> None:
    added_at, pinned = (datetime.now(UTC) - timedelta(days=2)).isoformat(), f"oci://h/m@sha256:{'0' * 64}"
    origins = [
        VersionOrigin(
            version=number, source=source, resolved=resolved, added_by="alice", added_at=added_at, position=9
        )
        for number, source, resolved in ((1, pinned, pinned), (3, "hf://o/m@main", "hf://o/m@c0ffee"))
    ]
    shown = list(models._details(fill(ModelInfo, id="m", state="unloaded", sources=origins)))
    assert shown[-2:] == [
        f"  version 1: from {pinned}, added by alice, 2d ago",
        "  version 3: from hf://o/m@c0ffee (asked as hf://o/m@main), added by alice, 2d ago",
    ]


def test_copies_of_a_model_have_a_line_each() -> None:
    copies = [
        ModelCopy(
            node=node,
            version=version,
            position=9,
            job_id=f"j{node}",
            loaded_at=NOW.isoformat(),
            workers=2,
            memory_bytes=5_000_000,
        )
        for node, version in (("a", 2), ("b", 1))
    ]
    model = fill(
        ModelInfo,
        id="m",
        state="loaded",
        node="a",
        copies=3,
        copies_ready=1,
        copies_at=copies,
        copies_waiting_for="room",
    )
    shown = list(models._details(model))
    assert [line.split(":", 1)[1].strip() for line in shown if line.startswith("  copies")] == [
        "1 of 3 copies ready",
        "room",
    ]
    assert [line.split(", loaded ")[0] for line in shown if line.startswith("  copy at")] == [
        "  copy at a: version 2, 2 workers, 5.0 MB",
        "  copy at b: version 1, 2 workers, 5.0 MB",
    ]
    assert models._nodes_of(model) == "1 of 3 copies ready: a, b"
    assert models._nodes_of(fill(ModelInfo, id="m", state="loaded", node="a")) == "a"
    assert models._nodes_of(fill(ModelInfo, id="m", state="unloaded")) is None


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"method": "key", "signer": "ab", "is_enforced": True}, "verified, by key ab"),
        ({"method": "certificate", "signer": "CN=a"}, "verified, by certificate CN=a, not enforced"),
        ({"problem": "signature_missing"}, "not verified (signature_missing)"),
        (
            {"method": "key", "signer": "ab", "is_enforced": True, "was_verified": True},
            "verified, by key ab; today's rules refuse it, and it was verified before",
        ),
    ],
)
def test_signature_is_described_with_its_check(members: dict[str, Any], told: str) -> None:
    assert describe_signature(fill(LoadSignatureInfo, policy="p", **members)) == told


# A hostile server

EVIL = "\x1b]0;x\x07\x9b2J\u202e\n"
HUGE = 10**400


def evil(kind: type[Any]) -> Any:
    """Return a record in which every text moves the cursor, and every number is too large to be one."""
    values = {str: EVIL, int: HUGE, bool: True}
    members = {
        name: values[kinds[0]]
        for name, described in get_type_hints(kind).items()
        if (kinds := [each for each in values if each in (described, *get_args(described))])
    }
    more = {"error": ErrorInfo(code=EVIL, message=EVIL)} if "error" in kind.__struct_fields__ else {}
    lists = {
        "versions": [HUGE],
        "sources": [evil(VersionOrigin)] if kind is ModelInfo else [],
        "files": [LoadedFileInfo(path=EVIL, bytes=HUGE, mtime_ns=1, sha256=EVIL)],
        "parameters": {EVIL: EVIL},
        "labels": {EVIL: HUGE},
    }
    lists = {name: value for name, value in lists.items() if name in kind.__struct_fields__}
    return fill(kind, **{**members, **more, **lists})


def printed(capsys: pytest.CaptureFixture[str], *calls: Callable[[], None]) -> list[str]:
    for call in calls:
        with suppress(SystemExit):
            call()
    return list(capsys.readouterr())


def test_hostile_answer_prints_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, model, use = evil(JobInfo), evil(ModelInfo), evil(LoadUsage)
    signature, who = evil(LoadSignatureInfo), [EVIL]
    model = msgspec.structs.replace(
        model,
        signature=signature,
        approval=evil(LoadApprovalInfo),
        policy=evil(ModelRulesInfo),
        added_by=who,
        approvals=[evil(ApprovalInfo)],
        unapproved=[evil(UnapprovedVersion)],
    )
    version = msgspec.structs.replace(
        evil(VerifiedVersionInfo),
        signature=signature,
        files=[FileDigest(path=EVIL, sha256=EVIL)],
        added_by=who,
    )
    job = msgspec.structs.replace(
        job,
        created_at="2026-01-31T14:02:00Z",
        finished_at=NOW.isoformat(),
    )
    found = msgspec.structs.replace(
        evil(Resources),
        models=[use],
        waiting=[evil(WaitingJob)],
        pressure=None,
        devices=[evil(Device), evil(Device)],
        device_problems=who,
    )
    done = msgspec.structs.replace(job, status="completed", error=None)
    failed = msgspec.structs.replace(job, status="failed")
    shown = [
        *models._details(model),
        *format_table(models.COLUMNS, [models._row(model, NOW)]),
        *jobs._details(job),
        *approvals._describe(version, model),
        approvals._describe_answer(evil(VersionApprovals), withdraw=False),
        *signatures._verified_lines(version),
        *format_table(jobs.COLUMNS, [jobs._row(job, NOW)]),
        models.status_line(EVIL, found),
        *models._resource_lines(found),
        *top.lay_out(top.ServerSnapshot("http://here", found, [job], [model], NOW, 0.1, EVIL), 200, 60),
    ]
    assert [line for line in map(click.unstyle, shown) if not line.isprintable()] == []
    said = printed(
        capsys,
        *(partial(jobs.report_job, each, as_json=False) for each in (job, done, failed)),
        partial(jobs.report_request, None, done, wait=False, as_json=False),
    )
    assert [line for text in said for line in text.splitlines() if not line.isprintable()] == []
    text = "\x9b \u202e é \U000e0001"
    (out, _) = printed(capsys, partial(print_json, {"text": text}))
    assert [line for line in out.splitlines() if not line.isprintable()] == []
    assert json.loads(out) == {"text": text}


# Events


def line_of(event: Any) -> bytes:
    return f'{encode_event(event)[:-1]},"hash":"{"0" * 64}"}}'.encode()


def test_event_line_is_one_printable_line() -> None:
    history = History()
    history.load("a")
    history.add(LoadFailed("broken", "one\ntwo \x1b[2J" + "x" * 5000), "a")
    history.add(WorkerExited(None, 9, ("first", "last words\r")), None)
    history.add(Unknown("Later\n", 7, {"member": [1]}), None)
    history.restart()
    for event in history.facts:
        line = event_line(line_of(event))
        assert line.isprintable()
        assert len(line) < 320
        assert str(event.position) in line
    assert "signal 9, last words" in event_line(line_of(history.facts[4]))
    odd = b'{"actor":"a","data":{"no":"LoadStarted"},"model_id":"m","position":7,"type":"LoadStarted"'
    huge = b'{"type":"ModelUnloaded","data":{"drained_requests":0,"aborted_requests":0,"freed_bytes":1%b}}'
    assert "freed_bytes: 1000" in event_line(huge % (b"0" * 400))
    assert "no: LoadStarted" in event_line(odd + b',"hash":"%b"}' % (b"0" * 64))


@PLAIN
@given(
    members=st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(sorted(TYPES)) | JSON,
            "data": st.dictionaries(st.sampled_from(["files", "signal", "stderr", "durations", "code"]), JSON)
            | JSON,
            "position": JSON,
            "actor": JSON,
            "model_id": JSON,
            "version": JSON,
        },
    )
)
def test_unknown_event_is_one_printable_line(members: dict[str, Any]) -> None:
    assert event_line(json.dumps(members).encode()).isprintable()


def test_invalid_json_is_one_printable_line() -> None:
    for line in (b"", b"[1]", b"{", b"\xff"):
        assert event_line(line).isprintable()


@pytest.mark.parametrize("place", PROBLEMS)
def test_problems_that_end_a_command_are_exceptions(place: str) -> None:
    assert issubclass(resolve_name(place), Exception)
