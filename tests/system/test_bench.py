"""The bench: its tables, its clients and its checks. Its figures mean nothing beside other tests.

`make soak` and CI run the parts that take long.
"""

import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.fleet import soak_only
from support.postgres import require_programs
from support.servers import UNHURRIED, clean_environment

from bench import baselines, generator, models
from bench.driver import Answer, completed_job
from bench.generator import Result, WrongAnswer, generate, longest_gap
from bench.models import NETWORKS, Network
from bench.requests import Target, add_one_request, encode

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
FEWER_LOADS = """
from bench import __main__, loads
loads.LOADS_AT_ONCE = 3
__main__.main()
"""
"""Ten, the usual number, take half a minute."""
FEWER_APPENDS = """
from bench import __main__, cluster
cluster.APPENDED = {64: 640, 1: 20}
__main__.main()
"""
UNHURRIED_BENCH = f"""
from bench import __main__, driver
driver._command = lambda *arguments: [*{UNHURRIED}, *map(str, arguments)]
__main__.main()
"""
"""Preparation waits for an idle machine, which this one may not be."""


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
TABLES: dict[str, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {
    "loads, memory, inference": (
        None,
        (
            "--only=loads",
            "--network=cnn",
            "--network=stateful",
            "--only=memory",
            "--only=release",
            "--only=inference",
            "--only=clients",
            *ONCE,
            "--cycles=1",
            "--seconds=0.2",
        ),
        (
            "54 MB CNN: first load ÷ bare first session",
            "54 MB CNN: first load ÷ bare without huge pages",
            "54 MB CNN: first load: written ÷ its files",
            "2 MB stateful net: first load ÷ bare first session",
            "54 MB CNN: first load, no warm-up ÷ bare first session",
            "2 MB stateful net: first load: HTTP, last commit, first commit, looks",
            "The goal of a first load: 1.10 of a bare session",
            "memory of the process tree, after 1 loads",
            "54 MB CNN: memory after the unload ÷ after del session",
            "16 floats, 8 clients ÷ constant reply",
            "16 floats in JSON, 8 clients ÷ constant reply",
            "600 KB, 1 client ÷ the model called directly",
            "our client, 16 floats ÷ Triton's client on the same server",
            "our client, 600 KB ÷ Triton's client on the same server",
            "600 KB, 8 clients ÷ the model called directly",
            "median of 1,",
            "median of 1 times 0.2 s",
        ),
    ),
    "policies": (
        FEWER_LOADS,
        ("--only=policies", *ONCE, "--swaps=3"),
        (
            "swap beside, 1 client: longest gap between answers ÷ without a swap",
            "swap beside, 8 clients: longest gap between answers ÷ without a swap",
            "requests failed during 2 swaps beside │ 0 of",
            "swap in_place, 1 client: longest gap between answers ÷ without a swap",
            "swap in_place, 8 clients: longest gap between answers ÷ without a swap",
            "requests failed during 2 swaps in_place",
            "requests failed during 3 version swaps, 8 clients",
            "answers during 3 version swaps, 8 clients ÷ without swaps",
            "forced unload of a worker stopped by SIGSTOP ÷ of a running one",
            "3 loads of 54 MB at once, 202 to ready: first ÷ one bare session",
            "3 loads of 54 MB at once, 202 to ready: median ÷ one bare session",
            "3 loads of 54 MB at once, 202 to ready: last ÷ 3 bare in turn",
            "cold inference, 54 MB network, evicting another ÷ bare first session",
            "≤ 1 s",
        ),
    ),
    "prepared": (
        UNHURRIED_BENCH,
        ("--only=prepared", *ONCE, "--network=stateful", "--seconds=0.2"),
        (
            "2 MB stateful net: later load, ",
            "2 MB stateful net: inferences a second, ",
            "2 MB stateful net: private memory of a worker, ",
            "2 MB stateful net: memory of 4 workers, ",
            "2 MB stateful net: what preparing took; disk, ",
            "later load ÷ bare first session, geometric mean of 1 network",
            "medians of 1,",
        ),
    ),
    "compute": (
        None,
        ("--only=compute", "--rounds=1", "--seconds=2"),
        (
            "CNN, binary, 1 client ÷ bare session",
            "CNN, JSON, 8 clients ÷ bare session",
            "MLP, binary, 8 clients ÷ bare session",
            "1 busy CNN, a client each ÷ with 1 thread each",
            "8 busy CNNs, a client each ÷ with 1 thread each",
            "medians of 1 ratios of 2 s each",
        ),
    ),
    "preparing": (
        UNHURRIED_BENCH,
        ("--only=preparing", "--rounds=1", "--seconds=0.5"),
        (
            "inferences, 1 client, during a preparation ÷ without",
            "inferences, 8 clients, during a preparation ÷ without",
            "later loads during a preparation ÷ without",
            "medians of 1 ratios, each of 0.5 s",
            "prepares MLPs, and right before",
        ),
    ),
    "bodies": (
        None,
        ("--only=bodies", "--seconds=0.2"),
        (
            '4 MiB of "data":[1] repeated',
            "4 MiB of arrays nested 900 deep, compressed",
            "4 connections",
            "≤ 50 ms a body",
            "Bodies: sent again and again for 0.2 s",
        ),
    ),
    "tails": (
        None,
        ("--only=tails", "--tails=20", "--tail-seconds=1"),
        ("20 tails, ", "late by more than 1 s", "median, and latest", "memory of the server, a tail"),
    ),
    "ledger": (
        None,
        ("--only=ledger", "--facts=2000", "--rounds=1"),
        (
            "append, durable, 64 writers, facts ÷ plain sqlite3",
            "append, durable, 64 writers, loads and unloads ÷ plain sqlite3",
            "verify and fold 2,000 events ÷ SQLite's integrity_check of the same file",
            "verify and fold 2,000 events: peak memory",
            "models as of a moment of 2,000 events",
            "100 jobs as of a moment of 2,000 events",
        ),
    ),
    "listing": (
        None,
        ("--only=listing", "--listed=2000"),
        (
            "a page of 2,000 events: everything",
            "a page of 2,000 events: since a time",
            "a page of 2,000 events: a type and a model",
            "a page of 2,000 events: a model and an actor that never meet",
            "Pages: of 100 events, by the server's own reader",
        ),
    ),
    "cluster": (
        FEWER_APPENDS,
        ("--only=cluster", *ONCE, "--facts=2000", "--away-seconds=2", "--seconds=0.2"),
        (
            "load of a tiny model, PostgreSQL ÷ SQLite",
            "unload of a 54 MB CNN, PostgreSQL ÷ SQLite",
            "append, durable, 64 writers, facts, PostgreSQL ÷ SQLite",
            "append, durable, 1 writer, facts, PostgreSQL ÷ SQLite",
            "copy 2,000 events into an empty database",
            "verify and fold 2,000 events from PostgreSQL ÷ from SQLite",
            "a new node's empty replica until it has 2,000 events",
            "inference of 64 B, 1 client, forwarded ÷ at the node that has the model",
            "inference of 600 KB, 1 client, forwarded ÷ at the node that has the model",
            "kill -9 of one of 3 nodes until its",
            "inferences failed while the database is away for 2 s, lease 3 s │ 0 of",
            "accepted loads lost while the database is away for 2 s, lease 3 s │ 0 of",
            "inferences failed while 3 nodes are drained, stopped and started in turn",
            "Cluster: PostgreSQL on these cores and this disk",
        ),
    ),
}
"""By part: a program that runs the bench in a smaller form, options, and what the table has to contain."""
OTHERS = ("÷ constant reply", ": first load ÷", "Triton", "MLP")
"""Contained in no table of another part, and without peers."""


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=() if part == "listing" else soak_only) for part in TABLES]
)
def test_bench_prints_the_rows_of_a_part(part: str) -> None:
    if part == "cluster":
        require_programs()
    program, options, rows = TABLES[part]
    done = run("bench", *options) if program is None else run(program, *options, how="-c")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for expected in ("what", "ours", "beside", "ratio", "goal", "reached", *rows):
        assert expected in text
    for other in OTHERS:
        assert other not in text or any(other in row for row in rows)


