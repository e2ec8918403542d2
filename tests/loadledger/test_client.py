"""Both clients against a real server: every call, cancellation, and a server that is killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import models
from support.clients import KINDS, connected
from support.http import LIMIT_S, when
from support.models import save
from support.servers import APART, Server, serving, standing

from loadledger import AsyncClient, Busy, Client, Event, Job, JobUnfinished, NotFound, ServerError
from server.config import Config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a few models."""
    repository = tmp_path_factory.mktemp("client") / "repository"
    for number in (1, 2):
        save(models.add(number), repository, "add", number)
    for model_id in ("a", "b", "c.d-e_f", "gone"):
        save(models.add(1), repository, model_id)
    save(models.unknown_operator(), repository, "broken")
    save(models.slow_model(700, 12), repository, "slow")
    with standing(repository) as server:
        yield server


@pytest.fixture(params=KINDS)
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Each of the clients, as an administrator."""
    with connected(request.param, server.url, server.api.token("admin")) as client:
        yield client


def test_model_is_loaded_inferred_swapped_and_unloaded(client: Client) -> None:
    assert client.load("add", 1, wait=True).status == "completed"
    assert client.infer("add", {"x": [1.0, 2.0]})["outputs"][0]["data"] == [2.0, 3.0]
    job = client.load("add", wait=True, priority="high", keep_alive_s=3600, pinned=True)
    assert (job.version, job.parameters["pinned"], job.ended) == (2, True, True)
    array = np.array([1.0, 2.0], dtype=np.float32)
    answer = client.infer("add", {"x": array}, version=2, outputs=["y"], timeout_s=20.0)
    assert answer["outputs"][0]["data"] == [3.0, 4.0]
    model = client.model("add")
    assert (model.state, model.version, model.versions, model.job_id) == ("loaded", 2, [1, 2], job.id)
    assert model.files[0].sha256
    assert client.unload("add", wait=True).kind == "unload"
    assert client.model("add").state == "unloaded"
    with pytest.raises(Busy) as caught:
        client.infer("add", [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}])
    assert caught.value.code == "model_not_loaded"


@contextmanager
def stopped(server: Server) -> Iterator[int]:
    """Stop the fork server, so that no load ends before it was seen; gives its process id."""
    fork_server = server.children()[0]
    os.kill(fork_server, signal.SIGSTOP)
    try:
        yield fork_server
    finally:
        os.kill(fork_server, signal.SIGCONT)


def test_wait_reports_each_stage(client: Client, server: Server) -> None:
    seen: list[Job] = []

    def told(job: Job) -> None:
        seen.append(job)
        if job.stage is not None:
            os.kill(starting, signal.SIGCONT)

    with stopped(server) as starting:
        client.load("slow", wait=True, on_stage=told)
    assert seen[0].status in ("pending", "in_progress")
    assert seen[-1].status == "completed"
    assert {job.stage for job in seen} & {"starting", "loading", "warming_up", "measuring"}
    assert all(one != other for one, other in pairwise(seen))
    seen.clear()
    assert client.wait_for(client.unload("slow").id, on_change=seen.append).status == "completed"
    assert seen[-1].ended


def test_wait_ends_in_time_and_job_is_cancelled(client: Client) -> None:
    with pytest.raises(JobUnfinished) as caught:
        client.load("slow", wait=True, wait_s=0.0, on_stage=lambda _: None)
    job_id = caught.value.job.id
    try:
        client.cancel(job_id)
    except ServerError as error:
        assert error.code in ("already_started", "already_finished")  # noqa: PT017 - it was quicker
    assert client.wait_for(job_id, timeout_s=LIMIT_S).ended
    client.load("slow", wait=True)
    client.unload("slow", force=True, wait=True)


def test_same_idempotency_key_is_the_same_job(client: Client) -> None:
    key = f'a "key" \\ {os.urandom(8).hex()}'
    first = client.load("a", wait=True, idempotency_key=key)
    client.unload("a", wait=True)
    assert client.load("a", idempotency_key=key).id == first.id
    with pytest.raises(ServerError) as caught:
        client.load("b", idempotency_key=key)
    assert caught.value.code == "idempotency_mismatch"
    assert client.model("a").state == "unloaded"


def test_lists_page_filter_and_look_back(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.load("b", wait=True)
    client.unload("b", wait=True)
    jobs, events, found = list(client.jobs()), list(client.events()), list(client.models())
    monkeypatch.setattr("loadledger.stream.PAGE", 2)
    assert list(client.jobs())[-len(jobs) :] == jobs
    assert list(client.events())[: len(events)] == events
    assert [model.id for model in client.models()] == [model.id for model in found]
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    assert list(client.jobs(limit=3)) == jobs[:3]
    assert {job.model_id for job in client.jobs(model="b", status="completed")} == {"b"}
    at = events[-1].position
    assert {model.id for model in client.models(at=at)} <= {model.id for model in found}
    assert client.model("b", at=at).as_of == at
    assert client.job(jobs[0].id, at=at).id == jobs[0].id
    assert next(client.jobs(at=at)).as_of is None


def test_events_filter_and_keep_their_lines(client: Client) -> None:
    client.load("b", wait=True)
    client.unload("b", wait=True)
    types = ["ModelLoaded", "ModelUnloaded"]
    events = list(client.events(models=["b"], types=types))
    assert {(event.type, event.model_id) for event in events} == {(each, "b") for each in types}
    assert all(json.loads(event.line)["hash"] == event.hash for event in events)
    last = events[-1]
    assert list(client.events(after=last.position - 1, until=last.position)) == [last]
    assert next(iter(client.events(since=last.recorded_at, jobs=[last.job_id or ""]))).type
    assert list(client.events(actors=["nobody"])) == []


def test_follow_until_iterator_is_closed(client: Client) -> None:
    head = client.head()
    assert (len(head.hash), head.algorithm) == (64, "Ed25519")
    events = client.events(after=head.position - 2, follow=True)
    first = [next(events).position for _ in range(2)]
    assert first == [head.position - 1, head.position]
    client.load("c.d-e_f", wait=True)
    assert [next(events).type for _ in range(3)] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
    events.close()
    client.unload("c.d-e_f", wait=True)
    since = client.events(since=head.position + 1, follow=True, models=["c.d-e_f"])
    assert next(since).position == head.position + 1
    since.close()


def test_refusals_raise_by_kind(client: Client) -> None:
    for ask, kind, code in (
        (lambda: client.model("nothing"), NotFound, "unknown_model"),
        (lambda: client.load("add", 9), NotFound, "unknown_version"),
        (lambda: client.job("nothing"), NotFound, "unknown_job"),
        (client.unload, ServerError, "nothing_loaded"),
        (lambda: client.unload("add"), ServerError, "not_loaded"),
        (lambda: next(client.events(after=10**6, follow=True)), ServerError, "beyond_head"),
        (lambda: list(client.events(after=10**6)), ServerError, "beyond_head"),
        (lambda: client.get("/nothing"), NotFound, "not_found"),
    ):
        with pytest.raises(kind) as caught:
            ask()
        assert caught.value.code == code


def test_threads_share_a_client(server: Server) -> None:
    answers: list[Any] = []
    with Client(server.url, token=server.api.token("admin")) as client:
        client.load("add", 1, wait=True)

        def ask(number: int) -> None:
            for _ in range(10):
                [output] = client.infer("add", {"x": [float(number)]})["outputs"]
                answers.append((number, output["data"][0]))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        client.unload("add", wait=True)
    assert sorted(answers) == [(number, number + 1.0) for number in range(6) for _ in range(10)]


def test_closed_connection_is_not_reused(server: Server) -> None:
    with Client(server.url, token=server.api.token("admin")) as client:
        client.health()
        [connection] = client._transport._idle
        client.health()
        assert client._transport._idle == [connection]
        assert connection.sock is not None
        connection.sock.shutdown(2)
        assert client.health().status == "ok"
        assert client._transport._idle != [connection]
    assert client._transport._idle == []


# Event loops


async def test_cancellation_closes_stream_and_leaves_job(server: Server) -> None:
    api = server.api
    async with AsyncClient(server.url, token=api.token("admin", subject="sue")) as client:
        begun = asyncio.Event()

        async def follow() -> None:
            async with aclosing(client.events(after=0, follow=True)) as events:
                async for _ in events:
                    begun.set()

        for _ in range(12):  # more than a subject may have at once
            task = asyncio.create_task(follow())
            async with asyncio.timeout(LIMIT_S):
                await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            begun.clear()
        with stopped(server):
            waiting = asyncio.create_task(client.load("slow", wait=True))
            job = await when(lambda: first_job(client), lambda job: job.model_id == "slow" and not job.ended)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert (await client.wait_for(job.id)).status == "completed"
        await client.unload("slow", wait=True)


async def first_job(client: AsyncClient) -> Job:
    async with aclosing(client.jobs(limit=1)) as jobs:
        return await anext(jobs)


# Restarts


async def test_wait_and_follow_survive_killed_server(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for model_id in KINDS:
        save(models.slow_model(700, 12), repository, model_id)
    config = Config(repository=repository, data=tmp_path / "data")
    away: list[Exception] = []
    seen: dict[str, list[Event]] = {kind: [] for kind in KINDS}
    done: list[Job] = []
    begun = {kind: threading.Event() for kind in KINDS}

    def follow(kind: str) -> None:
        with connected(kind, url, token) as client:
            events = client.events(after=0, follow=True, on_away=away.append)
            for event in events:
                seen[kind].append(event)
                if event.type == "UnloadRequested":
                    break
            events.close()

    def load(kind: str) -> None:
        def told(_: Job) -> None:
            begun[kind].set()

        with connected(kind, url, token) as client:
            done.append(client.load(kind, wait=True, wait_s=LIMIT_S, on_stage=told))

    async with serving(config, APART) as server:
        url, token, port = server.url, server.api.token("admin"), server.url.rpartition(":")[2]
        tasks = [
            asyncio.create_task(asyncio.to_thread(each, kind)) for each in (follow, load) for kind in KINDS
        ]
        for each in begun.values():
            assert await asyncio.to_thread(each.wait, LIMIT_S)
        await server.kill()
    async with serving(config, APART, f"--port={port}") as server, asyncio.timeout(2 * LIMIT_S):
        await asyncio.gather(*tasks[2:])
        await server.api.unload(KINDS[0])
        await asyncio.gather(*tasks)
    assert [job.status for job in done] == ["completed", "completed"]
    assert seen[KINDS[0]] == seen[KINDS[1]]
    assert [event.position for event in seen[KINDS[0]]] == list(range(1, len(seen[KINDS[0]]) + 1))
    assert [event.type for event in seen[KINDS[0]]].count("ServerStarted") == 2
    assert len(away) <= 2


# Importing


def test_import_loads_only_the_transport_used() -> None:
    script = """
import sys
before = set(sys.modules)
import loadledger
def has(*names): return sorted(name for name in names if name in sys.modules)
assert not has("msgspec", "http.client", "aiohttp", "click"), has()
from loadledger import Client, ServerUnreachable
Client("http://127.0.0.1:1").close()
assert not has("aiohttp", "asyncio", "urllib3", "numpy", "events", "runtime", "server"), has("asyncio")
from loadledger import AsyncClient
assert not has("numpy", "events", "runtime", "server", "click")
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=LIMIT_S)
