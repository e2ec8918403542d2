"""Events that real servers push: killed, stopped, restored, on full disks, to hostile receivers, as nodes."""

import asyncio
import base64
import gzip
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
from support.cluster import LOST_CONNECTION, Cluster, ClusterNode, clustered
from support.disks import small_disk
from support.fleet import UNLIMITED, new_dice, of_both
from support.http import ONE, Api, when
from support.models import add, save
from support.origins import server_context
from support.postgres import PostgresServer
from support.receivers import (
    KEY,
    PATH,
    SECRET,
    ReceiverServer,
    answer,
    close,
    delivered,
    hang,
    list_notices,
    metrics_of,
    metrics_when,
    notice_when,
    read_metrics,
    receiving,
    write_endlessly,
    write_raw,
    write_tables,
)
from support.records import patched
from support.servers import Server, events, serving, verified

from events.sqlite.datalock import LEDGER
from features.notify.progress import FOLDER, Progress, read_progress
from server.config import Config

HURRIED = patched(
    "from features.notify import app, delivery\n"
    "app.TIMEOUT_S, delivery.FIRST_BACK_OFF_S, delivery.LONGEST_BACK_OFF_S = 2.0, 0.01, 0.1"
)
"""A failed delivery is sent again at once."""
BOMB = gzip.compress(bytes(2**27))
UNSAVED = patched("from features.notify import app\napp.SAVE_EVERY_S = 3600.0")
"""Progress is written at the stop alone."""
DEBUG = {"LOADLEDGER_LOG_LEVEL": "debug"}


async def load_and_unload(api: Api, model_id: str = "m") -> None:
    await api.load(model_id)
    await api.unload(model_id)


async def load_until_gone(api: Api, model_id: str) -> None:
    """Load and unload a model until the server is gone."""
    with suppress(aiohttp.ClientError):
        while True:
            for action in ("load", "unload"):
                await api.post(f"/api/v1/models/{model_id}/{action}", wait=10)


def read_file(config: Config, name: str = "tests") -> Progress:
    progress = read_progress(config.data / FOLDER / name)
    assert progress is not None
    return progress


async def check_file(config: Config, receiver: ReceiverServer) -> None:
    """Check that the progress of a server that has stopped is the last event that has arrived."""
    last = receiver.arrived[-1].event
    assert read_file(config, receiver.name) == Progress(int(last["sequence"]), last["ledgerhash"])


@asynccontextmanager
async def loading(server: Server, *model_ids: str) -> AsyncIterator[None]:
    """Load and unload models all the time; the server is gone when the block ends."""
    clients = [asyncio.create_task(load_until_gone(server.api, model_id)) for model_id in model_ids]
    yield
    await asyncio.gather(*clients)


# Kills and stops

LIVES = of_both(short=3, long=100)
LIFE_S = 0.7


async def test_killed_server_sends_each_event_in_order(config: Config) -> None:
    """Killed at random moments, and while a delivery hangs; after a stop in order, no event is sent twice."""
    dice, models = new_dice(), ("m", "n")
    for model_id in models:
        save(add(1), config.repository, model_id)
    async with receiving() as receiver:
        settings = (*write_tables(config.repository.parent, receiver), *UNLIMITED)
        for life in range(LIVES):
            async with serving(config, *settings, command=HURRIED) as server, loading(server, *models):
                await asyncio.sleep(dice.uniform(0, LIFE_S))  # a random moment
                if life % 2:
                    receiver.usual, arrived = hang, len(receiver.arrived)
                    await receiver.until(lambda arrived=arrived: len(receiver.arrived) > arrived)  # type: ignore[misc]
                await server.kill()
            receiver.usual = answer(204)
            verified(config)
            receiver.check(await events(config), 1)
        for _ in range(2):
            before = len(receiver.arrived)
            async with serving(config, *settings, command=UNSAVED) as server:
                await load_and_unload(server.api)
                last = await delivered(server.api, receiver)
                sent = receiver.sequences[before:]
                await metrics_when(server.api, metrics_of(receiver, waiting=0))
                receiver.check(await events(config), 1, last)
                assert await server.stop() == 0
            assert receiver.sequences[before:] == sent == sorted({*sent})
            await check_file(config, receiver)
        assert len({each.event["source"] for each in receiver.arrived}) == 1


async def test_receiver_that_was_away_gets_everything_later(config: Config) -> None:
    save(add(1), config.repository, "m")
    receiver = ReceiverServer()
    settings = write_tables(config.repository.parent, receiver, first=2)
    async with serving(config, *settings, command=HURRIED) as server:
        await load_and_unload(server.api)
        await notice_when(server.api, "tests", "Cannot connect to host")
        assert await server.stop() == 0
    async with serving(config, *settings, command=HURRIED) as server:
        await notice_when(server.api, "tests", "Cannot connect to host")
        await receiver.start()
        last = await delivered(server.api, receiver)
        await notice_when(server.api, "tests", "")
        await receiver.stop()
        await load_and_unload(server.api)
        await notice_when(server.api, "tests", "Cannot connect to host")
        await receiver.start()
        assert await delivered(server.api, receiver) > last
        await server.kill()
    await receiver.stop()
    receiver.check(await events(config), 2)