@soak_only
@pytest.mark.parametrize("network", NETWORKS, ids=[network.name for network in NETWORKS])
def test_network_accepts_its_request(network: Network) -> None:
    content = network.build()
    assert content == network.build()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    head_bytes, body = encode(network.values(), binary=True)
    tensors = json.loads(body[:head_bytes])["inputs"]
    assert len(body) == head_bytes + sum(each["parameters"]["binary_data_size"] for each in tensors)
    zeros = {each["name"]: np.zeros(each["shape"], np.float32) for each in tensors}
    assert all(np.isfinite(output).all() for output in session.run(None, zeros))


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


def test_bare_session_runs_inferences(tmp_path: Path) -> None:
    model = models.write(tmp_path, "a", models.add_one(), version=2)
    assert model == tmp_path / "a" / "2" / "model.onnx"
    assert all(baselines.measure_session(model, inferences=count) > 0 for count in (0, 1, 2))


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


async def generated(*pieces: bytes) -> Result:
    """Run the clients against a server that answers each request with these; with none it hangs up."""
    answering = set[asyncio.Task[None]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)  # so that the pieces arrive one by one
            if not pieces:
                break

    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await answer(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.create_task(answer_and_close(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        try:
            return await generate(server.sockets[0].getsockname()[1], [b"x"], 2, 0.2, 0.0)
        finally:  # its connections are closed, so these end; an open one would be found by another test
            await asyncio.gather(*answering)


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"bo", b"dy"),
        (b"HTTP/1.1 20", b"0 OK\r\nA: b\r\nContent-Length: 4\r", b"\n\r\nbod", b"y"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n", b" " * 3_000_000),
    ],
)
async def test_generator_reads_a_response_in_pieces(pieces: tuple[bytes, ...]) -> None:
    result = await generated(*pieces)
    assert result.per_s > 0
    assert 0 < result.p50_ms <= result.p99_ms


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ((), "the server closed the connection"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nbody",), "2 bytes more"),
        ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",), "chunked"),
        ((b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nwhy?",), r"why\?"),
        ((b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\n", b"why?"), r"why\?"),
    ],
)
async def test_generator_stops_at_an_unexpected_response(pieces: tuple[bytes, ...], told: str) -> None:
    with pytest.raises(WrongAnswer, match=told):
        await generated(*pieces)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_wrong_answer_ends_the_bench(*, binary: bool) -> None:
    with (
        baselines.constant_reply() as port,
        pytest.raises(SystemExit, match="a wrong answer: the constant one"),
    ):
        add_one_request(16, binary=binary).check(Target("the constant one", port))
