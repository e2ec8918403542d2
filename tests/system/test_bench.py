"""The bench: its tables, its clients and its checks. Its figures mean nothing beside other tests.

`make soak` and CI run the parts that take long.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.connections import odd_server
from support.fleet import of_both, soak_only
from support.postgres import require_programs
from support.servers import clean_environment
from yarl import URL

from bench import baselines, generator, postgres
from bench.driver import Answer, completed_job
from bench.generator import WrongAnswer, generate, longest_gap
from bench.requests import Target, add_one_request

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
FEWER_LOADS = """
from bench import __main__, loads
loads.LOADS_AT_ONCE = 3
__main__.main()
"""
"""Ten, the usual number, take half a minute."""
SMALL_CLUSTER = """
from bench import __main__, cluster, nodes
cluster.APPENDED = {64: 640, 1: 20}
nodes.LEASE_S = 10.0
__main__.main()
"""
"""With a longer lease: on a slow disk the database needs seconds for its last checkpoint before it stops."""


def run(*arguments: str | Path, how: str = "-m") -> subprocess.CompletedProcess[str]:
    """Run a module of the bench as its users do, or with "-c" a program."""
    return subprocess.run(
        [sys.executable, how, *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


ONCE = ("--repeats", "1", "--rounds", "1")
PARTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "loads, memory, inference": (
        None,
        (
            *("--only=loads", "--network=cnn", "--network=mlp"),
            *("--only=memory", "--only=release", "--cycles=1"),
            *("--only=inference", "--seconds=0.2", *ONCE),
        ),
    ),
    "policies": (FEWER_LOADS, ("--only=policies", *ONCE, "--swaps=3")),
    "compute": (None, ("--only=compute", "--rounds=1", "--seconds=2")),
    "tails": (
        None,
        ("--only=tails", *of_both(short=("--tails=50", "--tail-seconds=1"), long=("--tails=1000",))),
    ),
    "ledger": (None, ("--only=ledger", "--facts=2000", "--rounds=1")),
    "cluster": (
        SMALL_CLUSTER,
        ("--only=cluster", *ONCE, "--facts=2000", "--seconds=0.2"),
    ),
}
"""By name: a program that runs the bench in a smaller form, and options."""


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part == "tails" else soak_only) for part in PARTS]
)
def test_bench_prints_the_table_of_a_part(part: str) -> None:
    if part == "cluster":
        require_programs()
    program, options = PARTS[part]
    done = run("bench", *options) if program is None else run(program, *options, how="-c")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    assert all(heading in text for heading in ("what", "ours", "beside", "ratio", "goal", "reached"))


def test_programs_of_newest_postgresql_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version in ("9.6", "15", "16"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin" / "initdb").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("POSTGRES", raising=False)
    monkeypatch.setattr(postgres, "DEBIAN", tmp_path)
    monkeypatch.setattr(postgres, "SUPERUSER", "root")
    assert postgres.find_programs() == tmp_path / "16" / "bin"
    monkeypatch.setattr(postgres, "SUPERUSER", "nobody knows")
    assert (postgres.find_programs() is None) is (os.geteuid() == 0)


def test_missing_peers_end_the_bench_with_instructions(tmp_path: Path) -> None:
    done = run("bench", "--only", "inference", "--peers", tmp_path)
    assert done.returncode == 1
    assert "`make bench-peers` installs it" in done.stderr


@pytest.mark.parametrize(
    ("times", "longest"),
    [
        ((1.0, 2.0, 5.0, 6.0), 3.0),  # the gap lies within
        ((1.0, 2.0, 9.0), 7.0),  # and ends after the end
        ((0.0, 2.5, 3.0, 4.0, 9.0), 5.0),
        ((0.0, 9.0), 9.0),  # nothing was answered at all
        ((0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 30.0), 4.0),  # what lies before and after is not looked at
        ((3.0, 4.0), 2.0),  # the last is not known to have ended before the end
        ((), 4.0),
    ],
)
def test_longest_gap_between_answers(times: tuple[float, ...], longest: float) -> None:
    assert longest_gap(times, 2.0, 6.0) == longest


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_wrong_answer_ends_the_bench(*, binary: bool) -> None:
    with (
        baselines.constant_reply() as port,
        pytest.raises(SystemExit, match="a wrong answer: the constant one"),
    ):
        add_one_request(16, binary=binary).check(Target("the constant one", port))


@pytest.mark.parametrize(("answered", "path"), [(True, "/v2/models/a/infer"), (False, "/nowhere")])
def test_clients_record_answers_and_count_failures(tmp_path: Path, path: str, *, answered: bool) -> None:
    request = tmp_path / "request"
    request.write_bytes(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
    with baselines.constant_reply() as port, generator.recording(port, request, clients=2) as stop:
        told = stop()
    assert len(told.answered_s) == 2
    assert told.total > 0
    assert (told.failed == 0) is answered
    assert ("404" in told.reason) is not answered
    assert all(list(times) == sorted(times) for times in told.answered_s)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, None, b'{"status":"failed","error":"why"}'),
        Answer(503, "1", b"why"),
    ],
)
def test_unfinished_job_ends_the_bench_with_its_reason(answer: Answer) -> None:
    with pytest.raises(SystemExit, match=r"POST /load: (200|503) .*why"):
        completed_job(answer, "/load")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the server closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nbody", "2 bytes more"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nwhy?", r"why\?"),
    ],
)
def test_generator_stops_at_an_unexpected_answer(answer: bytes, told: str) -> None:
    with odd_server(answer) as server, pytest.raises(WrongAnswer, match=told):
        asyncio.run(generate(URL(server.url).port or 0, [b"GET / HTTP/1.1\r\n\r\n"], 1, 0.2, 0.0))
