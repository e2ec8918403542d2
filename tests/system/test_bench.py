"""`make bench` runs through; what it measures says nothing here, beside other tests."""

import asyncio
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.process import clean_environment

from bench import constant
from bench.generator import Result, WrongAnswer, generate
from bench.requests import Request, Target

ROOT = Path(__file__).parents[2]
LIMIT_S = 300


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module of the bench as its users do."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def table(*arguments: str) -> str:
    done = run("bench", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for column in ("what", "ours", "beside", "ratio", "goal", "reached"):
        assert column in text
    return text


def test_the_bench_measures_the_installed_server_and_prints_its_table() -> None:
    # Some seconds: a round of 54 MB networks, three of them thrown away, and two cycles of one.
    text = table("--repeats", "1", "--cycles", "1", "--rounds", "1", "--seconds", "0.2")
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
