"""`loadledger top`: what a terminal of any size shows, and the state in which it leaves the terminal."""

import base64
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.answers import fill
from support.clients import Shell
from support.history import PLAIN
from support.http import LocalApi, local_server
from support.servers import CTRL_C, MODULE, at_terminal
from support.sources import in_thread

from answers.errors import ErrorInfo
from answers.health import NotReady
from answers.jobs import JobInfo
from answers.models import ModelInfo
from answers.resources import LoadUsage, OperatorNotice, PressureInfo, Resources
from loadledger.cli import top
from loadledger.cli.output import display_width
from loadledger.cli.top import TopView
from runtime.memory import list_descendants

NOW = datetime.now(UTC)
WAITS = "memory: needs 168 MB, 55 of 300 MB are free: unload a model, or start with --evict idle"
NOT_A_MODEL = "model.onnx is a text and no model: 'not a model' are its first bytes; export the model again"
FULL = NotReady(
    check="log",
    cause="the ledger cannot be written: database or disk is full",
    cure="free space in /var/lib/loadledger; the server then goes on by itself",
)
A_USE, A_LOAD, A_MODEL = fill(LoadUsage), fill(JobInfo, kind="load"), fill(ModelInfo)


def use(model_id: str, cpu_s: float = 0, oldest_s: float | None = None, megabytes: int = 50) -> LoadUsage:
    return msgspec.structs.replace(
        A_USE,
        model_id=model_id,
        job_id=f"job of {model_id}",
        version=1,
        phase="serving",
        workers=1,
        cpu_s=cpu_s,
        memory_bytes=megabytes * 10**6,
        oldest_request_s=oldest_s,
        in_flight=int(oldest_s is not None),
        keep_alive_s=1800,
    )


def waiting_load(model_id: str, reason: str = WAITS, *, status: str = "pending", age_s: int = 95) -> JobInfo:
    return msgspec.structs.replace(
        A_LOAD,
        id="019ad0d0-1111-7000-8000-000000000001",
        model_id=model_id,
        version=1,
        status=status,
        waiting_for=reason,
        created_at=(NOW - timedelta(seconds=age_s)).isoformat(),
        requested_by="alice",
    )


def failed_model(model_id: str, state: str, code: str, message: str) -> ModelInfo:
    return msgspec.structs.replace(
        A_MODEL, id=model_id, state=state, error=ErrorInfo(code=code, message=message)
    )


def snapshot(
    uses: Sequence[LoadUsage], jobs: Sequence[JobInfo], wrong: Sequence[ModelInfo], **members: Any
) -> top.ServerSnapshot:
    found = fill(Resources, models=list(uses), budget_bytes=10**9, free_bytes=4 * 10**8, as_of=123, **members)
    return top.ServerSnapshot("http://127.0.0.1:8080", found, jobs, wrong, NOW, 0.1)


HANGS, BUSY = use("hangs", oldest_s=734, cpu_s=3), use("busy", oldest_s=2, cpu_s=9, megabytes=60)
NIGHT = snapshot(
    [*(use(f"heavy-{number}", megabytes=40 + number) for number in range(16)), BUSY, HANGS],
    [waiting_load("late"), waiting_load("big", age_s=200), waiting_load("now", status="in_progress")],
    [
        failed_model("broken", "failed", "invalid_model", NOT_A_MODEL),
        failed_model("crasher", "lost", "worker_died", "the worker was killed by signal 9"),
    ],
    not_ready=[FULL],
    pressure=PressureInfo(memory_some_percent=0.0, cpu_some_percent=99.13),
)


def lay_out(
    shown: top.ServerSnapshot, columns: int, rows: int, order: bytes = b"T", first: int = 0
) -> list[str]:
    return [click.unstyle(line) for line in top.lay_out(shown, columns, rows, TopView(order, first))]


def first_words(lines: Sequence[str]) -> list[str]:
    return [line.split()[0] for line in lines if line]


