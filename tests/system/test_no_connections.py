"""A server opens no connection, and looks up no name, for a model: wherever it is said to come from."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import models
from support.http import ONE
from support.models import save
from support.servers import Server, events, serving
from support.shims import Shim, build_shim, environment_of

from events.types import VersionAdded
from server.config import Config

MODEL = models.add(1).SerializeToString()
NAMED, RESOLVED = "hf://org/repo@main", f"hf://org/repo@{'c0ffee12' * 5}"
BINARY = {"Content-Type": "application/octet-stream"}
COMMAND = """
import os
from runtime.process.forkserver import ADDED
ADDED.update({name: os.environ[name] for name in ("LD_PRELOAD", "CONNECTIONS")})
from loadledger.cli.main import main
main()
"""
"""The command, whose workers load the library, too: else they see none of the server's variables."""
CONNECT = """
import asyncio, socket, sys
import uvloop

async def connect():
    _, writer = await asyncio.open_connection("localhost", int(sys.argv[1]))
    writer.close()

if sys.argv[2] == "uvloop":
    uvloop.run(connect())
else:
    socket.create_connection(("localhost", int(sys.argv[1]))).close()
"""
"""A program that looks up a name, and connects."""


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    """The library that counts connections and look-ups."""
    return build_shim(Path(__file__).with_name("connections.c"), tmp_path, "2I", "CONNECTIONS")


@pytest.mark.parametrize("by", ["uvloop", "socket"])
def test_shim_counts_connections_and_lookups(shim: Shim, by: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        environment = os.environ | environment_of([shim])
        subprocess.run([sys.executable, "-c", CONNECT, port, by], env=environment, check=True)
    connections, lookups = shim.numbers
    assert connections >= 1  # ::1 is tried first where there is one
    assert lookups == 1


async def test_server_opens_no_connection_for_models(config: Config, shim: Shim) -> None:
    command = (sys.executable, "-P", "-c", COMMAND)
    async with serving(config, command=command, environment=environment_of([shim])) as server:
        await server.api.add_by_upload("said", 1, MODEL, source=NAMED, resolved=RESOLVED)
        uploaded = "/api/v1/models/uploaded/versions/1"
        answer = await server.api.send("PUT", uploaded, data=MODEL, headers=BINARY)
        assert answer.status == 201
        save(models.add(1), config.repository, "laid")
        for model_id in ("said", "uploaded", "laid"):
            await use(server, shim, model_id)
        assert (await server.api.send("DELETE", uploaded)).status == 204
        assert await server.stop() == 0
        assert shim.numbers == (0, 0), server.output.read_text()
    said = [event.data.source for event in await events(config) if isinstance(event.data, VersionAdded)]
    assert [(each.uri, each.resolved) for each in said if each] == [(NAMED, RESOLVED)]


async def use(server: Server, shim: Shim, model_id: str) -> None:
    """Load a model, infer and unload it; all processes have the library and its counters."""
    await server.api.load(model_id)
    assert (await server.api.model(model_id))["state"] == "loaded"
    assert (await server.api.infer(model_id, ONE)).json["outputs"][0]["data"] == [2]
    for process in (server.pid, *server.children()):
        assert {str(shim.library), shim.variables["CONNECTIONS"]} <= mapped_files(process)
    await server.api.unload(model_id)


def mapped_files(process: int) -> set[str]:
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[-1] for line in lines}
