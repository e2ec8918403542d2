"""Code in a confined worker that wants a token from the control socket."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from support.http import LIMIT_S, local_server

from events.types import TokenIssued
from runtime.worker import landlock
from server.auth.control import KEY, SOCKET

PROCESSES = {
    "none": "",
    "worker": """
from runtime.wire import ReadJson
from runtime.worker.confine import confine
confine(ReadJson(2**30, ("landlock", "seccomp")))
""",
}
ATTACK = """
import http.client, json, os, socket, sys
folder, name, key_name = sys.argv[1:]
there = os.open(folder, os.O_PATH)
CONFINE
def ask(key):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(f"/proc/self/fd/{there}/{name}")
    body = json.dumps({"subject": "mallory", "roles": ["admin", "approve", "emergency"], "expires_s": 10**9})
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", "/api/v1/tokens", body, headers)
    return connection.getresponse().status
found = []
for take in (lambda: "", lambda: "guessed", lambda: open(f"{folder}/{key_name}").read()):
    try:
        found.append(ask(take()))
    except OSError as error:
        found.append(type(error).__name__)
print(json.dumps(found), flush=True)
os._exit(0)
"""
"""It ends as a worker does, without the interpreter's own end, which takes 20 s there."""


async def attack(data: Path, process: str) -> list[int | str]:
    """Return what requests without the key, with a wrong one, and with the key in the file are answered."""
    script = ATTACK.replace("CONFINE", PROCESSES[process])
    attacker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(data), SOCKET, KEY), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(attacker.communicate(), LIMIT_S)
    found: list[int | str] = json.loads(said)
    return found


@pytest.mark.skipif(not landlock.find_abi(), reason="this kernel has no Landlock; the key is then readable")
async def test_confined_worker_gets_no_token(tmp_path: Path) -> None:
    async with local_server(tmp_path) as api:
        data = api.config.data
        assert await attack(data, "worker") == ["PermissionError"] * 3  # it may make no socket
        assert await api.data_of(TokenIssued) == []
        assert await attack(data, "none") == [401, 401, 201]  # so that none fails for another reason
