"""Both clients against a real server: every call, cancellation, and a server that is killed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from msgspec.structs import replace
from support import models
from support.clients import KINDS, connected
from support.http import LIMIT_S, LocalApi, when
from support.models import save
from support.servers import APART, CTRL_C, at_terminal, serving
from support.sources import MODEL, SHA256, environment_of, standing_site

from loadledger import (
    AsyncClient,
    Client,
    EventInfo,
    JobInfo,
    ModelInfo,
    NotFound,
    ProfileProblem,
    ServerError,
    SourceProblem,
)
from loadledger.profiles import ServerTarget, write_profile
from server.appkeys import POOL
from server.config import Config

T = TypeVar("T")


@pytest.fixture(scope="module")
def server(server: LocalApi) -> LocalApi:
    """A server with a few models."""
    repository = server.config.repository
    for number in (1, 2):
        save(models.add(number), repository, "add", number)
    save(models.add(1), repository, "b")
    save(models.slow_model(700, 12), repository, "slow")
    return server


@pytest.fixture(params=KINDS)
def client(server: LocalApi, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Each of the clients, as an administrator."""
    with connected(request.param, server.url, server.token("admin")) as client:
        yield client


def test_version_is_added_and_removed(client: Client, tmp_path: Path) -> None:
    file, seen = tmp_path / "net.onnx", list[tuple[int, int]]()
    file.write_bytes(models.external("w.bin").SerializeToString())
    (tmp_path / "w.bin").write_bytes(models.external_bytes())
    (tmp_path / "bundle.json").write_bytes(b"{}")
    model_id, signature = f"added-{type(client).__name__}", str(tmp_path / "bundle.json")
    added = client.add(
        model_id, file, signature=signature, on_progress=lambda sent, total: seen.append((sent, total))
    )
    assert (added.model_id, added.version) == (model_id, 1)
    assert {each.path for each in added.files} == {"model.onnx", "w.bin", "model.sig"}
    assert seen[-1] == (added.bytes, added.bytes)
    assert client.add(model_id, tmp_path).version == 2
    with pytest.raises(ServerError) as refused:
        client.add(model_id, file, 2)
    assert refused.value.code == "version_exists"
    assert client.add(model_id, str(file), 7).version == 7
    client.remove(model_id, 2)
    assert client.model(model_id).versions == [1, 7]
    with pytest.raises(NotFound):
        client.remove(model_id, 2)


def test_label_is_set_by_itself_and_with_a_load(client: Client, server: LocalApi) -> None:
    model_id = f"labelled-{type(client).__name__}"
    for version in (1, 2):
        save(models.add(version), server.config.repository, model_id, version)
    client.set_label(model_id, "champion", 1)
    client.set_label(model_id, "shadow", 2)
    assert client.model(model_id).labels == {"champion": 1, "shadow": 2}
    assert client.load(model_id, 2, label="champion", wait=True).label == "champion"
    client.remove_label(model_id, "shadow")
    assert client.model(model_id).labels == {"champion": 2}
    assert client.infer(model_id, {"x": [1.0]}, version="champion").model_version == "2"
    assert client.metadata(model_id, version="champion").versions == ["2"]
    with pytest.raises(NotFound) as refused:
        client.remove_label(model_id, "shadow")
    assert refused.value.code == "unknown_label"


