"""Triton as a peer: the binary `tritonserver` of the wheel `nvidia-pytriton`, run by itself.

The wheel stands in an environment of its own, which `make bench-peers` creates: its Python backend needs
numpy 1 (with numpy 2 its outputs are empty), so Python 3.11 or 3.12.
"""

import http.client
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import models

START_LIMIT_S = 60
STOP_LIMIT_S = 40
CONFIG = f"""
name: "{models.ADD_ONE}"
backend: "python"
max_batch_size: 0
input [{{ name: "x" data_type: TYPE_FP32 dims: [-1, -1] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [-1, -1] }}]
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """Location of the wheel.

    Args:
        bin: The folder of the environment's interpreter.
        libraries: What the server is linked against.
        server: The folder `tritonserver` of the wheel.
        stub: The backend's interpreter, in the version of the environment's.
    """

    bin: Path
    libraries: Path
    server: Path
    stub: Path


def find(environment: Path) -> Installation:
    """Return the wheel's folder in an environment, or end the bench with instructions."""
    found = next(environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"), None)
    if found is None:
        raise SystemExit(f"there is no Triton in {environment}: `make bench-peers` installs it")
    packages = found.parents[1]
    version = packages.parent.name.removeprefix("python")
    stub = found / "python_backend_stubs" / version / "triton_python_backend_stub"
    return Installation(environment.resolve() / "bin", packages / "nvidia_pytriton.libs", found, stub)


@contextmanager
def running(environment: Path, folder: Path) -> Iterator[int]:
    """Start Triton with the model that adds one, its files and output in `folder`, and yield its port."""
    installation = find(environment)
    repository, backends, output = folder / "triton", folder / "backends", folder / "triton-output"
    _write_model(repository)
    _link_backend(installation, backends)
    port = _free_port()
    process = _serve(installation, repository, backends, port, output)
    try:
        _wait_ready(process, port, output)
        yield port
        process.terminate()
        process.wait(STOP_LIMIT_S)
    finally:
        process.kill()
        process.wait()


def _write_model(repository: Path) -> None:
    path = models.write(repository, models.ADD_ONE, models.add_one())
    shutil.copy(Path(__file__).with_name("triton_model.py"), path.with_name("model.py"))
    (repository / models.ADD_ONE / "config.pbtxt").write_text(CONFIG)


def _link_backend(installation: Installation, backends: Path) -> None:
    """Put the backend and the interpreter that fits into one folder, where Triton looks for both."""
    python = backends / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (python / name).symlink_to((installation.server / "backends/python" / name).resolve())
    (python / installation.stub.name).symlink_to(installation.stub.resolve())


def _serve(
    installation: Installation, repository: Path, backends: Path, port: int, output: Path
) -> subprocess.Popen[bytes]:
    command = [
        str(installation.server / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--model-control-mode=explicit",
        f"--load-model={models.ADD_ONE}",
        "--disable-auto-complete-config",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
    ]
    # The backend's interpreter finds its packages by the python3 that comes first in PATH.
    path = f"{installation.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(installation.libraries.resolve())}
    with output.open("wb") as sink:
        return subprocess.Popen(command, env=variables, stdout=sink, stderr=subprocess.STDOUT)  # noqa: S603 - the wheel's binary


def _free_port() -> int:
    """Return a port that is free now: Triton refuses 0 and does not report its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _is_ready(port):
            return
        time.sleep(0.05)
    raise SystemExit(f"Triton is not ready\n{output.read_text(errors='replace')[-4000:]}")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_LIMIT_S)
    try:
        connection.request("GET", f"/v2/models/{models.ADD_ONE}/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
