"""`GET /api/v1/events/stream`: catches up, follows, resumes, and ends in order."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from support import models
from support.history import write
from support.http import LIMIT_S, LocalApi, when
from support.streams import following
from support.workers import until

from events.commands import Record
from events.types import Draft, WorkerExited
from server.api import stream
from server.app import create_app
from server.appkeys import LOG, STREAMS
from server.auth.keys import ensure_data_dir, list_keys, revoke, sign_token
from server.config import Config

PATH = "/api/v1/events/stream"
SSE = {"Accept": "text/event-stream"}
NDJSON = {"Accept": "application/x-ndjson"}
HANDLERS_S = 30.0
"""Half of the time that aiohttp gives handlers at the stop of a server."""


async def add(api: LocalApi, number: int) -> int:
    """Append events of the model `digits`; return the head's position before."""
    before = api.position
    await write(api.app[LOG], number, first=before)
    return before


async def none_open(api: LocalApi) -> None:
    """Wait until the server has closed all streams."""
    await until(lambda: not len(api.app[STREAMS]))


def positions(events: list[dict[str, object]]) -> list[object]:
    return [event["position"] for event in events]


# Order


async def test_stream_catches_up_says_live_and_follows(shared: LocalApi) -> None:
    head = await add(shared, 3)
    async with following(shared, f"?after={head + 1}") as client:
        first = await client.message()
        assert (first.retry, first.id, first.data) == (1000, head + 1, "")
        assert positions(await client.events(2)) == [head + 2, head + 3]
        live = await client.message()
        assert (live.id, live.event, live.json) == (None, "live", {"position": head + 3})
        await add(shared, 2)
        assert positions(await client.events(2)) == [head + 4, head + 5]
    async with following(shared, "?after=1", headers={"Last-Event-ID": str(head + 3)}) as client:
        assert positions(await client.events(2)) == [head + 4, head + 5]
    async with following(shared, f"?after={head + 4}", headers={"Last-Event-ID": ""}) as client:
        assert (await client.event())["position"] == head + 5
    async with following(shared) as client:
        assert (await client.message()).id == head + 5
        assert (await client.message()).event == "live"
        await add(shared, 1)
        assert (await client.event())["position"] == head + 6


async def test_streamed_event_is_the_listed_text(shared: LocalApi) -> None:
    await add(shared, 2)
    listed = (await shared.get("/api/v1/events?limit=1000")).body
    async with following(shared, "?after=0") as client:
        await client.message()
        texts = [(await client.message()).data for _ in range(shared.position)]
    assert listed.startswith(f'{{"events":[{",".join(texts)}],'.encode())


async def test_filtered_stream_sends_bookmarks(shared: LocalApi) -> None:
    head = await add(shared, 3)
    async with following(shared, "?after=0&type=ServerStarted&type=ServerStopped") as client:
        messages = await client.until("live")
        assert [(each.id, each.event) for each in messages] == [
            (0, ""), (1, "ServerStarted"), (head + 3, ""), (None, "live"),
        ]  # fmt: skip
    async with following(shared, f"?after={head}&model=digits&job=job&actor=system") as client:
        assert positions(await client.events(3)) == [head + 1, head + 2, head + 3]
    async with following(shared, f"?after={head}&model=digits&job=another") as client:
        assert [each.id for each in await client.until("live")] == [head, head + 3, None]
    shared.save(models.add(1), "m")
    async with following(shared, "?model=m&type=ModelLoaded&type=ModelUnloaded") as client:
        await shared.load("m")
        await add(shared, 5)
        await shared.unload("m")
        assert [event["type"] for event in await client.events(2)] == ["ModelLoaded", "ModelUnloaded"]


async def test_heartbeat_of_filtered_stream_tells_its_position(
    shared: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.0)
    async with following(shared, "?model=quiet") as client:
        await client.until("live")
        assert (await client.message()).comment == "heartbeat"
        head = await add(shared, 2) + 2
        while (message := await client.message()).id is None:
            assert message.comment == "heartbeat"
        while message.id != head:
            message = await client.message()


async def test_live_follows_all_earlier_events(shared: LocalApi) -> None:
    async with following(shared) as first:
        await first.until("live")
        for _ in range(5):
            after = await add(shared, 2)  # the shared ring follows a little later
            async with following(shared, f"?after={after}") as client:
                messages = await client.until("live")
                assert [each.id for each in messages] == [after, after + 1, after + 2, None]


