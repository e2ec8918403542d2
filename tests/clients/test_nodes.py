"""Triton's clients and ours at two real nodes, only one of which has the model, and after its end."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http as triton
from support import models
from support.grpccalls import GRPC, find_gateway, grpc_client
from support.http import when
from support.models import save
from support.nodes import share_keys
from support.postgres import join_shared_server
from support.replicas import make_ledger
from support.servers import Server, address, bearer, serving
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from loadledger import AsyncClient, Client, ClientProblem
from server.config import Config

Nodes = tuple[Server, Server]
Ask = Callable[[Server, Any], Any]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def node(ledger: str, folder: Path, name: str, *options: str) -> AsyncIterator[Server]:
    """Start a node as a process, over `repository` and `keys` in a folder."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = Config(repository=folder / "repository", data=folder / name)
    config.repository.mkdir(exist_ok=True)
    share_keys(folder, config.data)
    about = ("--node-name", name, "--node-address", f"http://127.0.0.1:{port}", f"--port={port}")
    async with serving(config, "--ledger", ledger, *about, *options) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nodes]:
    """Two nodes; `m` is loaded at the first one, which the last test kills."""
    tmp_path = tmp_path_factory.mktemp("nodes")
    postgres = await join_shared_server()
    async with (
        postgres.database(make_ledger) as ledger,
        node(ledger.server_url, tmp_path, "a", "--lease-s=3", *GRPC) as owner,
    ):
        save(models.add(1), tmp_path / "repository", "m")
        await owner.api.load("m")
        async with node(ledger.server_url, tmp_path, "b", "--lease-s=3", *GRPC) as other:
            yield owner, other


def tensor(values: Any, kind: Any = triton) -> Any:
    given = kind.InferInput("x", list(values.shape), "FP32")
    given.set_data_from_numpy(values)
    return given


async def ask_with_triton(server: Server, values: Any) -> Any:
    def ask() -> Any:
        with triton.InferenceServerClient(address(server)) as client:
            headers = bearer(server, "infer")
            assert client.is_model_ready("m", headers=dict(headers))
            assert client.get_model_config("m", headers=dict(headers))["name"] == "m"
            return client.infer("m", [tensor(values)], headers=dict(headers)).as_numpy("y")

    return await asyncio.to_thread(ask)


async def ask_with_aio(server: Server, values: Any) -> Any:
    async with aio.InferenceServerClient(address(server)) as client:
        answer = await client.infer(
            "m", [tensor(values)], headers=bearer(server, "infer"), response_compression_algorithm="gzip"
        )
        return answer.as_numpy("y")


async def ask_with_client(server: Server, values: Any) -> Any:
    def ask() -> Any:
        with Client(server.url, token=server.api.token("infer")) as client:
            return [client.infer("m", {"x": values})["y"] for _ in range(2)][-1]

    return await asyncio.to_thread(ask)


async def ask_with_async_client(server: Server, values: Any) -> Any:
    async with AsyncClient(server.url, token=server.api.token("infer")) as client:
        return [(await client.infer("m", {"x": values}))["y"] for _ in range(2)][-1]


async def ask_with_grpc(server: Server, values: Any) -> Any:
    gateway = await find_gateway(server)
    async with grpc_client(gateway.address, server.api.token("infer")) as client:
        assert (await client.ask("ModelConfig", name="m")).config.name == "m"
        return await client.infer("m", values)


async def test_all_clients_get_the_same_at_both_nodes(nodes: Nodes) -> None:
    for ask in (ask_with_triton, ask_with_aio, ask_with_client, ask_with_async_client, ask_with_grpc):
        for count in (1, 16, 150_000):
            values = np.arange(count, dtype=np.float32)
            for server in nodes:
                assert np.array_equal(await ask(server, values), values + 1), (ask, count, server.url)
    for server in nodes:
        with pytest.raises(InferenceServerException, match="has no input"):
            await asyncio.to_thread(ask_wrongly, server)


def ask_wrongly(server: Server) -> None:
    wrong = triton.InferInput("z", [1], "FP32")
    wrong.set_data_from_numpy(np.ones(1, np.float32))
    with triton.InferenceServerClient(address(server)) as client:
        client.infer("m", [wrong], headers=bearer(server, "infer"))


async def test_client_asks_the_node_itself_the_second_time(nodes: Nodes) -> None:
    owner, other = nodes
    values, before = np.ones(1, np.float32), [await inferences(server) for server in nodes]
    async with AsyncClient(other.url, token=other.api.token("infer")) as client:
        for _ in range(5):
            await client.infer("m", {"x": values})

    async def counts() -> list[int]:
        now = [await inferences(server) for server in nodes]
        return [after - earlier for after, earlier in zip(now, before, strict=True)]

    assert await when(counts, lambda found: sum(found) >= 6) == [5, 1]
    assert owner.url != other.url


async def inferences(server: Server) -> int:
    """Return how many requests for inferences a server has answered."""
    text = (await server.api.get("/metrics")).body.decode()
    lines = [line for line in text.splitlines() if "/infer" in line and "http_requests" in line]
    return sum(round(float(line.rpartition(" ")[2])) for line in lines if not line.startswith("#"))


async def test_clients_survive_a_killed_node(nodes: Nodes) -> None:
    owner, other = nodes
    values, answers, problems = np.ones(1, np.float32), list[Any](), list[ClientProblem]()
    async with AsyncClient(f"{owner.url},{other.url}", token=owner.api.token("infer")) as client:

        async def ask() -> None:
            try:
                answers.append((await client.infer("m", {"x": values}))["y"].item())
            except ClientProblem as problem:
                problems.append(problem)
                await asyncio.sleep(0.05)

        await ask()
        await owner.kill()
        async with asyncio.timeout(60.0):
            while len(answers) < 3:
                await ask()
    assert answers == [2.0] * 3
    codes = {getattr(problem, "code", None) for problem in problems}
    assert codes <= {"node_unreachable", "model_not_loaded", None}
    assert "node_unreachable" in codes