def test_small_terminal_shows_the_trouble_first() -> None:
    lines = lay_out(NIGHT, 80, 24)
    assert lines[0].startswith("loadledger  http://127.0.0.1:8080  q quits, T P M sort  ")
    assert " ".join(lines[1:3]) == f"NOT READY: {FULL.cause}: {FULL.cure}"
    text = re.sub(r"\s+", " ", " ".join(lines))
    assert f"broken failed invalid_model: {NOT_A_MODEL} crasher lost worker_died: the worker was" in text
    assert [line.split()[1] for line in lines if line.startswith("load ")] == ["big", "late", "now"]
    assert text.count(f"waits for {WAITS}") == 2
    assert re.search(
        r"OLDEST .* hangs 1 serving 50\.0 MB 3\.0s 1 12m - busy 1 serving 60\.0 MB 9\.0s 1 2\.0s", text
    )
    assert (len(lines), lines[-1]) == (24, "and 14 more loaded")


def test_scrolled_models_that_are_unloaded_leave_one_in_view() -> None:
    assert "m1" in first_words(lay_out(snapshot([use("m0"), use("m1")], [], []), 80, 24, first=15))


def test_note_is_one_line_below_the_memory() -> None:
    note = OperatorNotice(title="m: not joined", why="Rows may depend. " * 9, todo="Nothing.", level="note")
    disk = OperatorNotice(title="The disk is full", why="No events.", todo="Free it.")
    lines = lay_out(snapshot([use("m")], [], [], notices=[note, disk]), 80, 24)
    at = [n for n, line in enumerate(lines) if line.startswith(("The disk", "memory", "m: not joined"))]
    assert [lines[n].split()[0] for n in at] == ["The", "memory", "m:"]
    assert lines[at[-1]].endswith("…")


@pytest.mark.parametrize(
    ("order", "cpu_percent", "first"),
    [
        (b"T", {}, ["hangs", "busy", "heavy-15"]),
        (b"M", {}, ["busy", "heavy-15", "heavy-14"]),
        (b"P", {HANGS.job_id: 99.6, "job of heavy-3": 120.0}, ["heavy-3", "hangs", "busy"]),
    ],
)
def test_models_are_sorted_as_asked(order: bytes, cpu_percent: dict[str, float], first: list[str]) -> None:
    lines = lay_out(replace(NIGHT, cpu_percent=cpu_percent), 120, 60, order)
    head = next(number for number, line in enumerate(lines) if "OLDEST" in line)
    assert first_words(lines[head + 1 :])[:3] == first
    assert all(f" {percent:.0f}% " in "\n".join(lines) for percent in cpu_percent.values())


@pytest.mark.parametrize(
    ("keys", "view"),
    [
        ([], TopView(b"T", 0)),
        ([b"\x1b[B", b"\x1b[B", b"\x1b[A"], TopView(b"T", 1)),
        ([b"\x1b[A", b"x", b"\x1b[H"], TopView(b"T", 0)),
        ([b"\x1b[6~", b" ", b" "], TopView(b"T", 20)),
        ([b" ", b" ", b"\x1b[5~"], TopView(b"T", 10)),
        ([b" ", b"P"], TopView(b"P", 0)),
        ([b"M"], TopView(b"M", 0)),
    ],
)
def test_keys_scroll_and_sort(keys: list[bytes], view: TopView) -> None:
    pressed = TopView()
    for key in top.KEY.findall(b"".join(keys)):
        pressed = pressed.press(key, loaded=21)
    assert pressed == view


def test_cpu_percent_is_of_the_time_between_two_snapshots() -> None:
    before = snapshot([use("steady", 10), use("restarted", 10), use("gone", 10)], [], [])
    after = snapshot([use("steady", 13), use("restarted", 1), use("new", 5)], [], []).resources
    shown = top._cpu_percent(before, after, NOW + timedelta(seconds=2))
    assert shown == {"job of steady": 150.0, "job of restarted": 0.0}


@pytest.mark.parametrize(
    ("wants", "rows", "shares"),
    [
        ([], 24, []),
        ([4, 3, 30], 20, [4, 3, 13]),
        ([30, 3, 30], 20, [8, 3, 9]),
        ([30, 30, 30], 20, [6, 7, 7]),
        ([3, 3, 3], 20, [3, 3, 3]),
        ([5, 5], 1, [0, 1]),
    ],
)
def test_rows_are_shared_among_tables(wants: list[int], rows: int, shares: list[int]) -> None:
    assert top.share_rows(wants, rows) == shares


TEXTS = st.text("ab -東\u0301\x1b\n", max_size=60)
COUNTS = st.tuples(*[st.integers(0, 30)] * 3)