LOST_NAME = patched(
    "import socket, threading\n"
    "real = socket.getaddrinfo\n"
    "def look_up(host, *arguments, **options):\n"
    "    if host == 'lost.invalid':\n"
    "        print('looked up', file=__import__('sys').stderr)\n"
    "        threading.Event().wait()\n"
    "    return real(host, *arguments, **options)\n"
    "socket.getaddrinfo = look_up"
)
"""A name server that never answers."""


async def test_name_that_is_looked_up_delays_no_stop_and_no_other(config: Config) -> None:
    save(add(1), config.repository, "m")
    async with receiving() as receiver:
        lost = [ReceiverServer(f"lost-{number}", host="lost.invalid") for number in range(5)]
        settings = write_tables(config.repository.parent, *lost, receiver)
        async with serving(config, *settings, command=LOST_NAME) as server:
            await load_and_unload(server.api)
            await delivered(server.api, receiver)
            await server.logged("looked up")
            assert await server.stop() == 0


async def test_server_killed_after_first_start_skips_no_event(config: Config) -> None:
    """It begins with the next event, and the place where it begins is kept before anything is sent."""
    dice = new_dice()
    save(add(1), config.repository, "m")
    async with receiving() as receiver:
        settings = write_tables(config.repository.parent, receiver, first="now")
        for _ in range(of_both(short=2, long=50)):
            async with serving(config, *settings, command=HURRIED) as server, loading(server, "m"):
                await asyncio.sleep(dice.uniform(0, 0.1))  # a random moment
                await server.kill()
            if receiver.arrived:
                receiver.check(await events(config), receiver.sequences[0])
                assert read_file(config).position >= receiver.sequences[0] - 1
        async with serving(config, *settings, command=HURRIED) as server:
            await load_and_unload(server.api)
            last = await delivered(server.api, receiver)
            receiver.check(await events(config), receiver.sequences[0], last)


# Files that cannot be written, or are not what they were

DISK_BYTES = 64 * 2**20


async def test_full_disk_delays_deliveries_and_loses_none(config: Config, tmp_path: Path) -> None:
    """No event is sent while progress cannot be written: a kill would repeat all of them."""
    save(add(1), config.repository, "m")
    async with receiving() as receiver:
        settings = write_tables(tmp_path, receiver)
        with small_disk(tmp_path / "small", DISK_BYTES) as disk:
            config = replace(config, data=disk.folder)
            command = (*disk.prefix, *HURRIED)
            async with serving(config, *settings, command=command) as server:
                await delivered(server.api, receiver)
                receiver.usual = answer(500)
                await load_and_unload(server.api)
                disk.fill()
                receiver.plans.append(answer(204))
                await notice_when(server.api, "tests", "No space left on device")
                arrived, receiver.usual = len(receiver.arrived), answer(204)
                await notice_when(server.api, "tests", "No space left on device")
                assert len(receiver.arrived) == arrived
                disk.drain()
                last = await delivered(server.api, receiver)
                await notice_when(server.api, "tests", "")
                await when(lambda: asyncio.to_thread(read_file, config), lambda seen: seen.position == last)
                assert await server.stop() == 0
            receiver.check(await events(disk.copy_ledger(config)), 1)


async def test_file_that_is_none_is_said_and_stops_no_load(config: Config) -> None:
    """Deliveries wait while the file cannot be written or read; a notice says why."""
    save(add(1), config.repository, "m")
    folder = config.data / FOLDER
    async with receiving() as receiver, receiving("other") as other:
        settings = write_tables(config.repository.parent, receiver, other)
        async with serving(config, *settings, command=HURRIED) as server:
            await delivered(server.api, receiver, other)
            await when(lambda: asyncio.to_thread(folder.exists), bool)
            kept = folder.with_name("kept")
            await when(lambda: asyncio.to_thread((folder / "tests").exists), bool)
            folder.rename(kept)
            folder.touch()  # in the place of the folder
            while (await list_notices(server.api)).keys() != {"tests", "other"}:
                await load_and_unload(server.api)
            await notice_when(server.api, "tests", "File exists")
            assert await server.stop() == 0
        receiver.check(await events(config), 1)
        folder.unlink()
        kept.rename(folder)
        (folder / "tests").rename(folder / "kept")
        (folder / "tests").mkdir()
        (folder / "other").write_text("{}")
        arrived = len(receiver.arrived) + len(other.arrived)
        async with serving(config, *settings, command=HURRIED) as server:
            await notice_when(server.api, "tests", "Is a directory")
            await notice_when(server.api, "other", "does not say how far the receiver has events")
            await load_and_unload(server.api)
            assert len(receiver.arrived) + len(other.arrived) == arrived
            (folder / "tests").rmdir()
            (folder / "kept").rename(folder / "tests")
            (folder / "other").unlink()
            await delivered(server.api, receiver, other)
            await notice_when(server.api, "tests", "")
            assert await server.stop() == 0
        for each in (receiver, other):
            each.check(await events(config), 1)


