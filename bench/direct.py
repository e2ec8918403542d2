"""The model called directly: what an inference costs in a process that does nothing else.

`python -m bench.direct MODEL ELEMENTS SECONDS` prints how many calls a second one thread makes.
"""

import subprocess
import sys
import time
from pathlib import Path

WARM_UP_CALLS = 100
# Between two looks at the clock; 600 KB take some 0.1 ms a call.
CALLS_AT_ONCE = 20


def run(model: Path, elements: int, *, seconds: float) -> float:
    """Measure in a process of its own and return the calls per second."""
    done = subprocess.run(  # noqa: S603 - our own module and a path of ours
        [sys.executable, "-m", "bench.direct", str(model), str(elements), str(seconds)],
        stdout=subprocess.PIPE,
        timeout=seconds + 60,
        check=True,
    )
    return float(done.stdout)


def main(model: str, elements: int, seconds: float) -> None:
    """Call the model in a loop, with a worker's options, and print the calls per second."""
    # Only the process that measures pays for these.
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
