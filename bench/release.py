"""Does an unload return the memory? That of the process tree beside a process that deletes its session."""

from http import HTTPStatus

from bench import baselines, models
from bench.driver import Server
from bench.models import NETWORKS
from bench.requests import LENGTH, encode
from bench.table import Row, format_mb
from runtime.memory import tree_bytes

MODEL = "release"
INFERENCES = 10
"""Enough that ONNX Runtime's arena has what it needs for more of them."""


def measure(server: Server) -> list[Row]:
    """Load the CNN, infer and let go of it: through the server, and in one process."""
    network = NETWORKS[0]
    path = models.write(server.repository, MODEL, network.build())
    beside = baselines.measure_release(path, network.values(), inferences=INFERENCES)
    ours = [tree_bytes(server.pid)]
    server.load(MODEL)
    head_bytes, body = encode(network.values(), binary=True)
    for _ in range(INFERENCES):
        answer = server.ask("POST", f"/v2/models/{MODEL}/infer", body, {LENGTH: str(head_bytes)})
        if answer.status != HTTPStatus.OK:
            raise SystemExit(str(answer))
    ours.append(tree_bytes(server.pid))
    server.unload(MODEL)
    ours += [tree_bytes(server.pid)] * 2
    names = (
        "before the model",
        f"with it, after {INFERENCES} inferences",
        "after the unload ÷ after del session",
        "after the unload ÷ after malloc_trim as well",
    )
    return [
        Row(f"54 MB {network.what}: memory {name}", format_mb(one), format_mb(other), one / other)
        for name, one, other in zip(names, ours, beside, strict=True)
    ]