async def test_replaced_ledger_is_said_and_nothing_sent(config: Config) -> None:
    save(add(1), config.repository, "m")
    async with receiving() as receiver:
        settings = write_tables(config.repository.parent, receiver)
        async with serving(config, *settings, command=HURRIED) as server:
            await delivered(server.api, receiver)
            assert await server.stop() == 0
        older = (config.data / LEDGER).read_bytes()
        async with serving(config, *settings, command=HURRIED) as server:
            await load_and_unload(server.api)
            last = await delivered(server.api, receiver)
            receiver.check(await events(config), 1, last)
            assert await server.stop() == 0
        (config.data / LEDGER).write_bytes(older)
        position, arrived = read_file(config).position, len(receiver.arrived)
        async with serving(config, *settings, "--accept-rollback", command=HURRIED) as server:
            why = f"the ledger has no event {position}"
            assert (await server.api.get("/api/v1/events/head")).json["position"] < position
            await notice_when(server.api, "tests", why)
            while (await server.api.get("/api/v1/events/head")).json["position"] <= position:
                await load_and_unload(server.api)
            why = f"the event {position} that it has acknowledged is another one in this ledger"
            await notice_when(server.api, "tests", why)
            assert len(receiver.arrived) == arrived
            assert await server.stop() == 0
        assert read_file(config).position == position


# Secrets

FAILURES = {
    "good": answer(204),
    "sick": answer(500, f"{PATH} {SECRET}".encode()),
    "moved": answer(301, Location=f"https://elsewhere{PATH}"),
    "garbage": write_raw(f"{PATH}\r\n\r\n".encode()),
    "closing": close,
    "hanging": hang,
    "odd": answer(204, Set_Cookie=f"a={PATH}; Path={PATH}", Content_Encoding=PATH),
}


async def test_secret_and_path_are_shown_nowhere(config: Config) -> None:
    save(add(1), config.repository, "m")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        answering = [await enter(receiving(name, usual=plan)) for name, plan in FAILURES.items()]
        untrusted = await enter(receiving("untrusted", tls=server_context()))
        refusing, unknown = ReceiverServer("refusing"), ReceiverServer("unknown", host="receiver.invalid")
        settings = write_tables(config.repository.parent, *answering, untrusted, refusing, unknown)
        server = await enter(serving(config, *settings, command=HURRIED, environment=DEBUG))
        await load_and_unload(server.api)
        notices = await when(
            lambda: list_notices(server.api),
            lambda seen: len(seen) == len(FAILURES) + 1 and "within" in seen["hanging"],
        )
        assert "CERTIFICATE_VERIFY_FAILED" in notices["untrusted"] or "certificate" in notices["untrusted"]
        assert "Cannot connect to host" in notices["refusing"]
        assert "Cannot connect to host receiver.invalid" in notices["unknown"]
        await delivered(server.api, answering[0])
        paths = ("/api/v1/resources", "/metrics", "/api/v1/events", "/api/v1/events/export", "/health/ready")
        answers = [await server.api.get(path) for path in paths]
        assert await server.stop() == 0
        shown = [each.body for each in answers] + [server.output.read_bytes()]
        shown += [path.read_bytes() for path in config.data.rglob("*") if path.is_file()]
        shown += [each.body for receiver in answering for each in receiver.arrived]
    for hidden in (SECRET, "distinctive-path", "distinctive-query", base64.b64encode(KEY).decode()):
        assert not [text for text in shown if hidden.encode() in text], hidden


# Hostile receivers

GROWTH_BYTES = 24 * 2**20
ATTEMPTS = 3
ENDLESS = {
    "fields": write_endlessly(b"HTTP/1.1 200 OK\r\n", b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 500),
    "field": write_endlessly(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 2**16),
    "status": write_endlessly(b"HTTP/1.1 200 ", b"y" * 2**16),
    "informed": write_endlessly(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 500),
    "body": write_endlessly(b"HTTP/1.1 200 OK\r\n\r\n", bytes(2**16)),
    "chunked": write_endlessly(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(2**16) + b"\r\n"
    ),
    "length": write_endlessly(b"HTTP/1.1 500 No\r\nContent-Length: 99999999999\r\n\r\n", bytes(2**16)),
    "bomb": write_raw(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB
    ),
}


