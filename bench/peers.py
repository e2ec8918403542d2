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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from bench import models

START_LIMIT_S = 60
STOP_LIMIT_S = 40
REPOSITORY, BACKENDS, OUTPUT = "triton", "backends", "triton-output"
KINDS: Mapping[int, str] = {TensorProto.FLOAT: "TYPE_FP32"}
"""Triton's names of the datatypes that our models have."""


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
def running(environment: Path, folder: Path, served: Mapping[str, bytes], *, threads: int) -> Iterator[int]:
    """Start Triton, its files and output in `folder`, and yield its port.

    Args:
        environment: The environment that the wheel is installed in.
        folder: An empty directory.
        served: The models to load, by name.
        threads: Of the session of each; otherwise these have ONNX Runtime's defaults.
    """
    installation = find(environment)
    for model_id, content in served.items():
        _write_model(folder / REPOSITORY, model_id, content, threads)
    _link_backend(installation, folder / BACKENDS)
    port = _free_port()
    process = _serve(installation, folder, port, served)
    try:
        _wait_ready(process, port, folder / OUTPUT, served)
        yield port
        process.terminate()
        process.wait(STOP_LIMIT_S)
    finally:
        process.kill()
        process.wait()


def _write_model(repository: Path, model_id: str, content: bytes, threads: int) -> None:
    path = models.write(repository, model_id, content)
    shutil.copy(Path(__file__).with_name("triton_model.py"), path.with_name("model.py"))
    graph = onnx.load_from_string(content).graph
    config = "".join(
        [
            f'name: "{model_id}" backend: "python" max_batch_size: 0\n',
            *(f"input [{{ {_describe(value)} }}]\n" for value in graph.input),
            *(f"output [{{ {_describe(value)} }}]\n" for value in graph.output),
            "instance_group [{ kind: KIND_CPU count: 1 }]\n",
            f'parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}\n',
        ]
    )
    (repository / model_id / "config.pbtxt").write_text(config)


def _describe(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    return f'name: "{value.name}" data_type: {KINDS[tensor.elem_type]} dims: {dims}'


def _link_backend(installation: Installation, backends: Path) -> None:
    """Put the backend and the interpreter that fits into one folder, where Triton looks for both."""
    python = backends / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (python / name).symlink_to((installation.server / "backends/python" / name).resolve())
    (python / installation.stub.name).symlink_to(installation.stub.resolve())


def _serve(
    installation: Installation, folder: Path, port: int, served: Iterable[str]
) -> subprocess.Popen[bytes]:
    command = [
        str(installation.server / "bin" / "tritonserver"),
        f"--model-repository={folder / REPOSITORY}",
        f"--backend-directory={folder / BACKENDS}",
        "--model-control-mode=explicit",
        *(f"--load-model={model_id}" for model_id in served),
        "--disable-auto-complete-config",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
    ]
    # The backend's interpreter finds its packages by the python3 that comes first in PATH.
    path = f"{installation.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables = {**os.environ, "PATH": path, "LD_LIBRARY_PATH": str(installation.libraries.resolve())}
    with (folder / OUTPUT).open("wb") as sink:
        return subprocess.Popen(command, env=variables, stdout=sink, stderr=subprocess.STDOUT)  # noqa: S603 - the wheel's binary


def _free_port() -> int:
    """Return a port that is free now: Triton refuses 0 and does not report its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], port: int, output: Path, served: Iterable[str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if all(_is_ready(port, model_id) for model_id in served):
            return
        time.sleep(0.05)
    raise SystemExit(f"Triton is not ready\n{output.read_text(errors='replace')[-4000:]}")


def _is_ready(port: int, model_id: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_LIMIT_S)
    try:
        connection.request("GET", f"/v2/models/{model_id}/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