async def test_stages_are_sent_without_id(shared: LocalApi) -> None:
    for version in (1, 2):
        shared.save(models.endless_load(), "slow", version)
    async with following(shared) as client, following(shared, "?type=ModelLoaded") as other:
        await client.until("live")
        first = await shared.accepted_load("slow", version=1)
        job = await shared.accepted_load("slow", version=2)
        of_job = {"job_id": job["id"], "model_id": "slow"}
        waits = {
            **of_job,
            "stage": None,
            "waiting_for": "the load of the same model, before it",
        }
        loads = {**of_job, "stage": "loading", "waiting_for": None}
        for expected in (waits, loads):
            while (message := (await client.until("stage"))[-1]).json != expected:
                assert message.id is None
            await shared.post(f"/api/v1/jobs/{first['id']}/cancel")
        async with following(shared, f"?job={job['id']}&type=stage") as late:
            assert (await late.until("stage"))[-1].json == loads
        await shared.unload("slow", force=True)
        await add(shared, 1)
        assert [message.event for message in await other.until("live")] == ["", "live"]


# The form of the answer


async def test_json_lines_tell_events_from_signals(shared: LocalApi) -> None:
    head = await add(shared, 2)
    async with following(shared, f"?after={head}", headers=NDJSON) as client:
        assert client.response.content_type == "application/x-ndjson"
        assert await client.line() == {"stream": "bookmark", "position": head}
        assert positions([await client.line() for _ in range(2)]) == [head + 1, head + 2]
        assert await client.line() == {"stream": "live", "position": head + 2}


def test_accept_chooses_the_form() -> None:
    sse, ndjson = SSE["Accept"], NDJSON["Accept"]
    for accept, media_type in (
        (None, sse), ("", sse), ("*/*", sse), (sse, sse), (ndjson, ndjson), (f"{ndjson}, */*", ndjson),
        (f"{sse}, {ndjson};q=0.9", sse), (f"{sse};q=0.5,Application/X-NDJSON", ndjson),
        (f"{ndjson};q=0", sse), ("nonsense;;q=", sse),
    ):  # fmt: skip
        assert stream.chosen_form(accept).media_type == media_type, accept


async def test_headers_forbid_storing_and_buffering(shared: LocalApi) -> None:
    async with following(shared, headers={"Accept-Encoding": "gzip"}) as client:
        headers = client.response.headers
        expected = {
            "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no",
            "Vary": "Accept",
        }  # fmt: skip
        assert expected.items() <= dict(headers).items()
        assert "Content-Encoding" not in headers
        assert headers["RateLimit"].startswith('"reads"')
    answer = await shared.send("HEAD", PATH, roles=("audit",), headers=SSE)
    assert (answer.status, answer.media_type, answer.body) == (200, "text/event-stream", b"")
    answer = await shared.send("HEAD", f"{PATH}?after=99999", roles=("audit",))
    assert answer.status == 400


# Refusals


async def test_invalid_stream_request_is_400(shared: LocalApi) -> None:
    for query in (
        "after=-1", "after=x", "after=1&after=2", "type=Nothing", "since=1",
        "&".join("model=m" for _ in range(17)),
    ):  # fmt: skip
        assert (await shared.get(f"{PATH}?{query}")).refusal == (400, "invalid_parameter"), query
    beyond = str(shared.position + 1)
    for seen, code in (
        ("x", "invalid_parameter"), ("-1", "invalid_parameter"), ("9" * 19, "invalid_parameter"),
        (beyond, "beyond_head"),
    ):  # fmt: skip
        assert (await shared.get(PATH, headers={"Last-Event-ID": seen})).refusal == (400, code), seen
    assert (await shared.get(f"{PATH}?after={beyond}")).refusal == (400, "beyond_head")


async def test_streams_of_a_subject_are_limited(shared: LocalApi) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(shared.config.streams_per_subject):
            await stack.enter_async_context(following(shared, subject="lou"))
        answer = await shared.get(PATH, roles=("audit",), subject="lou")
        assert answer.refusal == (429, "too_many_streams")
        assert int(answer.headers["Retry-After"]) > 0
        await stack.enter_async_context(following(shared, subject="bob"))
    await add(shared, 1)  # a write shows the server that the clients have gone
    await none_open(shared)
    assert not list(shared.app[STREAMS].tails)
    async with following(shared, subject="lou") as client:
        await client.until("live")


# The end