async def test_hostile_receivers_cost_little_memory_and_no_event(config: Config) -> None:
    save(add(1), config.repository, "m")
    save(add(1), config.repository, "n")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        good = await enter(receiving("good"))
        hostile = [ReceiverServer(name, usual=plan) for name, plan in ENDLESS.items()]
        settings = (*write_tables(config.repository.parent, good, *hostile), *UNLIMITED)
        server = await enter(serving(config, *settings, command=HURRIED))
        await server.api.load("m")
        await delivered(server.api, good)
        before = peak_of(server.pid)
        for each in hostile:
            stack.push_async_callback(each.stop)
            await each.start()
        while min(len(each.arrived) for each in hostile) < ATTEMPTS:
            await load_and_unload(server.api, "n")
            assert (await server.api.infer("m", ONE)).status == 200
            await delivered(server.api, good)
        assert peak_of(server.pid) < before + GROWTH_BYTES
        good.check(await events(config), 1)
        assert await server.stop() == 0


def peak_of(pid: int) -> int:
    """Return the most memory that a process has had."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:"))


# Nodes

OFTEN = "--lease-s=8"
"""Nodes hear of each other each third of it. One that is lost, on a busy machine, sends no event less."""


@asynccontextmanager
async def changing(cluster: Cluster, model_id: str) -> AsyncIterator[None]:
    """Load and unload a model, at whichever node answers, until the block ends."""

    async def change() -> None:
        while True:
            for action in ("load", "unload"):
                with suppress(*LOST_CONNECTION):
                    node = cluster.answering[0]
                    answered = await node.api.post(f"/api/v1/models/{model_id}/{action}")
                    assert answered.status in (200, 202, 409, 503), answered
            await asyncio.sleep(0.05)  # other work waits for the same writer

    task = asyncio.create_task(change())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def find_sender(cluster: Cluster) -> ClusterNode:
    """Return the node that sends, as its own metrics say; wait until it is one."""

    async def look() -> list[ClusterNode]:
        read = [(node, await read_metrics(node.api)) for node in cluster.answering]
        return [node for node, metrics in read if any(name.startswith("lag_events") for name in metrics)]

    [sender] = await when(look, lambda seen: len(seen) == 1)
    return sender


async def test_another_node_goes_on_where_the_first_one_was(tmp_path: Path, postgres: PostgresServer) -> None:
    """One is killed while a delivery hangs, the next one stops in order, and at last all start again."""
    async with receiving() as receiver:
        settings = (*write_tables(tmp_path, receiver), OFTEN)
        async with clustered(tmp_path, postgres, settings=settings) as cluster:
            model_id = cluster.fleet.ids[0]
            async with changing(cluster, model_id):
                first = await find_sender(cluster)
                await receiver.until(lambda: len(receiver.arrived) > 5)
                receiver.usual, arrived = hang, len(receiver.arrived)
                await receiver.until(lambda: len(receiver.arrived) > arrived)
                await first.kill()
                receiver.usual, reached = answer(204), max(receiver.sequences)
                await cluster.pass_lease(first)
                await receiver.until(lambda: max(receiver.sequences) > reached + 5)
                second = await find_sender(cluster)
                assert second is not first
                await second.stop()
                reached = max(receiver.sequences)
                await receiver.until(lambda: max(receiver.sequences) > reached + 5)
                third = await find_sender(cluster)
                assert third not in (first, second)
            await asyncio.gather(*(node.kill() for node in cluster.answering))
            await cluster.pass_lease(third)
            await cluster.restore()
            await cluster.load(model_id)
            last = await delivered(third.api, receiver)
            sender = await find_sender(cluster)
            log = await events(sender.config)
            assert len(log) >= last
            receiver.check(log, 1, last)
            for node in cluster.nodes.values():
                assert SECRET not in node.output
                assert "distinctive" not in node.output


async def test_nodes_that_get_the_table_one_by_one_skip_nothing(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    async with receiving() as receiver, clustered(tmp_path, postgres, names=("n1", "n2")) as cluster:
        model_id = cluster.fleet.ids[0]
        settings = (*write_tables(tmp_path, receiver, first="now"), OFTEN)
        async with changing(cluster, model_id):
            for node in cluster.nodes.values():
                await node.stop()
                node.settings = settings
                await node.start()
                arrived = len(receiver.arrived)
                await receiver.until(lambda arrived=arrived: len(receiver.arrived) > arrived + 5)  # type: ignore[misc]
            sender = await find_sender(cluster)
        last = await delivered(sender.api, receiver)
        receiver.check(await events(sender.config), receiver.sequences[0], last)
