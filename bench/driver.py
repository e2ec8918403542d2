"""The installed server as a process, driven over HTTP as any client would."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import models

START_LIMIT_S = 60
STOP_LIMIT_S = 60
# Longer than the longest `Prefer: wait`, so that the server's answer comes first.
ANSWER_LIMIT_S = 90
TINY = "tiny"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        pid: Its process; the processes of its tree are this one's descendants.
        repository: The folder that it loads from; put models there with `models.write`.
        client: A connection that is kept open, so that no measurement includes connecting.
        token: A bearer token of an administrator.
    """

    pid: int
    repository: Path
    client: http.client.HTTPConnection
    token: str

    @property
    def port(self) -> int:
        """Return where it listens on 127.0.0.1."""
        return self.client.port

    def load(self, model_id: str) -> float:
        """Load a model and return the milliseconds from the request to the answer that it is ready."""
        return self._change(f"/api/v1/models/{model_id}/load")

    def unload(self, model_id: str) -> float:
        """Unload a model and return the milliseconds from the request to the answer that it is gone."""
        return self._change(f"/api/v1/models/{model_id}/unload")

    def _change(self, path: str) -> float:
        """Ask for a load or an unload and wait for its end; anything but a completed job ends the bench."""
        while True:
            start = time.perf_counter()
            status, retry_after, answer = self._post(path)
            took_ms = (time.perf_counter() - start) * 1000
            if status == http.HTTPStatus.TOO_MANY_REQUESTS:
                time.sleep(float(retry_after or 1))
                continue
            if status != http.HTTPStatus.OK or answer["status"] != "completed":
                raise SystemExit(f"POST {path}: {status} {json.dumps(answer)}")
            return took_ms

    def _post(self, path: str) -> tuple[int, str | None, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Prefer": "wait=60"}
        self.client.request("POST", path, headers=headers)
        response = self.client.getresponse()
        return response.status, response.headers["Retry-After"], json.loads(response.read())


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """Start a server whose data, models and output are in `folder`, warm it up, and stop it at the end.

    Args:
        folder: An empty directory.
        options: Further options of `serve`.
    """
    repository, data = folder / "repository", folder / "data"
    models.write(repository, TINY, models.tiny())
    process = _serve(repository, data, folder / "output", options)
    try:
        client = http.client.HTTPConnection(_address(process, folder / "output"), timeout=ANSWER_LIMIT_S)
        server = Server(process.pid, repository, client, _token(data))
        # The first load starts the fork server, once in the life of a server; it is not what is measured.
        server.load(TINY)
        server.unload(TINY)
        yield server
        client.close()
        process.send_signal(signal.SIGTERM)
        if status := process.wait(STOP_LIMIT_S):
            raise SystemExit(f"serve ended with {status}\n{_tail(folder / 'output')}")
    finally:
        process.kill()
        process.wait()


def _command(*arguments: str | Path) -> list[str]:
    """Return a command line of the `loadledger` that is installed beside this interpreter."""
    return [str(Path(sys.executable).with_name("loadledger")), *map(str, arguments)]


def _environment() -> dict[str, str]:
    """Return our environment without settings that were meant for another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOADLEDGER_")}


def _serve(repository: Path, data: Path, output: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = _command("serve", "--repository", repository, "--data", data, "--port", "0", *options)
    with output.open("wb") as sink:
        return subprocess.Popen(  # noqa: S603 - the installed command and paths of ours
            command, env=_environment(), stdout=sink, stderr=subprocess.STDOUT
        )


def _token(data: Path) -> str:
    command = _command("token", "--data", data, "--role", "admin", "--subject", "bench")
    done = subprocess.run(  # noqa: S603 - the installed command and paths of ours
        command, env=_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def _address(process: subprocess.Popen[bytes], output: Path) -> str:
    """Return host and port, which `serve` prints when it is ready."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(rb"http://(127\.0\.0\.1:\d+)", output.read_bytes()):
            return found[1].decode()
        time.sleep(0.02)
    raise SystemExit(f"serve is not ready\n{_tail(output)}")


def _tail(output: Path) -> str:
    return output.read_text(errors="replace")[-4000:]
