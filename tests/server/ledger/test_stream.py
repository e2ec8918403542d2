"""The stream of events: it catches up, says so, follows, comes back where it was, and ends in order."""

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
from support.events import facts, write
from support.http import LIMIT_S, LocalApi, when
from support.models import save
from support.streams import Following, following

from events.bodies import from_body
from server.appkeys import LOG, STREAMS
from server.auth.keys import issue_token, list_keys, revoke
from server.ledger import stream

Start = Callable[..., Awaitable[LocalApi]]

SSE = {"Accept": "text/event-stream"}
NDJSON = {"Accept": "application/x-ndjson"}


async def add(api: LocalApi, number: int, *, first: int = 1) -> None:
    """Append facts about the model `digits`."""
    await write(api.app[LOG], number, first=first)


async def none_open(api: LocalApi) -> None:
    """Wait until the server has noticed that nobody listens any more."""

    async def still_open() -> int:
        return len(api.app[STREAMS])

    await when(still_open, lambda number: number == 0)


def archive(path: Path, position: int) -> None:
    """Move the events up to a position away, as `archive` does while no server runs."""
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        (digest,) = connection.execute("SELECT hash FROM events WHERE position = ?", (position,)).fetchone()
        connection.execute("DELETE FROM events WHERE position <= ?", (position,))
        connection.execute("UPDATE base SET position = ?, hash = ?", (position, digest))
        connection.commit()


def positions(events: list[dict[str, object]]) -> list[object]:
    return [event["position"] for event in events]


# What comes, and in which order


async def test_a_stream_begins_after_a_position_catches_up_says_so_and_follows(api: LocalApi) -> None:
    await add(api, 3)
    async with following(api, "?after=1") as client:
        first = await client.message()
        assert (first.retry, first.id, first.data) == (stream_retry(), 1, "")
        assert positions(await client.events(3)) == [2, 3, 4]
        live = await client.message()
        assert (live.id, live.event, live.json) == (None, "live", {"position": 4})
        await add(api, 2, first=4)
        assert positions(await client.events(2)) == [5, 6]


def stream_retry() -> int:
    return 1000


async def test_without_a_position_it_begins_at_the_head_and_says_where_that_is(api: LocalApi) -> None:
    await add(api, 3)
    async with following(api) as client:
        assert (await client.message()).id == 4
        assert (await client.message()).event == "live"
        await add(api, 1, first=4)
        assert (await client.event())["position"] == 5


async def test_an_event_is_what_the_list_has_and_its_hash_that_of_its_text(api: LocalApi) -> None:
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
            assert from_body(f"{text}}}") == fact


async def test_who_comes_back_goes_on_where_it_was_whatever_the_query_says(api: LocalApi) -> None:
    await add(api, 9)
    async with following(api, "?after=2", headers={"Last-Event-ID": "7"}) as client:
        assert positions(await client.events(3)) == [8, 9, 10]
    async with following(api, "?after=8", headers={"Last-Event-ID": ""}) as client:
        assert positions(await client.events(2)) == [9, 10]


async def test_filters_choose_and_bookmarks_tell_where_the_stream_is(api: LocalApi) -> None:
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


async def test_a_filtered_stream_follows_what_it_is_about(api: LocalApi) -> None:
    save(models.add(1), api.config.repository, "m")
    async with following(api, "?model=m&type=ModelLoaded&type=ModelUnloaded") as client:
        await api.load("m")
        await add(api, 5)
        await api.unload("m")
        assert [event["type"] for event in await client.events(2)] == ["ModelLoaded", "ModelUnloaded"]


