"""gRPC of a real server: its process is killed, the server stops, clients leave; who is refused, and why."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import models
from support.connections import make_pair
from support.grpccalls import GRPC, GrpcClient, find_gateway, grpc_client, inference, refusal
from support.http import ONE, when
from support.models import save
from support.servers import Server, events, limited, refused_start, serving, verified
from support.workers import LIMIT_S, freeze, resume

from events.types import LoadRequested
from features.grpc.gatewaywire import SOCKET
from server.config import Config

X = np.array([1, 2, 3], np.float32)
DRAIN_S = 8


@asynccontextmanager
async def grpc_server(
    config: Config, *arguments: str, **limits: str
) -> AsyncIterator[tuple[Server, GrpcClient]]:
    """Start a server with gRPC over the models `m` (adds one) and `loop`, and a client of role `infer`."""
    save(models.add(1), config.repository, "m")
    save(models.counting_loop(), config.repository, "loop")
    async with serving(config, *GRPC, *arguments, command=limited(**limits)) as server:
        gateway = await find_gateway(server)
        async with grpc_client(gateway.address, server.api.token("infer")) as client:
            yield server, client


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")


def counting(trips: int, model_id: str = "loop") -> object:
    return inference(model_id, np.array(trips, np.int64), "trips", "INT64")


async def running(server: Server, count: int = 1) -> None:
    """Wait until so many inferences of `loop` are running."""

    async def in_flight() -> list[int]:
        resources = await server.api.get("/api/v1/resources")
        return [model["in_flight"] for model in resources.json["models"] if model["model_id"] == "loop"]

    await when(in_flight, lambda found: found == [count])


async def test_killed_gateway_costs_its_calls_and_is_started_again(config: Config) -> None:
    async with grpc_server(config) as (server, client):
        await server.api.load("loop")
        call = client.call("ModelInfer", counting(models.ENDLESS))
        await running(server)
        gateway = await find_gateway(server)
        os.kill(gateway.pid, signal.SIGKILL)
        assert (await refusal(call))[0] == "UNAVAILABLE"
        await running(server, 0)
        assert (await server.api.infer("m", ONE)).status == 503  # not loaded: HTTP is as before
        again = await find_gateway(server, besides=[gateway.pid])
        assert again.address == gateway.address
        async with grpc_client(again.address, server.api.token("infer")) as new:
            assert await new.status() == "SERVING"
        await server.logged("is started again")


async def test_stopping_server_answers_running_calls_and_no_new_one(config: Config) -> None:
    save(models.counting_loop(), config.repository, "other")
    async with grpc_server(config, f"--drain-timeout-s={DRAIN_S}") as (server, client):
        await server.api.load("loop")
        await server.api.load("other")
        [worker] = [pid for pid in server.children() if "loop/1" in command_line(pid)]
        await freeze(worker)  # so that no inference has ended when the server stops
        finite = client.call("ModelInfer", counting(1000))
        endless = client.call("ModelInfer", counting(models.ENDLESS, "other"))
        await running(server)
        server.send(signal.SIGTERM)
        await when(client.status, "NOT_SERVING".__eq__)
        status, metadata = await refusal(client.infer("m", X))
        assert (status, metadata["loadledger-code"]) == ("UNAVAILABLE", "shutting_down")
        resume(worker)
        assert np.frombuffer((await finite).raw_output_contents[0], np.int64) == 1000
        assert (await refusal(endless))[0] == "UNAVAILABLE"
        assert await server.ended() == 0
        await server.nothing_left()
    assert not (config.data / SOCKET).exists()
    verified(config)


@pytest.mark.parametrize("ends_by", ["cancel", "deadline", "connection"])
async def test_call_whose_client_leaves_ends_its_inference(config: Config, ends_by: str) -> None:
    async with grpc_server(config) as (server, client):
        await server.api.load("loop")
        gateway = await find_gateway(server)
        async with grpc_client(gateway.address, client.token) as other:
            call = other.call(
                "ModelInfer", counting(models.ENDLESS), timeout_s=1 if ends_by == "deadline" else LIMIT_S
            )
            if ends_by == "deadline":
                assert (await refusal(call))[0] == "DEADLINE_EXCEEDED"
            else:
                await running(server)
            if ends_by == "cancel":
                call.cancel()
        await running(server, 0)
        answer = await client.call("ModelInfer", counting(5))
        assert np.frombuffer(answer.raw_output_contents[0], np.int64) == 5


async def test_call_is_recorded_limited_and_refused_as_over_http(config: Config) -> None:
    async with grpc_server(config, "--on-demand=on", "--limit-management=2/hour") as (server, client):
        assert list(await client.infer("m", X)) == [2, 3, 4]  # loaded on demand
        await server.api.send("PUT", "/api/v1/models/m/labels/prod", json={"version": 1})
        answer = client.call("ModelInfer", inference("m", X, model_version="prod", id="seven"))
        assert (await answer).id == "seven"
        assert dict(await answer.trailing_metadata())["loadledger-model"].startswith("m/1")
        forbidden = client.ask("RepositoryModelLoad", model_name="loop")
        status, metadata = await refusal(forbidden)
        assert (status, metadata["loadledger-code"]) == ("PERMISSION_DENIED", "forbidden")
        gateway = await find_gateway(server)
        async with grpc_client(gateway.address, server.api.token("admin", subject="carol")) as admin:
            await admin.ask("RepositoryModelLoad", model_name="loop")
            await admin.ask("RepositoryModelUnload", model_name="loop")
            status, metadata = await refusal(admin.ask("RepositoryModelUnload", model_name="loop"))
            assert (status, metadata["loadledger-code"]) == ("RESOURCE_EXHAUSTED", "rate_limited")
            assert int(metadata["grpc-retry-pushback-ms"]) >= 1000
    asked = [event for event in await events(config) if isinstance(event.data, LoadRequested)]
    assert [(event.model_id, event.actor) for event in asked] == [("m", "alice"), ("loop", "carol")]


async def test_failures_count_against_the_client_whatever_it_claims(config: Config) -> None:
    async with grpc_server(config, limit_auth_failures="3/hour") as (server, _):
        gateway, seen = await find_gateway(server), []
        for number in range(5):
            async with grpc_client(gateway.address, f"wrong-{number}") as guessing:
                metadata = (("x-forwarded-for", f"10.0.0.{number}"), ("authorization", "Bearer wrong"))
                method: Any = guessing.channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
                seen.append((await refusal(method(b"", metadata=metadata)))[1]["loadledger-code"])
        assert seen == ["invalid_token"] * 3 + ["too_many_failures"] * 2


async def test_two_tokens_of_a_call_are_refused_as_over_http(config: Config) -> None:
    async with grpc_server(config) as (_, client):
        method: Any = client.channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        metadata = [("authorization", f"Bearer {client.token}")] * 2
        status, trailing = await refusal(method(b"", metadata=metadata))
        assert (status, trailing["loadledger-code"]) == ("INVALID_ARGUMENT", "invalid_request")


async def test_socket_of_the_gateway_answers_no_other_process(config: Config) -> None:
    async with grpc_server(config):
        path = config.data / SOCKET
        assert path.stat().st_mode & 0o777 == 0o600
        received = b""
        with socket.socket(socket.AF_UNIX) as other, suppress(ConnectionError):
            other.settimeout(LIMIT_S)
            await asyncio.to_thread(other.connect, str(path))
            await asyncio.to_thread(other.sendall, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            received = await asyncio.to_thread(other.recv, 1)
        assert received == b""


async def test_renewed_certificate_is_served_to_new_channels(config: Config, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    first, second = make_pair(), make_pair()
    first.write(cert, key)
    save(models.add(1), config.repository, "m")
    options = (*GRPC, f"--tls-cert={cert}", f"--tls-key={key}")
    async with serving(config, *options, tls=first.trusting()) as server:
        gateway, token = await find_gateway(server), server.api.token("infer")
        for pair in (first, second):
            pair.write(cert, key)
            async with grpc_client(gateway.address, token, pair.certificate) as client:
                assert (await client.ask("ServerMetadata")).name == "loadledger"


async def test_port_of_another_server_is_refused_at_the_start(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = await refused_start(config, f"--grpc-port={port}")
    assert f"--grpc-port: 127.0.0.1:{port} cannot be listened on" in text


async def test_missing_extra_is_named_at_the_start(config: Config) -> None:
    program = (
        "import importlib.util as util, loadledger.cli.main as main\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'grpc' else find(name, *more)\n"
        "main.main()\n"
    )
    text = await refused_start(config, "--grpc-port=0", command=(sys.executable, "-P", "-c", program))
    assert "--grpc-port: grpc is not installed: pip install 'loadledger[grpc]'" in text


async def test_server_without_grpc_has_no_gateway(config: Config) -> None:
    async with serving(config) as server:
        assert not (config.data / SOCKET).exists()
        assert not [pid for pid in server.children() if "features.grpc" in command_line(pid)]
