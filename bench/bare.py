"""A bare first session: what loading costs with no server around it, in a process that does nothing else.

`python -m bench.bare MODEL INFERENCES` prints the milliseconds that the first `InferenceSession()` of the
process took, with so many inferences on zeros: the first is the one that a worker warms its model up with.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.process.forkserver import ADDED

MALLOC = "GLIBC_TUNABLES"
# The workers' own, so that the figures differ by the server's own work alone.
WORKER_ENVIRONMENT = ADDED
# What a process has whose memory nobody tuned; telemetry and numpy's threads would disturb the measurement.
PLAIN_ENVIRONMENT = {name: value for name, value in ADDED.items() if name != MALLOC}
# Memory that a virtual machine has never touched costs its host a fault a page: 60 ms became 200 to 400. All
# files are written first, and some rounds thrown away, so that what is measured runs in touched memory.
THROWN_AWAY = 3
LIMIT_S = 120


def run(model: Path, *, inferences: int = 1, environment: dict[str, str] = WORKER_ENVIRONMENT) -> float:
    """Return the milliseconds of the first session of a fresh process that has imported ONNX Runtime before.

    Args:
        model: The file; it takes FP32 tensors.
        inferences: Run in that time; one is the warm-up alone, as in a worker, and 0 is none.
        environment: Variables that it gets beside ours.
    """
    inherited = {name: value for name, value in os.environ.items() if name != MALLOC}
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.bare", str(model), str(inferences)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=LIMIT_S,
    )
    return float(done.stdout)


def main(model: str, inferences: int) -> None:
    """Create the session with a worker's options, run it, and print the milliseconds."""
    # Only the process that measures pays for these, and before it measures.
    import onnxruntime  # noqa: PLC0415

    from runtime.worker.sessions import session_options  # noqa: PLC0415

    chosen = session_options(1)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    for _ in range(inferences):
        session.run(None, _zeros(session))
    took = time.perf_counter() - start
    print(took * 1000, flush=True)
    os._exit(0)  # taking the session apart is not measured, so it need not happen


def _zeros(session: Any) -> dict[str, Any]:
    """Return zeros of the declared shapes, made anew each time, as a worker's are; what is unknown is 1."""
    import numpy as np  # noqa: PLC0415

    shapes = {
        node.name: [size if isinstance(size, int) else 1 for size in node.shape]
        for node in session.get_inputs()
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
