"""A bare first session: what loading costs with no server around it, in a process that does nothing else.

`python -m bench.bare MODEL` prints the milliseconds that the first `InferenceSession()` of the process took.
Run it as a program only: importing ONNX Runtime is what it does before it measures.
"""

import os
import sys
import time

import onnxruntime

from runtime.loading import options


def main(path: str) -> None:
    """Create the session with a worker's options, and print the milliseconds."""
    chosen = options(1)
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    took = time.perf_counter() - start
    print(took * 1000, flush=True)
    assert session.get_inputs()
    os._exit(0)  # taking the session apart is not measured, so it need not happen


if __name__ == "__main__":
    main(sys.argv[1])
