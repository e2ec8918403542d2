"""Baselines of the comparison, each in a process of its own.

`python -m bench.baselines session MODEL INFERENCES` prints the milliseconds of the first `InferenceSession()`
of the process, with so many inferences on zeros. `calls MODEL THREADS SECONDS` reads inputs (npz) and writes
how many inferences a second a bare session makes of them, and the outputs (npz). `release MODEL INFERENCES`
reads inputs (npz) and prints the bytes of memory of its process before, with and after a session. `reply`
serves a constant answer: it prints its port when it is ready, and ends when its standard input does.
"""

import asyncio
import ctypes
import gc
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cgroups import count_usable_cpus
from runtime.memory import tree_bytes
from runtime.process.forkserver import ADDED

MALLOC = "GLIBC_TUNABLES"
WORKER_ENVIRONMENT = ADDED
"""As in a worker: the figures differ only by the server's own work."""
PLAIN_ENVIRONMENT = {name: value for name, value in ADDED.items() if name != MALLOC}
"""Without tuned memory, and without telemetry and numpy's threads, which would disturb the measurement."""
THROWN_AWAY = 3
"""Rounds before the measurement. Memory that a virtual machine has never touched costs its host a fault for
each page: 60 ms became 200 to 400. All files are written before, too."""
LIMIT_S = 120
WARM_UP_S = 0.3
BETWEEN_LOOKS_S = 0.002
"""Calls between two readings of the clock take about so long."""
THREADS = count_usable_cpus()
"""Of bare sessions: as many as the server's have by default."""
HOST = "127.0.0.1"
REPLY = b'{"outputs":[]}'
STOP_LIMIT_S = 60


def measure_session(
    model: Path, *, inferences: int = 1, environment: dict[str, str] = WORKER_ENVIRONMENT
) -> float:
    """Return the milliseconds of the first session of a new process, which has imported ONNX Runtime.

    Args:
        model: The file; it takes FP32 tensors.
        inferences: Run in that time; 1 is the warm-up of a worker.
        environment: Variables beside ours.
    """
    inherited = {name: value for name, value in os.environ.items() if name != MALLOC}
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.baselines", "session", str(model), str(inferences)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=LIMIT_S,
    )
    return float(done.stdout)


@dataclass(frozen=True, slots=True)
class FileCosts:
    """Milliseconds of `sha256sum` and `cp` of files, each with the start of its process."""

    hashing_ms: float
    copying_ms: float


def measure_files(files: Sequence[Path], folder: Path) -> FileCosts:
    """Hash files in the page cache, and copy them into a folder, which the copies then leave."""
    target = folder / "copies"
    target.mkdir()
    costs = FileCosts(_command_ms("sha256sum", *files), _command_ms("cp", "--reflink=auto", *files, target))
    shutil.rmtree(target)
    return costs


def _command_ms(*command: str | Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=LIMIT_S)  # noqa: S603 - coreutils
    return (time.perf_counter() - start) * 1000


def _print_session(model: str, inferences: int) -> None:
    """Create the session with a worker's options, run it, and print the milliseconds."""
    # Imported only in the measuring process, before it measures.
    import onnxruntime  # noqa: PLC0415

    from runtime.worker.sessions import session_options  # noqa: PLC0415

    chosen = session_options(THREADS)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    for _ in range(inferences):
        session.run(None, _zeros(session))
    took = time.perf_counter() - start
    print(took * 1000, flush=True)
    os._exit(0)  # the session's end is not measured


