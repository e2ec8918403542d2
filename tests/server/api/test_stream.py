"""`GET /api/v1/events/stream`: catches up, follows, resumes, and ends in order."""

import asyncio
import hashlib
import json
import re
import socket
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
from support import models
from support.history import facts, write
from support.http import LIMIT_S, LocalApi, following, when
from support.models import save

from events.codec import decode_event
from server.api import stream
from server.appkeys import LOG, STREAMS
from server.auth.keys import issue_token, list_keys, revoke

Start = Callable[..., Awaitable[LocalApi]]

SSE = {"Accept": "text/event-stream"}
NDJSON = {"Accept": "application/x-ndjson"}


async def add(api: LocalApi, number: int, *, first: int = 1) -> None:
    """Append events of the model `digits`."""
    await write(api.app[LOG], number, first=first)


async def none_open(api: LocalApi) -> None:
    """Wait until the server has closed all streams."""

    async def still_open() -> int:
        return len(api.app[STREAMS])

    await when(still_open, lambda number: number == 0)


def archive(path: Path, position: int) -> None:
    """Remove the events up to a position, as `archive` does while no server runs."""
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        (digest,) = connection.execute("SELECT hash FROM events WHERE position = ?", (position,)).fetchone()
        connection.execute("DELETE FROM events WHERE position <= ?", (position,))
        connection.execute("UPDATE base SET position = ?, hash = ?", (position, digest))
        connection.commit()


def positions(events: list[dict[str, object]]) -> list[object]:
    return [event["position"] for event in events]


# Order


async def test_stream_catches_up_says_live_and_follows(api: LocalApi) -> None:
    await add(api, 3)
    async with following(api, "?after=1") as client:
        first = await client.message()
        assert (first.retry, first.id, first.data) == (1000, 1, "")
        assert positions(await client.events(3)) == [2, 3, 4]
        live = await client.message()
        assert (live.id, live.event, live.json) == (None, "live", {"position": 4})
        await add(api, 2, first=4)
        assert positions(await client.events(2)) == [5, 6]
    async with following(api) as client:
        assert (await client.message()).id == 6
        assert (await client.message()).event == "live"
        await add(api, 1, first=6)
        assert (await client.event())["position"] == 7


async def test_streamed_event_is_the_listed_and_hashed_text(api: LocalApi) -> None:
    await add(api, 2)
    listed = (await api.get("/api/v1/events")).json["events"]
    before = bytes(32)
    async with following(api, "?after=0") as client:
        await client.message()
        for known, fact in zip(listed, await api.events(), strict=True):
            message = await client.message()
            assert message.json == known
            text, _, digest = message.data.rpartition(',"hash":"')
            before = hashlib.sha256(before + f"{text}}}".encode()).digest()
            assert digest == f'{before.hex()}"}}'
            assert decode_event(f"{text}}}") == fact


async def test_last_event_id_overrides_after(api: LocalApi) -> None:
    await add(api, 9)
    async with following(api, "?after=2", headers={"Last-Event-ID": "7"}) as client:
        assert positions(await client.events(3)) == [8, 9, 10]
    async with following(api, "?after=8", headers={"Last-Event-ID": ""}) as client:
        assert positions(await client.events(2)) == [9, 10]


async def test_filtered_stream_sends_bookmarks(api: LocalApi) -> None:
    await add(api, 3)
    async with following(api, "?after=0&type=ServerStarted&type=ServerStopped") as client:
        messages = await client.until("live")
        assert [(each.id, each.event) for each in messages] == [
            (0, ""), (1, "ServerStarted"), (4, ""), (None, "live"),
        ]  # fmt: skip
    async with following(api, "?after=0&model=digits&job=job&actor=system") as client:
        assert positions(await client.events(3)) == [2, 3, 4]
    async with following(api, "?after=0&model=digits&job=another") as client:
        assert [each.id for each in await client.until("live")] == [0, 4, None]
    save(models.add(1), api.config.repository, "m")
    async with following(api, "?model=m&type=ModelLoaded&type=ModelUnloaded") as client:
        await api.load("m")
        await add(api, 5)
        await api.unload("m")
        assert [event["type"] for event in await client.events(2)] == ["ModelLoaded", "ModelUnloaded"]


async def test_heartbeat_of_filtered_stream_tells_its_position(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.0)
    async with following(api, "?model=m") as client:
        await client.until("live")
        assert (await client.message()).comment == "heartbeat"
        await add(api, 2)
        head = api.position
        while (message := await client.message()).id is None:
            assert message.comment == "heartbeat"
        while message.id != head:
            message = await client.message()