async def test_a_sign_of_life_of_a_filtered_stream_is_where_it_is(
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


async def test_live_is_told_only_after_all_that_had_happened_before(api: LocalApi) -> None:
    async with following(api) as first:
        await first.until("live")
        for number in range(5):
            after = api.position
            await add(api, 2, first=2 * number + 1)  # what streams share follows a little later
            async with following(api, f"?after={after}") as client:
                told = await client.until("live")
                assert [each.id for each in told] == [after, after + 1, after + 2, None]


# Stages


async def test_stages_of_jobs_come_without_an_id(api: LocalApi) -> None:
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


# JSON lines


async def test_json_lines_are_events_and_what_is_not_one_can_be_told(api: LocalApi) -> None:
    await add(api, 2)
    async with following(api, "?after=1", headers=NDJSON) as client:
        assert client.response.content_type == "application/x-ndjson"
        assert await client.line() == {"stream": "bookmark", "position": 1}
        assert positions([await client.line() for _ in range(2)]) == [2, 3]
        assert await client.line() == {"stream": "live", "position": 3}


FORMS = [
    ("", "text/event-stream"),
    ("*/*", "text/event-stream"),
    ("text/event-stream", "text/event-stream"),
    ("application/x-ndjson", "application/x-ndjson"),
    ("application/x-ndjson, */*", "application/x-ndjson"),
    ("text/event-stream, application/x-ndjson;q=0.9", "text/event-stream"),
    ("text/event-stream;q=0.5,Application/X-NDJSON", "application/x-ndjson"),
    ("application/x-ndjson;q=0", "text/event-stream"),
    ("nonsense;;q=", "text/event-stream"),
]


async def test_the_form_is_what_is_asked_for(api: LocalApi, subtests: pytest.Subtests) -> None:
    for accept, media_type in FORMS:
        with subtests.test(accept):
            async with following(api, headers={"Accept": accept}) as client:
                assert client.response.content_type == media_type


# The answer's head, and refusals


async def test_the_head_keeps_the_stream_from_being_stored_or_held_back(api: LocalApi) -> None:
    async with following(api, headers={"Accept-Encoding": "gzip"}) as client:
        headers = client.response.headers
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Vary"] == "Accept"
        assert "Content-Encoding" not in headers
        assert headers["RateLimit"].startswith('"reads"')


async def test_head_answers_the_headers_alone(api: LocalApi) -> None:
    answer = await api.send("HEAD", "/api/v1/events/stream", roles=("audit",), headers=SSE)
    assert (answer.status, answer.media_type, answer.body) == (200, "text/event-stream", b"")
    answer = await api.send("HEAD", "/api/v1/events/stream?after=99", roles=("audit",))
    assert answer.status == 400
    assert not len(api.app[STREAMS])


NOT_UNDERSTOOD: list[tuple[str, dict[str, str]]] = [
    ("?after=-1", {}),
    ("?after=x", {}),
    ("?after=1&after=2", {}),
    ("?type=Nothing", {}),
    ("?since=1", {}),
    ("?" + "&".join("model=m" for _ in range(17)), {}),
    ("", {"Last-Event-ID": "x"}),
    ("", {"Last-Event-ID": "-1"}),
    ("", {"Last-Event-ID": "9" * 19}),
]


async def test_what_is_not_understood_is_refused(api: LocalApi, subtests: pytest.Subtests) -> None:
    for query, headers in NOT_UNDERSTOOD:
        with subtests.test(f"{query[:30]} {headers}"):
            answer = await api.get(f"/api/v1/events/stream{query}", headers=headers)
            assert answer.refusal == (400, "invalid_parameter")


async def test_a_position_that_the_log_does_not_have_yet_is_refused_with_its_head(api: LocalApi) -> None:
    for options in ({"headers": {"Last-Event-ID": "2"}}, {}):
        answer = await api.get(f"/api/v1/events/stream{'' if options else '?after=2'}", **options)
        assert answer.refusal == (400, "beyond_head")


async def test_what_is_archived_is_refused_and_told_from_where_to_begin_again(api: LocalApi) -> None:
    await add(api, 5)
    archive(api.app[LOG].path, 3)
    asked = (
        "/stream?after=2",
        "?after=2",
        "?since=3",
        "?until=3",
        "?before=3",
        "?until=2001-01-01T00:00:00Z",
    )
    for path in asked:
        answer = await api.get(f"/api/v1/events{path}")
        assert answer.refusal == (410, "archived")
        assert (answer.json["oldest"], answer.json["head"]) == (4, 6)
    async with following(api, "?after=3") as client:
        assert positions(await client.events(3)) == [4, 5, 6]
    page = (await api.get("/api/v1/events")).json
    assert (positions(page["events"]), page["oldest"]) == ([4, 5, 6], 4)


async def test_a_subject_has_so_many_streams_and_no_more(start: Start) -> None:
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


# The end


async def test_a_stream_ends_when_its_token_does(api: LocalApi) -> None:
    token = issue_token(api.config.data, "alice", ["audit"], expires_s=5, audience=api.config.jwt_audience)
    async with following(api, token=token) as client:
        assert "token" in (await client.rest())[-1].comment


async def test_a_stream_ends_when_the_key_of_its_token_is_revoked(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.0)
    async with following(api) as client:
        await client.until("live")
        [key] = list_keys(api.config.data)
        revoke(api.config.data, key.kid)
        assert "token" in (await client.rest())[-1].comment


async def test_who_may_not_be_told_any_more_is_not_told_what_happens_then(api: LocalApi) -> None:
    async with following(api) as client:
        await client.until("live")
        [key] = list_keys(api.config.data)
        revoke(api.config.data, key.kid)
        await when(lambda: refused(api), bool)
        await add(api, 1)
        [message] = await client.rest()
        assert "token" in message.comment


async def refused(api: LocalApi) -> bool:
    """Whether the server has seen that the key is gone."""
    return (await api.get("/api/v1/models", roles=("audit",))).status == 401


@pytest.mark.parametrize(("headers", "said"), [(SSE, b": the server stops\n\n"), (NDJSON, None)])
async def test_a_stop_of_the_server_ends_streams_in_order(
    api: LocalApi, headers: dict[str, str], said: bytes | None
) -> None:
    async with following(api, headers=headers) as client:
        await (client.until("live") if said else client.line())
        await asyncio.gather(api.client.server.close(), ended(client, said))


async def ended(client: Following, said: bytes | None) -> None:
    rest = await client.response.content.read()
    if said is not None:
        assert rest == said
    else:
        assert json.loads(rest.splitlines()[-1]) == {"stream": "end", "reason": "the server stops"}


async def test_a_client_that_goes_is_forgotten(api: LocalApi) -> None:
    for _ in range(3):
        async with following(api) as client:
            await client.until("live")
    await add(api, 1)  # without `handler_cancellation`, it is noticed when something is written
    await none_open(api)
    assert not len(api.app[STREAMS].tails)


# Who does not read


MANY = 12_000
"""Events: more bytes than the buffers of a connection on this machine hold."""


@asynccontextmanager
async def silent(api: LocalApi) -> AsyncIterator[asyncio.StreamReader]:
    """Open a stream from the beginning on, with little room for what comes; nothing is read unless asked."""
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


async def test_a_reader_that_stops_reading_lags_disturbs_nobody_and_misses_nothing(api: LocalApi) -> None:
    await add_many(api)
    async with silent(api) as reader, following(api) as client:
        head = api.position
        for number in range(5):
            await add(api, 100, first=MANY + 100 * number)
            head = api.position
            assert positions(await client.events(100)) == list(range(head - 99, head + 1))
        tails = {tail.position for tail in api.app[STREAMS].tails}
        assert min(tails) < head  # it is held up
        came = b""
        async with asyncio.timeout(LIMIT_S):
            while f"\nid: {head}\n".encode() not in came[-4096:]:
                came += await reader.read(2**20)
    found = [int(position) for position in re.findall(rb"\nid: (\d+)\nevent: ", came)]
    assert found == list(range(1, head + 1))


async def test_a_reader_that_takes_nothing_for_long_is_cut_off(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STALLED_S", 0.1)
    await add_many(api)
    async with silent(api):

        async def is_open() -> int:
            return len(api.app[STREAMS].tails)

        await when(is_open, lambda number: number == 1)
        await when(is_open, lambda number: number == 0)


async def test_a_reader_that_takes_nothing_does_not_hold_up_the_end_of_the_server(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STALLED_S", 10.0 * LIMIT_S)
    monkeypatch.setattr(stream, "STOPPING_S", 0.1)
    await add_many(api)
    async with silent(api), following(api) as client:
        await client.until("live")  # the other one is held up by now, or will be
        async with asyncio.timeout(LIMIT_S):
            api.app[STREAMS].tails.close()
            await none_open(api)