def _zeros(session: Any) -> dict[str, Any]:
    """Return new zeros of the declared shapes, as a worker makes them; unknown dimensions are 1."""
    shapes = {
        node.name: [size if isinstance(size, int) else 1 for size in node.shape]
        for node in session.get_inputs()
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of a bare session, a second, and the outputs of one, flat."""

    per_s: float
    outputs: Sequence[NDArray[np.float32]]


def measure_calls(
    model: Path, inputs: Mapping[str, NDArray[np.float32]], *, threads: int, seconds: float
) -> Calls:
    """Call a session in a process of its own, as a program without a server would, with its defaults.

    Args:
        model: The file.
        inputs: By name.
        threads: Of the session, which spin as ONNX Runtime has them do.
        seconds: For how long, after a warm-up.
    """
    content = io.BytesIO()
    np.savez(content, **dict[str, Any](inputs))
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.baselines", "calls", str(model), str(threads), str(seconds)],
        input=content.getvalue(),
        stdout=subprocess.PIPE,
        timeout=seconds + LIMIT_S,
        check=True,
    )
    with np.load(io.BytesIO(done.stdout)) as arrays:
        return Calls(float(arrays["per_s"]), [arrays[name] for name in arrays.files if name != "per_s"])


def _write_calls(model: str, threads: int, seconds: float) -> None:
    """Call the session in a loop on the inputs in standard input; write the rate and the outputs."""
    import onnxruntime  # noqa: PLC0415 - only in the measuring process

    with np.load(io.BytesIO(sys.stdin.buffer.read())) as arrays:
        inputs = dict(arrays)
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    calls_at_once, outputs = 1, list[Any]()
    warm_until = time.perf_counter() + min(WARM_UP_S, seconds)
    while (begin := time.perf_counter()) < warm_until:
        outputs = session.run(None, inputs)
        calls_at_once = 1 + int(BETWEEN_LOOKS_S / (time.perf_counter() - begin))
    calls, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        for _ in range(calls_at_once):
            session.run(None, inputs)
        calls += calls_at_once
    content = io.BytesIO()
    np.savez(content, *(output.ravel() for output in outputs), per_s=calls / took)
    sys.stdout.buffer.write(content.getvalue())


def measure_release(
    model: Path, inputs: Mapping[str, NDArray[np.float32]], *, inferences: int
) -> tuple[int, ...]:
    """Return the bytes of a process that holds a session as a script with a web framework does.

    Args:
        model: The file.
        inputs: By name.
        inferences: How many it runs before it deletes the session.

    Returns:
        Its anonymous memory before the session, with it, after `del session` and `gc.collect()`, and after
        `malloc_trim`, which such a script does not call.
    """
    content = io.BytesIO()
    np.savez(content, **dict[str, Any](inputs))
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.baselines", "release", str(model), str(inferences)],
        input=content.getvalue(),
        stdout=subprocess.PIPE,
        timeout=LIMIT_S,
        check=True,
    )
    return tuple(map(int, done.stdout.split()))


def _print_release(model: str, inferences: int) -> None:
    """Create a session, run it in a pool of threads, delete it; print this process's memory at each step."""
    import onnxruntime  # noqa: PLC0415 - only in the measuring process

    with np.load(io.BytesIO(sys.stdin.buffer.read())) as arrays:
        inputs = dict(arrays)
    found = [tree_bytes(os.getpid())]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with ThreadPoolExecutor() as pool:
        for call in [pool.submit(session.run, None, inputs) for _ in range(inferences)]:
            call.result()
    found.append(tree_bytes(os.getpid()))
    del call, session
    gc.collect()
    found.append(tree_bytes(os.getpid()))
    ctypes.CDLL(None).malloc_trim(0)
    found.append(tree_bytes(os.getpid()))
    print(*found)


@contextmanager
def constant_reply() -> Iterator[int]:
    """Run it in a process of its own and yield its port."""
    command = [sys.executable, "-m", "bench.baselines", "reply"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own module
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise SystemExit("the constant reply did not start; what it wrote stands above")
            yield int(port)
            process.communicate(timeout=STOP_LIMIT_S)
        finally:
            process.kill()


async def _serve_reply() -> None:
    """Read each POST and answer a constant, until standard input is closed."""
    from aiohttp import web  # noqa: PLC0415 - the processes that measure sessions do without it

    async def reply(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=REPLY, content_type="application/json")

    application = web.Application(client_max_size=2**26)
    application.router.add_post("/v2/models/{id}/infer", reply)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    print(site.port, flush=True)
    await ended.wait()
    await runner.cleanup()


def main(kind: str, *arguments: str) -> None:
    """Run the baseline that the command line names."""
    match kind:
        case "session":
            _print_session(arguments[0], int(arguments[1]))
        case "calls":
            _write_calls(arguments[0], int(arguments[1]), float(arguments[2]))
        case "release":
            _print_release(arguments[0], int(arguments[1]))
        case "reply":
            import uvloop  # noqa: PLC0415 - see `_serve_reply`

            uvloop.run(_serve_reply())
        case _:
            raise SystemExit(f"no baseline is called {kind!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
