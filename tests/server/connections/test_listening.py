"""How many connections there are, tried with raw sockets: who is one too many, and who asks for health."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.certificates import Pair, make_pair
from support.rawconnections import (
    GET,
    LIMIT_S,
    LONG_ANSWER,
    LONG_S,
    PROBE,
    Client,
    connecting,
    problem,
    roomy,
)
from support.workers import until

from server.connections.tls import load_context

POST = b"POST /short HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)


async def answered(client: Client, sent: bytes = GET) -> bool:
    """Send a request and say whether it was answered well."""
    client.send(sent)
    return (await client.answer()).startswith(b"HTTP/1.1 200 OK")


def mute(held: ExitStack, pair: Pair, address: tuple[str, int]) -> None:
    """Have a probe answered, and read no more: not even the goodbye of TLS."""
    raw = socket.create_connection(address, timeout=LIMIT_S)
    client = held.enter_context(pair.trusting().wrap_socket(raw, server_hostname="localhost"))
    client.sendall(PROBE)
    assert client.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "sent",
    [GET, POST, PROBE.replace(b"GET", b"POST"), PROBE.replace(b"live", b"x")],
    ids=["request", "body", "method", "path"],
)
async def test_one_connection_too_many_is_refused_and_told_so_and_room_is_used_again(
    tmp_path: Path, sent: bytes
) -> None:
    limits = roomy(2)
    async with connecting(tmp_path, limits) as connect:
        first, second = await connect(), await connect()
        assert await answered(first)
        assert await answered(second)
        third = await connect()
        third.send(sent)
        refused = await third.rest()
        assert problem(refused) == (503, "too_many_connections")
        assert b"Retry-After: 1\r\n" in refused
        await first.close()
        await until(lambda: len(limits.open) == 1)
        assert await answered(await connect())


async def test_one_connection_too_many_of_one_address_is_refused_as_one_of_all(tmp_path: Path) -> None:
    limits = roomy(most_of_peer=2)
    async with connecting(tmp_path, limits) as connect:
        first, second = await connect(), await connect()
        assert await answered(first)
        assert await answered(second)
        third = await connect()
        third.send(GET)
        assert problem(await third.rest()) == (503, "too_many_connections")
        assert await answered(await connect(), PROBE)
        await first.close()
        await until(lambda: len(limits.places.taken) == 1)
        assert await answered(await connect())


@pytest.mark.parametrize(
    "probe",
    [PROBE, PROBE.replace(b" HTTP", b"?verbose HTTP"), PROBE.replace(b"GET", b"HEAD")],
    ids=["plain", "query", "head"],
)
async def test_who_asks_how_the_server_is_is_answered_once_when_no_place_is_left(
    tmp_path: Path, probe: bytes
) -> None:
    async with connecting(tmp_path, roomy(0)) as connect:
        for _ in range(3):
            client = await connect()
            client.send(probe + probe)
            told = await client.rest()
            assert told.startswith(b"HTTP/1.1 200 OK")
            assert b"\r\nConnection: close" in told
            assert told.count(b"HTTP/1.1") == 1


async def test_who_says_nothing_is_not_kept_in_the_reserve_as_long_as_elsewhere(tmp_path: Path) -> None:
    limits = roomy(0)
    limits.spare_head_s = 0.05
    async with connecting(tmp_path, limits) as connect:
        for sent in (b"", PROBE[:-2]):
            client = await connect()
            client.send(sent)
            assert problem(await client.rest()) == (503, "too_many_connections")


async def test_who_only_holds_a_place_of_the_reserve_gives_way_to_who_asks(tmp_path: Path) -> None:
    limits = roomy(0, reserve=1)
    limits.spare_head_s = LONG_S
    async with connecting(tmp_path, limits) as connect:
        silent = await connect()
        await until(lambda: len(limits.open) == 1)
        assert await answered(await connect(), PROBE)
        assert problem(await silent.rest()) == (503, "too_many_connections")


async def test_who_gives_way_while_its_answer_is_sent_gets_all_of_it(tmp_path: Path) -> None:
    limits = roomy(0, reserve=1)
    limits.closing_s = LONG_S
    async with connecting(tmp_path, limits) as connect:
        slow = await connect()
        slow.send(PROBE.replace(b"/health/live", b"/metrics"))
        await until(lambda: any(each.writing_paused for each in limits.open))
        assert await answered(await connect(), PROBE)
        told = await slow.rest()
        assert len(told) > len(LONG_ANSWER)
        assert told.count(b"HTTP/1.1 ") == 1


async def test_without_a_reserve_who_is_too_many_is_told_before_it_asks(tmp_path: Path) -> None:
    async with connecting(tmp_path, roomy(0, reserve=0)) as connect:
        assert problem(await (await connect()).rest()) == (503, "too_many_connections")


async def test_who_never_ends_a_handshake_counts_as_a_connection(tmp_path: Path) -> None:
    limits = roomy(2, reserve=0)
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        silent, babbling = await connect(), await connect()
        await until(lambda: len(limits.handshakes) == 2)
        assert await (await connect()).rest() == b""  # there is no way to tell why
        babbling.send(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in await babbling.rest()
        client = await connect()
        await client.writer.start_tls(pair.trusting(), server_hostname="localhost")
        assert await answered(client)
        assert (len(limits.open), len(limits.handshakes)) == (1, 1)
        assert len(limits.places.taken) == 2
        await silent.close()
        await until(lambda: not limits.handshakes)
        assert len(limits.places.taken) == 1


async def test_with_tls_who_asks_how_the_server_is_is_answered_when_no_place_is_left(tmp_path: Path) -> None:
    limits = roomy(1, reserve=1)
    limits.spare_head_s = LONG_S
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        silent, spare = await connect(), await connect()
        await until(lambda: len(limits.handshakes) == 2)
        probing = await connect()
        await probing.writer.start_tls(pair.trusting(), server_hostname="localhost")
        assert await answered(probing, PROBE)
        assert await spare.rest() == b""
        asking = await connect()
        await asking.writer.start_tls(pair.trusting(), server_hostname="localhost")
        asking.send(GET)
        assert problem(await asking.rest()) == (503, "too_many_connections")
        await silent.close()
        await until(lambda: not limits.places.taken)


async def test_with_tls_who_gives_way_and_says_no_goodbye_keeps_no_descriptor(tmp_path: Path) -> None:
    limits = roomy(0, reserve=1)
    limits.closing_s = LONG_S
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        address = (await connect()).writer.get_extra_info("peername")
        with ExitStack() as held:
            for number in range(8):
                await asyncio.to_thread(mute, held, pair, address)
                async with asyncio.timeout(25):  # TLS by itself waits for a goodbye for 30 s
                    await until(lambda: len(limits.open) <= 2)  # one has the place, one is leaving it
                assert len(limits.open) == min(number + 1, 2)
            limits.closing_s = 0.01
            await until(lambda: not limits.open)


async def test_with_tls_the_last_of_a_burst_has_the_place_of_the_reserve(tmp_path: Path) -> None:
    limits = roomy(0, reserve=1)
    limits.spare_head_s = LONG_S
    pair, files = make_pair(), (tmp_path / "cert.pem", tmp_path / "key.pem")
    pair.write(*files)
    async with connecting(tmp_path, limits, load_context(*files)) as connect:
        address = (await connect()).writer.get_extra_info("peername")
        burst = [socket.create_connection(address, timeout=LIMIT_S) for _ in range(20)]  # without a turn
        *others, last = [Client(*await asyncio.open_connection(sock=each)) for each in burst]
        await last.writer.start_tls(pair.trusting(), server_hostname="localhost")
        assert await answered(last, PROBE)
        for client in (*others, last):
            assert await client.rest() == b""
            await client.close()