async def test_stream_ends_when_its_token_expires(shared: LocalApi) -> None:
    config = shared.config
    token = sign_token(config.data, "alice", ["audit"], expires_s=3, audience=config.jwt_audience)
    async with following(shared, token=token) as client:
        assert "token" in (await client.rest())[-1].comment


async def test_streams_end_when_their_key_is_revoked(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        clients = []
        for heartbeat_s in (1000.0, 0.0):
            monkeypatch.setattr(stream, "HEARTBEAT_S", heartbeat_s)
            clients.append(await stack.enter_async_context(following(api)))
            await clients[-1].until("live")
        [key] = list_keys(api.config.data)
        revoke(api.config.data, key.kid)
        await when(lambda: api.get("/api/v1/models", roles=("audit",)), lambda answer: answer.status == 401)
        at_event, at_heartbeat = clients
        for client in (at_heartbeat, at_event):
            messages = await client.rest()
            assert "token" in messages[-1].comment
            assert not any(message.event for message in messages)
            await add(api, 1)


async def test_stop_of_server_ends_streams_in_order(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    await add_many(api)
    monkeypatch.setattr(stream, "STALLED_S", 10.0 * LIMIT_S)
    monkeypatch.setattr(stream, "STOPPING_S", 0.1)
    async with (
        silent(api),
        following(api, headers=SSE) as events,
        following(api, headers=NDJSON) as lines,
    ):
        await asyncio.gather(events.until("live"), lines.line())
        await until(lambda: any(each._writing is not None for each in api.app[STREAMS]._open))
        reading = (client.response.content.read() for client in (events, lines))
        async with asyncio.timeout(HANDLERS_S):
            of_events, of_lines, _ = await asyncio.gather(*reading, api.client.server.close())
    assert of_events == b": the server stops\n\n"
    assert of_lines is not None
    assert json.loads(of_lines.splitlines()[-1]) == {"stream": "end", "reason": "the server stops"}


# Slow readers


async def add_many(api: LocalApi) -> None:
    """Append events of more bytes than the buffers of a connection on this machine hold."""
    exited = WorkerExited(1, None, ("x" * 10_000,))
    drafts = (Draft(f"x{number}", exited, "system", "job", "digits", 1, "w") for number in range(600))
    await asyncio.gather(*(api.app[LOG].submit(Record((draft,))) for draft in drafts))


@asynccontextmanager
async def silent(api: LocalApi) -> AsyncIterator[socket.socket]:
    """Open a stream from the first event on, and read nothing: the kernel keeps some 100 KB of it."""
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", api.client.port))
        connection.setblocking(False)
        field = f"Authorization: Bearer {api.token('audit')}"
        connection.send(f"GET {PATH}?after=0 HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n".encode())
        yield connection


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def crowded(shared: LocalApi) -> LocalApi:
    """The module's application, with so many events that a client has to read them."""
    await add_many(shared)
    return shared


async def test_slow_reader_lags_alone_and_misses_nothing(crowded: LocalApi) -> None:
    api = crowded
    async with silent(api) as connection, following(api) as client:
        for _ in range(5):
            head = await add(api, 20)
            assert positions(await client.events(20)) == list(range(head + 1, head + 21))
        head = api.position
        assert min(tail.position for tail in api.app[STREAMS].tails) < head
        came = b""
        async with asyncio.timeout(LIMIT_S):
            while f"\nid: {head}\n".encode() not in came[-4096:]:
                came += await asyncio.get_running_loop().sock_recv(connection, 2**20)
    found = [int(position) for position in re.findall(rb"\nid: (\d+)\nevent: ", came)]
    assert found == list(range(1, head + 1))


async def test_stalled_reader_is_disconnected(crowded: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    await add(crowded, 1)
    await none_open(crowded)
    monkeypatch.setattr(stream, "STALLED_S", 0.1)
    async with silent(crowded):
        await until(lambda: len(list(crowded.app[STREAMS].tails)) == 1)
        await until(lambda: not list(crowded.app[STREAMS].tails))


async def test_client_that_leaves_as_a_stream_begins_is_no_error(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave(request: web.Request, _: web.StreamResponse) -> None:
        if request.path == PATH and request.transport is not None:
            request.transport.close()

    ensure_data_dir(config.data)
    app = create_app(config)
    app.on_response_prepare.append(leave)
    async with TestClient(TestServer(app)) as client:
        api = LocalApi(client, config)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await api.get(PATH)
        await none_open(api)
        assert (await api.get("/api/v1/events/head")).status == 200
    assert "request failed" not in caplog.text
