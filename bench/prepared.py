"""Prepared models: what later loads take beside bare first sessions, what they cost, and what they give."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from bench import bare, driver, steady
from bench.bare import THROWN_AWAY
from bench.driver import Server
from bench.loads import ABOVE_GOAL_MS, RATIO_GOAL
from bench.networks import Network
from bench.subject import Subject, prepared, tried
from bench.table import Row
from runtime.cache.store import FOLDER, ModelCache
from runtime.repository import MODEL_FILE
from runtime.worker.loading import huge_pages_help

OPTIONS = (*driver.UNLIMITED, "--warm-up=off")
LATER_GOAL, MEAN_GOAL = 1.0, 0.5
MANY = 9_000_000_000
"""More events than there are."""


@dataclass(frozen=True, slots=True)
class Loads:
    """Milliseconds until a model is ready, medians."""

    first: float
    later: float
    bare: float


def measure(
    folder: Path, networks: Iterable[Network], *, repeats: int, rounds: int, seconds: float
) -> list[Row]:
    """Measure each network, at a server that prepares and one that does not.

    Args:
        folder: An empty directory.
        networks: Which.
        repeats: Loads of each kind to take the median of.
        rounds: Pairs of workers whose inferences are compared.
        seconds: For how long, in each round.
    """
    rows: list[Row] = []
    ratios: list[float] = []
    with ExitStack() as stack:
        plain = stack.enter_context(driver.running(folder / "plain", *OPTIONS, "--prepare=off"))
        server = stack.enter_context(driver.running(folder / "preparing", *OPTIONS, "--prepare=on"))
        store = ModelCache(folder / "preparing" / "data" / FOLDER, limit_bytes=0)
        tried(store, driver.TINY)
        for network in networks:
            subject = prepared(network, server, plain, store)
            loads = _loads(subject, repeats)
            ratios.append(loads.later / loads.bare)
            rows += _load_rows(subject, loads)
            rows.append(steady.inference_row(subject, rounds, seconds))
            rows += [*steady.memory_rows(subject), *_cost_rows(subject)]
    mean, number = geometric_mean(ratios), len(ratios)
    name = f"later load ÷ bare first session, geometric mean of {number} network{'s' * (number > 1)}"
    return [*rows, Row(name, "", "", mean, f"≤ {MEAN_GOAL:.2f}", mean <= MEAN_GOAL)]


def _loads(subject: Subject, repeats: int) -> Loads:
    """Load it for the first time, again, and bare, in turn; check that the prepared form was used."""
    model = subject.network.name
    new = [f"{model}-{number:03}" for number in range(repeats + THROWN_AWAY)]
    for name in new:
        _link(subject.plain.repository, model, name)
    rounds = [_round(subject, number, name) for number, name in enumerate(new)]
    path = f"/api/v1/events?type=ModelLoaded&model={model}&before={MANY}&limit={repeats}"
    for event in subject.server.ask("GET", path).json()["events"]:
        used = event["data"]["prepared"]
        if (used and used["sha256"]) != subject.entry.sha256:
            raise SystemExit(f"a later load of {model} used {used}, where there is {subject.entry}")
    return Loads(*(median(took_ms) for took_ms in zip(*rounds[THROWN_AWAY:], strict=True)))


def _round(subject: Subject, number: int, new: str) -> tuple[float, float, float]:
    """Return the milliseconds of a first, a later and a bare load, each round beginning with another."""
    huge = huge_pages_help(subject.bytes, None)
    environment = bare.WORKER_ENVIRONMENT if huge else bare.PLAIN_ENVIRONMENT  # as a bare worker has them
    steps = (
        lambda: _loaded(subject.plain, new),
        lambda: _loaded(subject.server, subject.network.name),
        lambda: bare.run(subject.path, inferences=0, environment=environment),
    )
    took = {index % 3: steps[index % 3]() for index in range(number, number + 3)}
    return took[0], took[1], took[2]


def _link(repository: Path, model: str, new: str) -> None:
    """Have a model's file be that of another, too, of which the server has never heard.

    That changes the file's ctime: if it was loaded, its hash is known no longer.
    """
    path = repository / new / "1" / MODEL_FILE
    path.parent.mkdir(parents=True)
    path.hardlink_to(repository / model / "1" / MODEL_FILE)


def _loaded(server: Server, model_id: str) -> float:
    took_ms = server.load(model_id)
    server.unload(model_id)
    return took_ms


def _load_rows(subject: Subject, loads: Loads) -> list[Row]:
    first, later, beside = loads.first, loads.later, loads.bare
    reached = first <= max(beside * RATIO_GOAL, beside + ABOVE_GOAL_MS)
    goal = f"≤ {RATIO_GOAL:.2f} or + {ABOVE_GOAL_MS:.0f} ms"
    ratio = later / beside
    return [
        Row(
            f"{subject.label}: first load ÷ bare first session",
            _ms(first),
            _ms(beside),
            first / beside,
            goal,
            reached,
        ),
        Row(
            f"{subject.label}: later load, {subject.form} ÷ bare first session",
            _ms(later),
            _ms(beside),
            ratio,
            f"≤ {LATER_GOAL:.2f}",
            ratio <= LATER_GOAL,
        ),
    ]


def _cost_rows(subject: Subject) -> Iterator[Row]:
    entry = subject.entry
    yield Row(
        f"{subject.label}: what preparing took; disk, {subject.form} ÷ the model's files",
        f"{entry.took_ms / 1000:.1f} s, {steady.mb(entry.bytes)}",
        steady.mb(subject.bytes),
        entry.bytes / subject.bytes,
    )
    for form, reason in entry.tried.items():
        yield Row(f"{subject.label}: not {form}: {reason}", "", "", None)


def _ms(value: float) -> str:
    return f"{value:.1f} ms"
