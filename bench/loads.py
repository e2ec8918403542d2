"""The first load of a model through the API, beside a bare first session of the same file."""

from pathlib import Path
from statistics import median

from bench import bare, models
from bench.bare import THROWN_AWAY
from bench.driver import Server
from bench.table import Row

RATIO_GOAL = 1.10
# Where a session is so quick that a tenth of it says nothing.
ABOVE_GOAL_MS = 15.0


def measure(server: Server, *, repeats: int) -> list[Row]:
    """Load `repeats` networks, each new to the server, alternated with bare sessions of the same files."""
    network = models.convnet()
    ids = [f"convnet-{index:02}" for index in range(repeats + THROWN_AWAY)]
    paths = [models.write(server.repository, model_id, models.renamed(network, model_id)) for model_id in ids]
    rounds = [
        _round(server, model_id, path, ours_first=index % 2 == 0)
        for index, (model_id, path) in enumerate(zip(ids, paths, strict=True))
    ]
    ours, same, plain = (median(figures) for figures in zip(*rounds[THROWN_AWAY:], strict=True))
    reached = ours <= max(same * RATIO_GOAL, same + ABOVE_GOAL_MS)
    name = f"first load, {len(network) / 1e6:.0f} MB network ÷ bare first session"
    goal = f"≤ {RATIO_GOAL:.2f} or + {ABOVE_GOAL_MS:.0f} ms"
    return [
        Row(name, _ms(ours), _ms(same), ours / same, goal, reached),
        Row(f"{name} without huge pages", _ms(ours), _ms(plain), ours / plain),
    ]


def _round(server: Server, model_id: str, path: Path, *, ours_first: bool) -> tuple[float, float, float]:
    """Return the milliseconds of our load and of both bare sessions; nothing stays loaded beside them."""
    before = _ours_ms(server, model_id) if ours_first else None
    same = bare.run(path)
    plain = bare.run(path, environment=bare.PLAIN_ENVIRONMENT)
    return before or _ours_ms(server, model_id), same, plain


def _ours_ms(server: Server, model_id: str) -> float:
    took_ms = server.load(model_id)
    server.unload(model_id)
    return took_ms


def _ms(value: float) -> str:
    return f"{value:.0f} ms"
