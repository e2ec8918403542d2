"""Triton's load generator, unchanged, where PERF_ANALYZER or PATH has it (docs/clients/perf_analyzer.md)."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from onnx import TensorProto
from support import models
from support.servers import INFORMED, Server, address, bearer, clean_environment, grpc_address, standing
from tritonclient.http import InferenceServerClient

PROGRAM = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer")
LIMIT_S = 60.0
"""A run takes a second or two."""
REQUESTS = 200
MAX_RUNS = 3
"""One run in a hundred never ends on a busy machine, `--async` or not: perf_analyzer 2.51 has received all
answers, its connections are empty, its workers have ended, and its main thread sleeps."""

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="perf_analyzer is neither named by PERF_ANALYZER nor on PATH"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("perf") / "repository"
    models.save(models.subtract(), repository, "subtract")
    models.save(models.identity(TensorProto.STRING, [None, None]), repository, "identity-BYTES")
    models.save(models.identity(models.FLOAT, [None, 2]), repository, "batched")
    with (
        standing(repository, "--grpc-port=0", environment=INFORMED) as server,
        InferenceServerClient(address(server)) as client,
    ):
        admin = bearer(server, "admin")
        for name in ("subtract", "identity-BYTES"):
            client.load_model(name, headers=admin)
        client.load_model("batched", headers=admin, config='{"max_batch_size": 8, "dynamic_batching": {}}')
        yield server


PAIR = "--shape=a:16 --shape=b:16"
JSON = "--shape=a:1 --shape=b:1 --input-tensor-format=json --output-tensor-format=json"
TEXTS = "--shape=x:2,3 --string-length=5"


@pytest.mark.parametrize(
    ("protocol", "model", "options", "batch"),
    [
        ("http", "subtract", PAIR, 1),
        ("http", "subtract", f"{PAIR} --async --concurrency-range=4", 1),
        ("http", "subtract", JSON, 1),
        ("http", "identity-BYTES", TEXTS, 1),
        ("http", "batched", "-b 4 --concurrency-range=4", 4),
        ("grpc", "subtract", PAIR, 1),
        ("grpc", "subtract", f"{PAIR} --async --concurrency-range=4", 1),
        ("grpc", "identity-BYTES", TEXTS, 1),
        ("grpc", "batched", "-b 4 --concurrency-range=4", 4),
    ],
    ids=[
        *("binary", "asynchronous", "JSON", "texts", "batches"),
        *("gRPC", "asynchronous gRPC", "texts by gRPC", "batches by gRPC"),
    ],
)
def test_perf_analyzer_agrees_with_server_statistics(
    server: Server, protocol: str, model: str, options: str, batch: int
) -> None:
    assert PROGRAM is not None
    url = {"http": address, "grpc": grpc_address}[protocol](server)
    command = [PROGRAM, "-m", model, "-u", url, "-i", protocol, f"--request-count={REQUESTS}"]
    command += ["-H", f"authorization:{bearer(server, 'infer')['Authorization']}", *options.split()]
    client, _, ours = run(command, server, model).partition("Server:")
    assert number("Request count", client) >= REQUESTS
    assert number("Successful request count", ours) > REQUESTS / 2  # it looks when some are under way
    assert number("Inference count", ours) == batch * number("Successful request count", ours)
    assert 0 < number("Execution count", ours) <= number("Successful request count", ours)
    assert number("compute infer", ours) > 0


def run(command: list[str], server: Server, model: str) -> str:
    """Return what the program printed; run it again if it never ends with all its requests answered."""
    before = successes(server, model)
    for each in range(1, MAX_RUNS + 1):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, env=clean_environment(), check=False
            )
        except subprocess.TimeoutExpired:
            assert successes(server, model) >= before + each * REQUESTS
        else:
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
    raise AssertionError(f"none of {MAX_RUNS} runs ended")


def successes(server: Server, model: str) -> int:
    with InferenceServerClient(address(server)) as client:
        found = client.get_inference_statistics(model, headers=bearer(server, "infer"))
    return int(found["model_stats"][0]["inference_stats"]["success"]["count"])


def number(label: str, text: str) -> float:
    found = re.search(rf"{label}:? (\d+)", text)
    assert found, f"no {label} in:\n{text}"
    return float(found[1])
