"""Triton's load generator, unchanged, where PERF_ANALYZER or PATH has it (docs/clients/perf_analyzer.md)."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from onnx import TensorProto
from support import models
from support.servers import Server, address, bearer, clean_environment, standing
from tritonclient.http import InferenceServerClient

PROGRAM = os.environ.get("PERF_ANALYZER") or shutil.which("perf_analyzer")
LIMIT_S = 120.0
"""Each of these takes some seconds; it is there so that a bug fails a test and does not hang it."""
REQUESTS = 200

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="perf_analyzer is neither named by PERF_ANALYZER nor on PATH"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("perf") / "repository"
    models.save(models.subtract(), repository, "subtract")
    models.save(models.identity(TensorProto.STRING, [None, None]), repository, "identity-BYTES")
    models.save(models.identity(models.FLOAT, [None, 2]), repository, "batched")
    with standing(repository) as server, InferenceServerClient(address(server)) as client:
        admin = bearer(server, "admin")
        for name in ("subtract", "identity-BYTES"):
            client.load_model(name, headers=admin)
        client.load_model("batched", headers=admin, config='{"max_batch_size": 8, "dynamic_batching": {}}')
        yield server


@pytest.mark.parametrize(
    ("model", "options", "batch"),
    [
        ("subtract", "--shape=a:16 --shape=b:16", 1),
        ("subtract", "--shape=a:16 --shape=b:16 --async --concurrency-range=4", 1),
        ("subtract", "--shape=a:1 --shape=b:1 --input-tensor-format=json --output-tensor-format=json", 1),
        ("identity-BYTES", "--shape=x:2,3 --string-length=5", 1),
        ("batched", "-b 4 --concurrency-range=4", 4),
    ],
    ids=["binary", "asynchronous", "JSON", "texts", "batches"],
)
def test_perf_analyzer_agrees_with_server_statistics(
    server: Server, model: str, options: str, batch: int
) -> None:
    assert PROGRAM is not None
    command = [PROGRAM, "-m", model, "-u", address(server), "-i", "http", f"--request-count={REQUESTS}"]
    command += ["-H", f"Authorization:{bearer(server, 'predict')['Authorization']}", *options.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=clean_environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    client, _, ours = done.stdout.partition("Server:")
    assert number("Request count", client) >= REQUESTS
    assert number("Successful request count", ours) > REQUESTS / 2  # it looks when some are under way
    assert number("Inference count", ours) == batch * number("Successful request count", ours)
    assert 0 < number("Execution count", ours) <= number("Successful request count", ours)
    assert number("compute infer", ours) > 0


def number(label: str, text: str) -> float:
    found = re.search(rf"{label}:? (\d+)", text)
    assert found, f"no {label} in:\n{text}"
    return float(found[1])