@PLAIN
@given(COUNTS, TEXTS, TEXTS, st.tuples(st.integers(20, 200), st.integers(1, 60)), st.integers(0, 40))
def test_all_items_are_shown_or_counted_in_any_size(
    counts: tuple[int, int, int], suffix: str, reason: str, size: tuple[int, int], first: int
) -> None:
    columns, rows = size
    prefixes, nouns = ("f", "j", "m"), ("failed", "jobs", "loaded")
    wrong, jobs, uses = (
        [f"{prefix}{n}_{suffix}" for n in range(each)] for prefix, each in zip(prefixes, counts, strict=True)
    )
    shown = snapshot(
        [use(name) for name in uses],
        [waiting_load(name, reason) for name in jobs],
        [failed_model(name, "failed", "code", reason) for name in wrong],
        not_ready=[FULL] if first % 2 else [],
    )
    lines = lay_out(shown, columns, rows, first=first)
    assert len(lines) <= rows
    assert [line for line in lines if display_width(line) > columns] == []
    if rows <= len(counts):  # no room for a line each
        return
    for prefix, noun, count in zip(prefixes, nouns, counts, strict=True):
        seen = {found[0] for line in lines[1:] if (found := re.search(rf"\b{prefix}\d+_", line))}
        more = [int(found[1]) for line in lines if (found := re.fullmatch(rf"and (\d+) more {noun}", line))]
        assert len(seen) + sum(more) == count


# At a terminal


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    with in_thread(local_server(tmp_path_factory.mktemp("top"))) as server:
        for number in range(8):
            server.save(models.unknown_operator(), f"bad-{number}")
        yield server


SHELL = """
trap : INT
stty -g; "$@"; echo "exit code $?"; stty -g
read line; echo "read [$line]"
"""
TYPED = b"rm -rf zzz\r\x1b[B"


@pytest.mark.parametrize(
    ("end", "code"), [("q", 0), ("Ctrl-C", 0), ("SIGTERM", 143), ("refusal", 2)], ids=str
)
async def test_end_of_top_leaves_the_terminal_as_it_was(server: LocalApi, end: str, code: int) -> None:
    watcher, admin = Shell(server, "audit", subject=f"watcher of {end}"), Shell(server, "admin")
    command = ["/bin/sh", "-c", SHELL, "sh", *MODULE]
    with at_terminal("top", environment=watcher.environment, command=command) as terminal:
        await terminal.until("position")
        terminal.press(TYPED)
        match end:
            case "q":
                terminal.press(b"qqqq")
            case "Ctrl-C":
                terminal.press(CTRL_C)
            case "SIGTERM":
                os.kill(list_descendants(terminal.pid)[0], signal.SIGTERM)
            case "refusal":
                _, claims, _ = watcher.environment["LOADLEDGER_TOKEN"].split(".")
                token_id = json.loads(base64.urlsafe_b64decode(claims + "=="))["jti"]
                admin.prints(f"token revoke {token_id} --expires=1h")
        await terminal.until(r"exit code \d+\s+\S+:\S+\s")
        terminal.press(b"next line\r")
        assert await terminal.end() == 0
    before, *_, after = re.findall(
        r"^[0-9a-f]+(?::[0-9a-f]+)+", terminal.plain.replace("\r", ""), re.MULTILINE
    )
    assert before == after
    assert f"exit code {code}" in terminal.plain
    assert "read [next line]" in terminal.plain
    assert "zzz" not in terminal.plain
    assert terminal.shown.count("\x1b[?1049h") == terminal.shown.count("\x1b[?1049l") == 1


async def test_top_follows_keys_and_the_size_of_the_terminal(server: LocalApi) -> None:
    admin = Shell(server, "admin")
    for number in range(8):
        admin.refused(1, f"load bad-{number} --wait")
    for model_id in ("first", "second"):
        server.save(models.add(), model_id)
        admin.prints(f"load {model_id} --wait")
    command = ["/usr/bin/env", "--unset=LINES", "--unset=COLUMNS", *MODULE]
    with at_terminal("top", environment=admin.environment, command=command) as terminal:
        terminal.resize(40, 80)
        await terminal.until(r"bad-7 [^$]+(first|second) ")
        terminal.press(b"\x1b[B")
        await terminal.until("and 1 more loaded")
        terminal.shown = ""
        terminal.resize(16, 60)
        await terminal.until(r"and \d more failed")
        assert "bad-7 " not in terminal.plain
        terminal.press(b"q")
        assert await terminal.end() == 0
    assert "Traceback" not in terminal.plain
