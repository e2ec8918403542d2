"""Baselines of the comparison, each in a process of its own.

`python -m bench.baselines session MODEL INFERENCES` prints the milliseconds of the first `InferenceSession()`
of the process, with so many inferences on zeros. `calls MODEL ELEMENTS SECONDS` prints how many inferences a
second one thread makes. `reply` serves a constant answer: it prints its port when it is ready, and ends when
its standard input does.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

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
WARM_UP_CALLS = 100
CALLS_AT_ONCE = 20
"""Calls between two readings of the clock; one with 600 KB takes some 0.1 ms."""
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
    """Milliseconds of `sha256sum` and `cp` of a file, each with the start of its process."""

    hashing_ms: float
    copying_ms: float


def measure_file(path: Path, folder: Path, *, repeats: int) -> FileCosts:
    """Hash a file, and copy it into a folder, in turn; medians.

    Args:
        path: The file, in the page cache.
        folder: Where the copies go, one at a time.
        repeats: Of each.
    """
    copy = folder / "copy"
    rounds = []
    for _ in range(repeats):
        rounds.append((_command_ms("sha256sum", path), _command_ms("cp", "--reflink=auto", path, copy)))
        copy.unlink()
    return FileCosts(*(median(took_ms) for took_ms in zip(*rounds, strict=True)))


def _command_ms(*command: str | Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=LIMIT_S)  # noqa: S603 - coreutils
    return (time.perf_counter() - start) * 1000


def _print_session(model: str, inferences: int) -> None:
    """Create the session with a worker's options, run it, and print the milliseconds."""
    # Imported only in the measuring process, before it measures.
    import onnxruntime  # noqa: PLC0415

    from runtime.worker.sessions import session_options  # noqa: PLC0415

    chosen = session_options(1)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    for _ in range(inferences):
        session.run(None, _zeros(session))
    took = time.perf_counter() - start
    print(took * 1000, flush=True)
    os._exit(0)  # the session's end is not measured


def _zeros(session: Any) -> dict[str, Any]:
    """Return new zeros of the declared shapes, as a worker makes them; unknown dimensions are 1."""
    import numpy as np  # noqa: PLC0415

    shapes = {
        node.name: [size if isinstance(size, int) else 1 for size in node.shape]
        for node in session.get_inputs()
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def measure_calls(model: Path, elements: int, *, seconds: float) -> float:
    """Measure in a process of its own and return the calls per second."""
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.baselines", "calls", str(model), str(elements), str(seconds)],
        stdout=subprocess.PIPE,
        timeout=seconds + 60,
        check=True,
    )
    return float(done.stdout)


def _print_calls(model: str, elements: int, seconds: float) -> None:
    """Call the model in a loop, with a worker's options, and print the calls per second."""
    # Imported only in the measuring process.
    import numpy as np  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    from runtime.worker.sessions import session_options  # noqa: PLC0415

    session = onnxruntime.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])
    values = {"x": np.arange(elements, dtype=np.float32).reshape(1, elements)}
    for _ in range(WARM_UP_CALLS):
        session.run(None, values)
    calls, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        for _ in range(CALLS_AT_ONCE):
            session.run(None, values)
        calls += CALLS_AT_ONCE
    print(calls / took)


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
            _print_calls(arguments[0], int(arguments[1]), float(arguments[2]))
        case "reply":
            import uvloop  # noqa: PLC0415 - see `_serve_reply`

            uvloop.run(_serve_reply())
        case _:
            raise SystemExit(f"no baseline is called {kind!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
