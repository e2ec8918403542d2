"""`make bench` runs through; what it measures says nothing here, beside other tests.

The parts that take long are run by CI and `make soak`.
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
from support.servers import UNHURRIED, clean_environment

from bench import answers, bare, constant, models
from bench.answers import longest_gap
from bench.driver import Answer, completed_job
from bench.generator import Result, WrongAnswer, generate
from bench.networks import NETWORKS, Network
from bench.requests import Request, Target

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
FEWER_LOADS = """
from bench import __main__, queued
queued.LOADS = 3
__main__.main()
"""
"""Ten, which is what it does otherwise, take half a minute."""
UNHURRIED_BENCH = f"""
from bench import __main__, driver
driver._command = lambda *arguments: [*{UNHURRIED}, *map(str, arguments)]
__main__.main()
"""
"""Preparing waits for spare time, of which there may be none beside other tests."""


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


def table(*arguments: str) -> str:
    return table_of(run("bench", *arguments))


def table_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for column in ("what", "ours", "beside", "ratio", "goal", "reached"):
        assert column in text
    return text


@soak_only
def test_the_bench_measures_the_installed_server_and_prints_its_table() -> None:
    # Some seconds: a round of 54 MB networks, three of them thrown away, and two cycles of one.
    parts = [f"--only={part}" for part in ("loads", "memory", "inference")]
    text = table(*parts, "--repeats", "1", "--cycles", "1", "--rounds", "1", "--seconds", "0.2")
    for row in (
        "first load, 54 MB network ÷ bare first session",
        "memory of the process tree, after 1 loads",
        "16 floats, 8 clients ÷ constant reply",
        "16 floats in JSON, 8 clients ÷ constant reply",
        "600 KB, 1 client ÷ the model called directly",
        "600 KB, 8 clients ÷ the model called directly",
    ):
        assert row in text
    assert "median of 1," in text
    assert "median of 1 times 0.2 s" in text
    assert "Triton" not in text


@soak_only
def test_the_bench_measures_swaps_forced_unloads_queued_loads_and_eviction() -> None:
    # Some seconds: three 54 MB networks at once and as many bare sessions, and four swaps of 54 MB.
    options = ("--repeats", "1", "--rounds", "1", "--swaps", "3")
    text = table_of(run(FEWER_LOADS, "--only", "policies", *options, how="-c"))
    for row in (
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
    ):
        assert row in text
    assert "≤ 1 s" in text
    assert "÷ constant reply" not in text


@soak_only
def test_the_bench_measures_what_prepared_models_take_and_give() -> None:
    # Twenty seconds: the smallest network, which is prepared in four of them where nothing else runs.
    options = ("--repeats", "1", "--rounds", "1", "--network", "stateful", "--seconds", "0.2")
    text = table_of(run(UNHURRIED_BENCH, "--only", "prepared", *options, how="-c"))
    for row in (
        "2 MB stateful net: first load ÷ bare first session",
        "2 MB stateful net: later load, ",
        "2 MB stateful net: inferences a second, ",
        "2 MB stateful net: private memory of a worker, ",
        "2 MB stateful net: memory of 4 workers, ",
        "2 MB stateful net: what preparing took; disk, ",
        "later load ÷ bare first session, geometric mean of 1 network",
    ):
        assert row in text
    assert "medians of 1," in text
    assert "MLP" not in text


@soak_only
@pytest.mark.parametrize("network", NETWORKS, ids=[network.name for network in NETWORKS])
def test_a_network_takes_what_is_sent_to_it(network: Network) -> None:
    content = network.build()
    assert content == network.build()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    head_bytes, body = network.request()
    tensors = json.loads(body[:head_bytes])["inputs"]
    assert len(body) == head_bytes + sum(each["parameters"]["binary_data_size"] for each in tensors)
    zeros = {each["name"]: np.zeros(each["shape"], np.float32) for each in tensors}
    assert all(np.isfinite(output).all() for output in session.run(None, zeros))


@soak_only
def test_the_bench_measures_many_streams() -> None:
    text = table("--only", "tails", "--tails", "20", "--tail-seconds", "1")
    for row in ("20 tails, ", "late by more than 1 s", "median, and latest", "memory of the server, a tail"):
        assert row in text


@soak_only
def test_the_bench_measures_the_ledger_by_itself() -> None:
    text = table("--only", "ledger", "--facts", "2000", "--rounds", "1")
    for row in (
        "append, durable, 64 writers, facts ÷ plain sqlite3",
        "append, durable, 64 writers, loads and unloads ÷ plain sqlite3",
        "verify and fold 2,000 events ÷ SQLite's integrity_check of the same file",
        "verify and fold 2,000 events: peak memory",
        "models as of a moment of 2,000 events",
        "100 jobs as of a moment of 2,000 events",
    ):
        assert row in text


def test_the_bench_measures_pages_of_a_long_log() -> None:
    text = table("--only", "listing", "--listed", "2000")
    for row in (
        "a page of 2,000 events: everything",
        "a page of 2,000 events: since a time",
        "a page of 2,000 events: a type and a model",
        "a page of 2,000 events: a model and an actor that never meet",
    ):
        assert row in text
    assert "Pages: of 100 events, by the server's own reader" in text


def test_a_part_of_the_bench_is_measured_alone() -> None:
    text = table("--only", "memory", "--cycles", "1")
    assert "memory of the process tree" in text
    assert "÷ constant reply" not in text
    assert "first load" not in text


def test_peers_that_are_not_there_end_the_bench_with_what_to_do(tmp_path: Path) -> None:
    done = run("bench", "--only", "inference", "--peers", tmp_path)
    assert done.returncode == 1
    assert "`make bench-peers` installs it" in done.stderr


@pytest.mark.parametrize("clients", ["1", "3"])
def test_an_answer_other_than_200_ends_the_load_with_the_answer(tmp_path: Path, clients: str) -> None:
    request = tmp_path / "request"
    request.write_bytes(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    with constant.running() as port:
        done = run("bench.generator", str(port), request, clients, "60", "0")
    assert done.returncode == 1
    assert "HTTP/1.1 404" in done.stderr
    assert "404: Not Found" in done.stderr
    assert done.stdout == ""


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
def test_the_longest_gap_is_between_two_answers_of_which_one_may_lie_outside(
    times: tuple[float, ...], longest: float
) -> None:
    assert longest_gap(times, 2.0, 6.0) == longest


@pytest.mark.parametrize(("answered", "path"), [(True, "/v2/models/a/infer"), (False, "/nowhere")])
def test_clients_note_answers_and_count_what_is_none(tmp_path: Path, path: str, *, answered: bool) -> None:
    request = tmp_path / "request"
    request.write_bytes(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode())
    with constant.running() as port, answers.running(port, request, clients=2) as stop:
        told = stop()
    assert len(told.answered_s) == 2
    assert told.total > 0
    assert (told.failed == 0) is answered
    assert ("404" in told.reason) is not answered
    assert all(list(times) == sorted(times) for times in told.answered_s)


def test_a_bare_session_takes_inferences_on_zeros_or_none(tmp_path: Path) -> None:
    model = models.write(tmp_path, "a", models.add_one(), version=2)
    assert model == tmp_path / "a" / "2" / "model.onnx"
    assert all(bare.run(model, inferences=count) > 0 for count in (0, 1, 2))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, None, b'{"status":"failed","error":"why"}'),
        Answer(503, "1", b"why"),
    ],
)
def test_a_job_that_is_not_completed_ends_the_bench_with_its_reason(answer: Answer) -> None:
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
            return await generate(server.sockets[0].getsockname()[1], b"x", 2, 0.2, 0.0)
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
async def test_an_answer_is_read_to_its_end_however_it_arrives(pieces: tuple[bytes, ...]) -> None:
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
async def test_an_answer_that_cannot_be_counted_ends_the_load(pieces: tuple[bytes, ...], told: str) -> None:
    with pytest.raises(WrongAnswer, match=told):
        await generated(*pieces)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_an_answer_that_is_not_the_models_ends_the_bench(*, binary: bool) -> None:
    with constant.running() as port, pytest.raises(SystemExit, match="a wrong answer: the constant one"):
        Request(16, binary=binary).check(Target("the constant one", port))