def test_interrupted_addition_goes_on_with_what_is_missing(server: LocalApi, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(models.external("w.bin").SerializeToString())
    (tmp_path / "w.bin").write_bytes(models.external_bytes())
    first, seen = (tmp_path / "net.onnx").stat().st_size, list[int]()

    def interrupt(sent: int, _: int) -> None:
        if sent > first:
            raise KeyboardInterrupt

    with connected("Client", server.url, server.token("admin")) as client:
        with pytest.raises(KeyboardInterrupt):
            client.add("interrupted", tmp_path, on_progress=interrupt)
        added = client.add("interrupted", tmp_path, on_progress=lambda sent, _: seen.append(sent))
    assert added.version == 1
    assert min(seen) > first


def test_addition_without_its_upload_is_the_next_version(server: LocalApi, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(models.external("w.bin").SerializeToString())
    (tmp_path / "w.bin").write_bytes(models.external_bytes())
    token, versions = server.token("admin"), list[int]()
    with connected("Client", server.url, token) as client, connected("Client", server.url, token) as other:

        def add_first(_: int, __: int) -> None:
            if not versions:
                versions.append(0)
                versions.append(other.add("shared", tmp_path).version)

        versions.append(client.add("shared", tmp_path, on_progress=add_first).version)
    assert versions == [0, 1, 2]


def test_model_is_loaded_inferred_swapped_and_unloaded(client: Client) -> None:
    assert client.load("add", 1, wait=True).status == "completed"
    declared = client.metadata("add")
    assert [(each.name, each.datatype, each.shape) for each in declared.inputs] == [("x", "FP32", [-1])]
    assert (declared.versions, [each.name for each in declared.outputs]) == (["1"], ["y"])
    assert client.infer("add", {"x": [1.0, 2.0]})["y"].tolist() == [2.0, 3.0]
    job = client.load("add", wait=True, priority="high", keep_alive_s=3600, pinned=True)
    assert (job.version, job.parameters["pinned"], job.ended) == (2, True, True)
    array = np.array([1.0, 2.0], dtype=np.float32)
    answer = client.infer("add", {"x": array}, version=2, outputs=["y"], timeout_s=20.0)
    assert (answer.model_version, answer["y"].dtype, answer["y"].tolist()) == ("2", np.float32, [3.0, 4.0])
    model = client.model("add")
    assert (model.state, model.version, model.versions, model.job_id) == ("loaded", 2, [1, 2], job.id)
    assert model.files[0].sha256
    assert client.unload("add", force=True, wait=True).kind == "unload"
    assert client.model("add").state == "unloaded"


def test_block_loads_model_and_unloads_it_again(client: Client) -> None:
    with client.loaded("b", pinned=True) as model:
        assert (model.state, client.infer("b", {"x": np.ones(1, np.float32)})["y"].tolist()) == (
            "loaded",
            [2.0],
        )
        with client.loaded("b") as again:
            assert again.job_id == model.job_id
        assert client.model("b").state == "loaded"
    assert client.model("b").state == "unloaded"


@pytest.mark.parametrize("kind", KINDS)
def test_version_is_added_with_where_it_comes_from(
    kind: str, server: LocalApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = tmp_path / "own.onnx", list[tuple[int, int]]()
    own.write_bytes(MODEL)
    with standing_site() as site, connected(kind, server.url, server.token("admin")) as client:
        for name, value in environment_of(site, tmp_path).items():
            monkeypatch.setenv(name, value)
        url, m = site.url("/files/m.onnx"), f"sourced-{kind}"
        added = client.add(
            m, source=url, digest=f"sha256:{SHA256}", on_progress=lambda *counts: told.append(counts)
        )
        assert (added.version, added.files[0].sha256) == (1, SHA256)
        assert told[-1] == (len(MODEL), len(MODEL))
        assert client.add(m, own, source="mlflow://runs/42/model").version == 2
        assert client.add(m, own).version == 3
        found = [(each.version, each.source, each.resolved) for each in client.model(m).sources]
        assert found == [
            (1, url, f"{url}#sha256={SHA256}"),
            (2, "mlflow://runs/42/model", "mlflow://runs/42/model"),
        ]
        with pytest.raises(SourceProblem) as problem:
            client.add(m, source=site.url("/none.onnx"))
        assert problem.value.code == "source_not_found"
        with pytest.raises(ValueError, match="give a path, or a source"):
            client.add(m)
        with pytest.raises(ValueError, match="whose signature comes along"):
            client.add(m, source=url, signature=own)


def token_of(client: Client | AsyncClient) -> str | None:
    return client._address.token


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_client_of_profile_has_its_url_and_token(
    kind: type[Client] | type[AsyncClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("URL", "TOKEN", "CA", "PROFILE"):
        monkeypatch.delenv(f"LOADLEDGER_{name}", raising=False)
    path = tmp_path / "mine.toml"
    write_profile(path, ServerTarget("http://127.0.0.1:9", "secret"))
    client = kind.from_profile(str(path))
    assert (client.url, token_of(client)) == ("http://127.0.0.1:9", "secret")
    monkeypatch.setenv("LOADLEDGER_URL", "http://127.0.0.1:10")
    client = kind.from_profile(str(path))
    assert (client.url, token_of(client)) == ("http://127.0.0.1:10", None)
    with pytest.raises(ProfileProblem, match="loadledger login"):
        kind.from_profile(str(tmp_path / "none.toml"))


def list_unmeasured(client: Client) -> list[ModelInfo]:
    """Return the models without their memory, which the server measures again and again."""
    return [replace(model, memory_bytes=None) for model in client.models()]


def test_lists_page_and_filter_now_and_in_the_past(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.load("b", wait=True)
    client.unload("b", wait=True)
    jobs, events, found = list(client.jobs()), list(client.events()), list_unmeasured(client)
    monkeypatch.setattr("loadledger.stream.EVENTS_PER_REQUEST", 2)
    assert list(client.jobs()) == jobs
    assert list(client.events()) == events
    assert list_unmeasured(client) == found
    assert [event.position for event in events] == list(range(1, len(events) + 1))
    assert {job.model_id for job in client.jobs(model="b", status="completed")} == {"b"}
    last, types = events[-1], ["ModelLoaded", "ModelUnloaded"]
    named = list(client.events(models=["b"], types=types))
    assert {(event.type, event.model_id) for event in named} == {(each, "b") for each in types}
    assert list(client.events(after=last.position - 1, until=last.position)) == [last]
    assert list(client.events(since=last.recorded_at, jobs=[last.job_id or ""])) == [last]
    assert list(client.events(actors=["nobody"])) == []
    assert json.loads(last.line)["hash"] == last.hash == client.head().hash
    assert "b" in {model.id for model in client.models(at=last.position)}
    assert client.model("b", at=last.position).as_of == last.position
    assert client.job(jobs[0].id, at=last.position - 1).status == "in_progress"
    assert next(client.jobs(at=last.position)).id == jobs[0].id


def test_threads_share_a_client(server: LocalApi) -> None:
    with (
        Client(server.url, token=server.token("admin")) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        client.load("add", 1, wait=True)
        numbers = [float(number) for number in range(6)] * 10
        answers = threads.map(lambda number: client.infer("add", {"x": [number]}), numbers)
        assert [answer["y"].tolist() for answer in answers] == [[number + 1] for number in numbers]
        client.unload("add", wait=True)


def test_closed_connection_is_not_reused(server: LocalApi) -> None:
    with Client(server.url, token=server.token("admin")) as client:
        client.health()
        [connection] = client._transport.servers[0]._idle
        client.health()
        assert client._transport.servers[0]._idle == [connection]
        connection.sock.shutdown(2)
        assert client.health().status == "ok"
        assert client._transport.servers[0]._idle != [connection]
    assert client._transport.servers[0]._idle == []


# Event loops


async def test_cancellation_closes_stream_and_leaves_job(server: LocalApi) -> None:
    async with AsyncClient(server.url, token=server.token("admin", subject="sue")) as client:
        for _ in range(12):  # more than a subject may have at once
            streaming = asyncio.Event()

            async def follow(streaming: asyncio.Event = streaming) -> None:
                async with aclosing(client.events(after=0, follow=True)) as events:
                    async for _ in events:
                        streaming.set()

            await cancel_once(streaming.wait(), follow())
        fork_server = server.app[POOL]._fork_server
        assert fork_server is not None
        os.kill(fork_server.pid, signal.SIGSTOP)  # so that the load does not end before it was seen
        try:
            running = when(lambda: unended_load(client, "slow"), lambda job: job is not None)
            job = await cancel_once(running, client.load("slow", wait=True))
        finally:
            os.kill(fork_server.pid, signal.SIGCONT)
        assert job is not None
        assert (await client.wait_for(job.id)).status == "completed"
        await client.unload("slow", wait=True)


async def cancel_once(condition: Awaitable[T], call: Coroutine[Any, Any, Any]) -> T:
    """Start a call, await a condition, and cancel the call."""
    task = asyncio.create_task(call)
    async with asyncio.timeout(LIMIT_S):
        met = await condition
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return met


async def unended_load(client: AsyncClient, model_id: str) -> JobInfo | None:
    """Return the model's newest job, unless there is none or it has ended."""
    async with aclosing(client.jobs(model=model_id, limit=1)) as jobs:
        newest = await anext(jobs, None)
    return None if newest is None or newest.ended else newest


# Restarts


async def test_clients_and_commands_survive_killed_server(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for model_id in KINDS:
        save(models.slow_model(700, 12), repository, model_id)
    config = Config(repository=repository, data=tmp_path / "data")
    away: list[Exception] = []
    seen: dict[str, list[EventInfo]] = {kind: [] for kind in KINDS}
    following, loading = ({kind: threading.Event() for kind in KINDS} for _ in range(2))

    def follow(kind: str) -> None:
        with connected(kind, url, token) as client:
            events = client.events(after=0, follow=True, on_away=away.append)
            while not seen[kind] or seen[kind][-1].type != "UnloadRequested":
                seen[kind].append(next(events))
                following[kind].set()
            events.close()

    def load(kind: str) -> JobInfo:
        with connected(kind, url, token) as client:
            return client.load(kind, wait=True, wait_s=LIMIT_S, on_stage=lambda _: loading[kind].set())

    async with serving(config, APART) as server, AsyncExitStack() as stack:
        url, token, port = server.url, server.api.token("admin"), server.url.rpartition(":")[2]
        me, follows_too = {"LOADLEDGER_URL": url, "LOADLEDGER_TOKEN": token}, ("-f", "--json", "--after=0")
        top = stack.enter_context(at_terminal("top", environment=me))
        events = stack.enter_context(at_terminal("events", *follows_too, environment=me))
        await top.until(r"Z  position \d+\s+memory")
        await events.until('"position":1')
        follows = [asyncio.create_task(asyncio.to_thread(follow, kind)) for kind in KINDS]
        loads = [asyncio.create_task(asyncio.to_thread(load, kind)) for kind in KINDS]
        for each in (*following.values(), *loading.values()):
            assert await asyncio.to_thread(each.wait, LIMIT_S)
        await server.kill()
        await top.until("unreachable, retrying")
        top.shown = ""
        terminals = stack.pop_all()
    async with terminals, serving(config, APART, f"--port={port}") as server, asyncio.timeout(2 * LIMIT_S):
        assert [job.status for job in await asyncio.gather(*loads)] == ["completed", "completed"]
        await top.until(rf"{KINDS[0]} +1 +serving")
        await server.api.unload(KINDS[0])
        await asyncio.gather(*follows)
        await events.until("UnloadRequested")
        for terminal in (top, events):
            terminal.press(CTRL_C)
        assert (await top.end(), await events.end()) == (0, 130)
    first, second = seen.values()
    assert first == second
    assert [event.position for event in first] == list(range(1, len(first) + 1))
    assert [event.type for event in first].count("ServerStarted") == 2
    assert len(away) <= 2
    positions = [str(event.position) for event in first]
    assert re.findall(r'"position":(\d+)', events.plain)[: len(first)] == positions
    assert events.plain.count("retrying") <= 1
    assert "Traceback" not in top.plain


# Importing


def test_import_loads_only_the_transport_used() -> None:
    script = """
import sys
before = set(sys.modules)
import loadledger
def has(*names): return sorted(name for name in names if name in sys.modules)
assert not has("msgspec", "socket", "aiohttp", "click"), has()
from loadledger import Client, ServerUnreachable
Client("http://127.0.0.1:1").close()
assert not has("aiohttp", "asyncio", "http.client", "numpy", "events", "runtime", "server"), has()
from loadledger import AsyncClient
assert not has("numpy", "events", "runtime", "server", "click")
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=LIMIT_S)