async def test_live_follows_all_earlier_events(api: LocalApi) -> None:
    async with following(api) as first:
        await first.until("live")
        for number in range(5):
            after = api.position
            await add(api, 2, first=2 * number + 1)  # the shared ring follows a little later
            async with following(api, f"?after={after}") as client:
                messages = await client.until("live")
                assert [each.id for each in messages] == [after, after + 1, after + 2, None]


async def test_stages_are_sent_without_id(api: LocalApi) -> None:
    save(models.slow_model(depth=2000), api.config.repository, "m")
    async with following(api) as client, following(api, "?type=ModelLoaded") as other:
        await client.until("live")
        job = await api.accepted_load("m")
        first = (await client.until("stage"))[-1]
        assert first.id is None
        last = first.json
        while last["stage"] != "loading":
            last = (await client.until("stage"))[-1].json
        assert last == {"job_id": job["id"], "model_id": "m", "stage": "loading", "waiting_for": None}
        async with following(api, f"?job={job['id']}&type=stage") as late:
            assert (await late.until("stage"))[-1].json == last
        await api.unload("m", force=True)
        await write(api.app[LOG], 1)
        assert [message.event for message in await other.until("live")] == ["", "live"]


# The form of the answer


async def test_json_lines_tell_events_from_signals(api: LocalApi) -> None:
    await add(api, 2)
    async with following(api, "?after=1", headers=NDJSON) as client:
        assert client.response.content_type == "application/x-ndjson"
        assert await client.line() == {"stream": "bookmark", "position": 1}
        assert positions([await client.line() for _ in range(2)]) == [2, 3]
        assert await client.line() == {"stream": "live", "position": 3}


async def test_accept_chooses_the_form(api: LocalApi) -> None:
    sse, ndjson = SSE["Accept"], NDJSON["Accept"]
    for accept, media_type in (
        ("", sse), ("*/*", sse), (sse, sse), (ndjson, ndjson), (f"{ndjson}, */*", ndjson),
        (f"{sse}, {ndjson};q=0.9", sse), (f"{sse};q=0.5,Application/X-NDJSON", ndjson),
        (f"{ndjson};q=0", sse), ("nonsense;;q=", sse),
    ):  # fmt: skip
        async with following(api, headers={"Accept": accept}) as client:
            assert client.response.content_type == media_type, accept


async def test_headers_forbid_storing_and_buffering(api: LocalApi) -> None:
    async with following(api, headers={"Accept-Encoding": "gzip"}) as client:
        headers = client.response.headers
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Vary"] == "Accept"
        assert "Content-Encoding" not in headers
        assert headers["RateLimit"].startswith('"reads"')
    answer = await api.send("HEAD", "/api/v1/events/stream", roles=("audit",), headers=SSE)
    assert (answer.status, answer.media_type, answer.body) == (200, "text/event-stream", b"")
    answer = await api.send("HEAD", "/api/v1/events/stream?after=99", roles=("audit",))
    assert answer.status == 400
    await none_open(api)


# Refusals


async def test_invalid_stream_request_is_400(api: LocalApi) -> None:
    cases: list[tuple[str, dict[str, str], str]] = [
        ("?after=-1", {}, "invalid_parameter"),
        ("?after=x", {}, "invalid_parameter"),
        ("?after=1&after=2", {}, "invalid_parameter"),
        ("?type=Nothing", {}, "invalid_parameter"),
        ("?since=1", {}, "invalid_parameter"),
        ("?" + "&".join("model=m" for _ in range(17)), {}, "invalid_parameter"),
        ("", {"Last-Event-ID": "x"}, "invalid_parameter"),
        ("", {"Last-Event-ID": "-1"}, "invalid_parameter"),
        ("", {"Last-Event-ID": "9" * 19}, "invalid_parameter"),
        ("", {"Last-Event-ID": "2"}, "beyond_head"),
        ("?after=2", {}, "beyond_head"),
    ]
    for query, headers, code in cases:
        answer = await api.get(f"/api/v1/events/stream{query}", headers=headers)
        assert answer.refusal == (400, code), (query, headers)


