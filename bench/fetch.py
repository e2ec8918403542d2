"""How fast does an add from the web fetch, and how much memory does it take? Beside `curl | sha256sum`.

A server of files with TLS, on loopback, has one large model. Both sides fetch it from there in turn; ours
also hashes it, writes it to the disk, syncs it, checks that it is ONNX, and commits the version.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bench import driver, models
from bench.table import Row, rate_row
from runtime.memory import tree_bytes

MIB = 2**20
RATIO_GOAL = 0.8
MEMORY_GOAL_BYTES = 50 * MIB
SAMPLE_EVERY_S = 0.05
CERTIFICATE = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
ORIGIN = """
import ssl, sys
from aiohttp import web
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(sys.argv[2], sys.argv[3])
app = web.Application()
app.router.add_static("/", sys.argv[1])
web.run_app(app, host="127.0.0.1", port=0, ssl_context=context, print=lambda text: print(text, flush=True))
"""


def measure(folder: Path, *, mib: int, rounds: int) -> list[Row]:
    """Fetch a file of so many MiB, in turn with curl.

    Args:
        folder: An empty directory.
        mib: Of the model's file.
        rounds: Pairs of fetches.
    """
    files = folder / "files"
    files.mkdir()
    digest = _write_model(files / "model.onnx", mib)
    with _origin(folder, files) as (url, certificate):
        os.environ["SSL_CERT_FILE"] = str(certificate)  # of the server that is started here
        try:
            with driver.running(folder / "server", *driver.UNLIMITED, f"--sources={url}") as server:
                return _measure(server, _Remote(f"{url}/model.onnx", digest, certificate), mib, rounds)
        finally:
            del os.environ["SSL_CERT_FILE"]


@dataclass(frozen=True, slots=True)
class _Remote:
    source: str
    digest: str
    certificate: Path


def _measure(server: driver.Server, remote: _Remote, mib: int, rounds: int) -> list[Row]:
    ours, theirs, before = list[float](), list[float](), tree_bytes(server.pid)
    with _sampled(server.pid) as samples:
        for number in range(1, rounds + 1):
            theirs.append(mib / _curl(remote))
            ours.append(mib / _add(server, f"fetched-{number}", remote))
    more = max(samples) - before
    memory = f"{more / MIB:.0f} MiB", f"{before / MIB:.0f} MiB"
    goal = f"≤ {MEMORY_GOAL_BYTES // MIB} MiB"
    return [
        rate_row(f"add of {mib} MiB from https (MiB/s) ÷ curl | sha256sum", ours, theirs, RATIO_GOAL),
        Row(
            "memory of the process tree meanwhile, beyond before",
            *memory,
            None,
            goal,
            more <= MEMORY_GOAL_BYTES,
        ),
    ]


def _write_model(path: Path, mib: int) -> str:
    """Write a model that adds one, and has a constant of so many MiB besides; return its SHA-256."""
    model = onnx.load_model_from_string(models.add_one())
    weights = np.random.default_rng(0).integers(0, 255, mib * MIB, dtype=np.uint8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "unused"))
    data = model.SerializeToString()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _origin(folder: Path, files: Path) -> Iterator[tuple[str, Path]]:
    """Serve files with TLS; yield the URL, and the certificate to trust."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    extension = ("-addext", "subjectAltName=DNS:localhost")
    command = ("openssl", *CERTIFICATE, *extension, "-keyout", str(key), "-out", str(certificate))
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - arguments of ours
    process = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", ORIGIN, str(files), str(certificate), str(key)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().split(":")[-1].split()[0].rstrip("/")
        yield f"https://localhost:{port}", certificate
    finally:
        process.kill()
        process.wait()


def _curl(remote: _Remote) -> float:
    """Return the seconds that `curl | sha256sum` takes."""
    began = time.perf_counter()
    command = f"curl -sS --cacert '{remote.certificate}' '{remote.source}' | sha256sum"
    done = subprocess.run(  # noqa: S602 - what users type
        command, shell=True, check=True, capture_output=True, text=True
    )
    took = time.perf_counter() - began
    if done.stdout.split()[0] != remote.digest:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return took


def _add(server: driver.Server, model_id: str, remote: _Remote) -> float:
    """Return the seconds from the request to the version."""
    began, path = time.perf_counter(), f"/api/v1/models/{model_id}/versions/1"
    body = json.dumps({"source": remote.source, "digest": f"sha256:{remote.digest}"}).encode()
    answer = server.ask("PUT", path, body, driver.WAIT)
    driver.completed_job(answer, path)
    took = time.perf_counter() - began
    server.ask("DELETE", path)
    return took


@contextmanager
def _sampled(pid: int) -> Iterator[list[int]]:
    """Sample the memory of a process and its descendants until the end."""
    samples, ended = [tree_bytes(pid)], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            samples.append(tree_bytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
