"""The installed server as a process, driven over HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import models

START_LIMIT_S = 60
STOP_LIMIT_S = 60
# Longer than the longest `Prefer: wait`, so that the server's answer comes first.
ANSWER_LIMIT_S = 90
MAX_TOLD_BYTES = 4000
TINY = "tiny"
BEYOND_ALL = 9_000_000_000
"""A position beyond all events."""
WAIT = {"Prefer": "wait=60"}
UNLIMITED = ("--limit-management", "off", "--limit-inference", "off")
"""Options that lift limits which a bench would reach."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of the server."""

    status: int
    retry_after: str | None
    content: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.content[:MAX_TOLD_BYTES].decode(errors='replace')}"

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.content)


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
        """Return its port on 127.0.0.1."""
        return self.client.port

    def load(self, model_id: str, **asked: Any) -> float:
        """Load a model with these members as the body, and return the milliseconds until it is ready.

        They count from the request to the answer.
        """
        return self._change(f"/api/v1/models/{model_id}/load", json.dumps(asked).encode())

    def unload(self, model_id: str, *, force: bool = False) -> float:
        """Unload a model and return the milliseconds from the request to the answer that it is gone."""
        return self._change(f"/api/v1/models/{model_id}/unload{'?force=true' if force else ''}", b"")

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send any other request and return its response."""
        self.send(self.client, method, path, body, headers)
        return read(self.client)

    def newest_events(self, query: str, count: int) -> list[dict[str, Any]]:
        """Return the data of the newest events that a query finds, newest first."""
        page = self.ask("GET", f"/api/v1/events?{query}&before={BEYOND_ALL}&limit={count}").json()
        return [event["data"] for event in page["events"]]

    def written_bytes(self) -> int:
        """Return how many bytes it has had written to disks, now or later, since its start."""
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        counters = dict(line.split(": ") for line in lines)
        return int(counters["write_bytes"])

    def connect(self) -> http.client.HTTPConnection:
        """Return another connection, for concurrent requests."""
        connection = http.client.HTTPConnection(self.client.host, self.port, timeout=ANSWER_LIMIT_S)
        connection.connect()
        return connection

    def send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request as the administrator; `read` waits for the response."""
        kind = {"Content-Type": "application/json"} if body else {}
        connection.request(
            method, path, body, {"Authorization": f"Bearer {self.token}", **kind, **(headers or {})}
        )

    def _change(self, path: str, body: bytes) -> float:
        """Ask for a load or an unload and wait for its end; anything but a completed job ends the bench."""
        while True:
            start = time.perf_counter()
            answer = self.ask("POST", path, body, WAIT)
            took_ms = (time.perf_counter() - start) * 1000
            if answer.status == http.HTTPStatus.TOO_MANY_REQUESTS:
                time.sleep(float(answer.retry_after or 1))
                continue
            completed_job(answer, path)
            return took_ms


def read(connection: http.client.HTTPConnection) -> Answer:
    """Wait for the response to the request."""
    response = connection.getresponse()
    return Answer(response.status, response.headers["Retry-After"], response.read())


def completed_job(answer: Answer, path: str) -> dict[str, Any]:
    """Return the job that an answer shows; anything but a completed one ends the bench."""
    job: dict[str, Any] = answer.json() if answer.status == http.HTTPStatus.OK else {}
    if job.get("status") != "completed":
        raise SystemExit(f"POST {path}: {answer}")
    return job


@contextmanager
def running(folder: Path, *options: str, repository: Path | None = None) -> Iterator[Server]:
    """Start a server whose data, models and output are in `folder`, warm it up, and stop it at the end.

    Args:
        folder: An empty directory.
        options: Further options of `serve`.
        repository: Of another server, if both load from one.
    """
    repository, data = repository or folder / "repository", folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if not (repository / TINY).exists():
        models.write(repository, TINY, models.tiny())
    process = serve(repository, data, folder / "output", options)
    try:
        client = http.client.HTTPConnection(find_address(process, folder / "output"), timeout=ANSWER_LIMIT_S)
        server = Server(process.pid, repository, client, issue_token(data))
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


def serve(repository: Path, data: Path, output: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a server, and return its process, which may not be ready yet."""
    command = _command("serve", "--repository", repository, "--data", data, "--port", "0", *options)
    with output.open("wb") as sink:
        return subprocess.Popen(  # noqa: S603 - the installed command and paths of ours
            command, env=_environment(), stdout=sink, stderr=subprocess.STDOUT
        )


def issue_token(data: Path) -> str:
    """Return an administrator's token for the server of a data directory."""
    return run("token", "--data", data, "--role", "admin", "--subject", "bench").strip()


def run(*arguments: str | Path) -> str:
    """Run a command of the installed `loadledger`, and return what it printed."""
    done = subprocess.run(  # noqa: S603 - the installed command and arguments of ours
        _command(*arguments), env=_environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def find_address(process: subprocess.Popen[bytes], output: Path) -> str:
    """Return host and port, which `serve` prints when it is ready."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(rb"http://(127\.0\.0\.1:\d+)", output.read_bytes()):
            return found[1].decode()
        time.sleep(0.02)
    raise SystemExit(f"serve is not ready\n{_tail(output)}")


def _tail(output: Path) -> str:
    return output.read_text(errors="replace")[-4000:]