async def test_archived_position_is_410_with_the_oldest(api: LocalApi) -> None:
    await add(api, 5)
    archive(api.app[LOG].path, 3)
    for path in (
        "/stream?after=2", "?after=2", "?since=3", "?until=3", "?before=3", "?until=2001-01-01T00:00:00Z",
    ):  # fmt: skip
        answer = await api.get(f"/api/v1/events{path}")
        assert answer.refusal == (410, "archived")
        assert (answer.json["oldest"], answer.json["head"]) == (4, 6)
    async with following(api, "?after=3") as client:
        assert positions(await client.events(3)) == [4, 5, 6]
    page = (await api.get("/api/v1/events")).json
    assert (positions(page["events"]), page["oldest"]) == ([4, 5, 6], 4)


async def test_streams_of_a_subject_are_limited(start: Start) -> None:
    api = await start(streams_per_subject=2)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(following(api))
        answer = await api.get("/api/v1/events/stream", roles=("audit",))
        assert answer.refusal == (429, "too_many_streams")
        assert int(answer.headers["Retry-After"]) > 0
        await stack.enter_async_context(following(api, subject="bob"))
    await none_open(api)
    async with following(api) as client:
        await client.until("live")
    await add(api, 1)  # a write shows the server that the client has gone
    await none_open(api)
    assert not len(api.app[STREAMS].tails)


# The end


async def test_stream_ends_when_its_token_expires(api: LocalApi) -> None:
    token = issue_token(api.config.data, "alice", ["audit"], expires_s=3, audience=api.config.jwt_audience)
    async with following(api, token=token) as client:
        assert "token" in (await client.rest())[-1].comment


@pytest.mark.parametrize("heartbeat_s", [0.0, 1000.0])
async def test_stream_ends_when_its_key_is_revoked(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch, heartbeat_s: float
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", heartbeat_s)
    async with following(api) as client:
        await client.until("live")
        [key] = list_keys(api.config.data)
        revoke(api.config.data, key.kid)
        await when(lambda: api.get("/api/v1/models", roles=("audit",)), lambda answer: answer.status == 401)
        if heartbeat_s:
            await add(api, 1)
        messages = await client.rest()
        assert "token" in messages[-1].comment
        assert not any(message.event for message in messages)


@pytest.mark.parametrize("headers", [SSE, NDJSON])
async def test_stop_of_server_ends_streams_in_order(api: LocalApi, headers: dict[str, str]) -> None:
    async with following(api, headers=headers) as client:
        await (client.until("live") if headers is SSE else client.line())
        rest, _ = await asyncio.gather(client.response.content.read(), api.client.server.close())
    if headers is SSE:
        assert rest == b": the server stops\n\n"
    else:
        assert json.loads(rest.splitlines()[-1]) == {"stream": "end", "reason": "the server stops"}


# Slow readers


MANY = 12_000
"""Events: more bytes than the buffers of a connection on this machine hold."""


@asynccontextmanager
async def silent(api: LocalApi) -> AsyncIterator[asyncio.StreamReader]:
    """Open a stream from the first event on, with a small receive buffer, and read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", api.client.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    token = api.token("audit")
    head = f"GET /api/v1/events/stream?after=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    writer.write(head.encode())
    try:
        yield reader
    finally:
        writer.transport.abort()


async def add_many(api: LocalApi) -> None:
    log = api.app[LOG]
    await asyncio.gather(*(log.submit(command) for command in facts(MANY)))


async def test_slow_reader_lags_alone_and_misses_nothing(api: LocalApi) -> None:
    await add_many(api)
    async with silent(api) as reader, following(api) as client:
        head = api.position
        for number in range(5):
            await add(api, 100, first=MANY + 100 * number)
            head = api.position
            assert positions(await client.events(100)) == list(range(head - 99, head + 1))
        tails = {tail.position for tail in api.app[STREAMS].tails}
        assert min(tails) < head
        came = b""
        async with asyncio.timeout(LIMIT_S):
            while f"\nid: {head}\n".encode() not in came[-4096:]:
                came += await reader.read(2**20)
    found = [int(position) for position in re.findall(rb"\nid: (\d+)\nevent: ", came)]
    assert found == list(range(1, head + 1))


async def test_stalled_reader_is_disconnected(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STALLED_S", 0.1)
    await add_many(api)
    async with silent(api):

        async def is_open() -> int:
            return len(api.app[STREAMS].tails)

        await when(is_open, lambda number: number == 1)
        await when(is_open, lambda number: number == 0)


async def test_stalled_reader_does_not_delay_shutdown(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STALLED_S", 10.0 * LIMIT_S)
    monkeypatch.setattr(stream, "STOPPING_S", 0.1)
    await add_many(api)
    async with silent(api), following(api) as client:
        await client.until("live")
        async with asyncio.timeout(LIMIT_S):
            api.app[STREAMS].tails.close()
            await none_open(api)
