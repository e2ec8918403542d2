"""Benefit and cost of prepared models: later loads, inferences, memory, disk."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from statistics import geometric_mean, median

from bench import baselines, driver, models
from bench.baselines import THROWN_AWAY
from bench.driver import Server
from bench.models import Network
from bench.requests import LENGTH, Body, encode
from bench.table import Row, format_mb, format_ms
from runtime.memory import PROC, list_workers, parse_field, parse_private
from runtime.optimised.store import Manifest, OptimisedStore
from runtime.store.folder import STORE
from runtime.worker.loading import huge_pages_help

# Three processes at low priority: some seconds, where nothing else runs.
PREPARING_LIMIT_S = 900.0
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Subject:
    """A network that one server prepares and the other does not.

    Args:
        network: Which.
        path: Its file, at the server that prepares.
        server: The server that prepares.
        plain: The server that does not.
        entry: What preparing came to.
    """

    network: Network
    path: Path
    server: Server
    plain: Server
    entry: Manifest

    @property
    def bytes(self) -> int:
        """Return the size of the model's files."""
        return self.path.stat().st_size

    @property
    def form(self) -> str:
        """Return what later loads use."""
        return "bare" if self.entry.reason is not None else "prepared"

    @property
    def label(self) -> str:
        """Return its name in the table."""
        return f"{self.bytes / 1e6:.0f} MB {self.network.what}"


def prepare_network(network: Network, server: Server, plain: Server, store: OptimisedStore) -> Subject:
    """Put a network into both repositories, and wait until it is prepared; nothing is loaded then."""
    content = network.build()
    path = models.write(server.repository, network.name, content)
    models.write(plain.repository, network.name, content)
    for repository in (server.repository, plain.repository):
        (repository / network.name / "loadledger.toml").write_text("[warm_up]\nenabled = false\n")
    server.load(network.name)
    entry = wait_until_prepared(store, network.name)
    server.unload(network.name)
    return Subject(network, path, server, plain, entry)


def wait_until_prepared(store: OptimisedStore, model_id: str) -> Manifest:
    """Wait until `loadledger prepared list` shows a loaded model.

    Not before is the server done with it: its workers that prepare would be measured with the others.
    """
    until = time.monotonic() + PREPARING_LIMIT_S
    while time.monotonic() < until:
        found = next((entry for entry in store.entries() if entry.model_id == model_id), None)
        if found is not None:
            return found
        time.sleep(LOOK_S)
    raise SystemExit(
        f"{model_id} is not prepared after {PREPARING_LIMIT_S:.0f} s: preparing waits for spare time"
        " and memory, and this machine may have none"
    )


OPTIONS = driver.UNLIMITED
LATER_GOAL, MEAN_GOAL = 1.0, 0.5


@dataclass(frozen=True, slots=True)
class Loads:
    """Milliseconds until a model is ready, medians."""

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
        plain = stack.enter_context(driver.running(folder / "plain", *OPTIONS, "--prepared-size=off"))
        server = stack.enter_context(driver.running(folder / "preparing", *OPTIONS, "--prepared-size=20GB"))
        store = OptimisedStore(folder / "preparing" / "data" / STORE, limit_bytes=0)
        wait_until_prepared(store, driver.TINY)
        for network in networks:
            subject = prepare_network(network, server, plain, store)
            loads = _loads(subject, repeats)
            ratios.append(loads.later / loads.bare)
            rows += [_later_row(subject, loads), inference_row(subject, rounds, seconds)]
            rows += [*memory_rows(subject), *_cost_rows(subject)]
    mean, number = geometric_mean(ratios), len(ratios)
    name = f"later load ÷ bare first session, geometric mean of {number} network{'s' * (number > 1)}"
    return [*rows, Row(name, "", "", mean, f"≤ {MEAN_GOAL:.2f}", mean <= MEAN_GOAL)]


def _loads(subject: Subject, repeats: int) -> Loads:
    """Load it again, and bare, in turn; check that the prepared model was used."""
    model = subject.network.name
    rounds = [_round(subject, ours_first=number % 2 == 0) for number in range(repeats + THROWN_AWAY)]
    for data in subject.server.newest_events(f"type=ModelLoaded&model={model}", repeats):
        used = data["prepared"]
        if (used and used["sha256"]) != subject.entry.sha256:
            raise SystemExit(f"a later load of {model} used {used}, where there is {subject.entry}")
    return Loads(*(median(took_ms) for took_ms in zip(*rounds[THROWN_AWAY:], strict=True)))


def _round(subject: Subject, *, ours_first: bool) -> tuple[float, float]:
    """Return the milliseconds of a later and of a bare load."""
    huge = huge_pages_help(subject.bytes, None)
    environment = (
        baselines.WORKER_ENVIRONMENT if huge else baselines.PLAIN_ENVIRONMENT
    )  # as a bare worker has them
    before = _loaded(subject.server, subject.network.name) if ours_first else None
    bare = baselines.measure_session(subject.path, inferences=0, environment=environment)
    return before or _loaded(subject.server, subject.network.name), bare


def _loaded(server: Server, model_id: str) -> float:
    took_ms = server.load(model_id)
    server.unload(model_id)
    return took_ms


def _later_row(subject: Subject, loads: Loads) -> Row:
    ratio = loads.later / loads.bare
    return Row(
        f"{subject.label}: later load, {subject.form} ÷ bare first session",
        format_ms(loads.later, decimals=1),
        format_ms(loads.bare, decimals=1),
        ratio,
        f"≤ {LATER_GOAL:.2f}",
        ratio <= LATER_GOAL,
    )


def _cost_rows(subject: Subject) -> Iterator[Row]:
    entry = subject.entry
    yield Row(
        f"{subject.label}: what preparing took; disk, {subject.form} ÷ the model's files",
        f"{entry.took_ms / 1000:.1f} s, {format_mb(entry.bytes)}",
        format_mb(subject.bytes),
        entry.bytes / subject.bytes,
    )
    if entry.reason is not None:
        yield Row(f"{subject.label}: not prepared: {entry.reason}", "", "", None)


MIN_INFERENCES = 10
INSTANCES = 4
RATE_GOAL = 0.97
# Of models that are large enough for their weights to be most of what a worker takes.
SHARED_FROM_BYTES, OF_ONE_GOAL, OF_BARE_GOAL = 50_000_000, 1.6, 0.5
ONCE = "[warm_up]\nenabled = true\n"
"""As `loadledger.toml`: memory is measured of workers that have run once."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of some workers in bytes: private, and with a share of what processes have in common."""

    private: int
    proportional: int


def inference_row(subject: Subject, rounds: int, seconds: float) -> Row:
    """Compare the quickest inferences of workers that are new in each round; medians of these."""
    quickest = [_quickest_s(subject, seconds) for _ in range(rounds)]
    ours, beside = (1 / median(each) for each in zip(*quickest, strict=True))
    name = f"{subject.label}: inferences a second, {subject.form} ÷ bare"
    rates = f"{ours:,.1f}", f"{beside:,.1f}"
    return Row(name, *rates, ours / beside, f"≥ {RATE_GOAL:.2f}", ours / beside >= RATE_GOAL)


def _quickest_s(subject: Subject, seconds: float) -> tuple[float, float]:
    """Send requests to both servers in turn; return the shortest time of each."""
    both, network = (subject.server, subject.plain), subject.network
    request = encode(network.values(), binary=True)
    for server in both:
        server.load(network.name)
    if len({_outputs(_answer(server, network, request)) for server in both}) > 1:
        raise SystemExit(f"{network.name} answers otherwise when it is {subject.form}")
    took: list[tuple[float, ...]] = []
    until = time.monotonic() + 2 * seconds
    while len(took) < MIN_INFERENCES or time.monotonic() < until:
        took.append(tuple(_took_s(server, network, request) for server in both))
    for server in both:
        server.unload(network.name)
    ours, beside = map(min, zip(*took, strict=True))
    return ours, beside


def _took_s(server: Server, network: Network, request: Body) -> float:
    start = time.perf_counter()
    _answer(server, network, request)
    return time.perf_counter() - start


def _answer(server: Server, network: Network, request: Body) -> bytes:
    head_bytes, content = request
    headers = {LENGTH: str(head_bytes), "Content-Type": "application/octet-stream"}
    path = f"/v2/models/{network.name}/infer"
    answer = server.ask("POST", path, content, headers)
    if answer.status != HTTPStatus.OK:
        raise SystemExit(f"POST {path}: {answer}")
    return answer.content


def _outputs(content: bytes) -> tuple[str, bytes]:
    """Return the description of a response's tensors, and their bytes, which follow the JSON."""
    head, end = json.JSONDecoder().raw_decode(content.decode("latin-1"))
    return str(head["outputs"]), content[end:]


def memory_rows(subject: Subject) -> list[Row]:
    """Compare the private memory of one worker, and the memory of several together."""
    one, four = (_memory(subject, subject.server, number) for number in (1, INSTANCES))
    bare_one, bare_four = (_memory(subject, subject.plain, number) for number in (1, INSTANCES))
    name = f"{subject.label}: private memory of a worker, {subject.form} ÷ bare"
    return [
        Row(name, format_mb(one.private), format_mb(bare_one.private), one.private / bare_one.private),
        _shared_row(subject, four, one, f"of 1 {subject.form}", OF_ONE_GOAL),
        _shared_row(subject, four, bare_four, f"of {INSTANCES} bare", OF_BARE_GOAL),
    ]


def _shared_row(subject: Subject, ours: Memory, beside: Memory, what: str, goal: float) -> Row:
    name = f"{subject.label}: memory of {INSTANCES} workers, {subject.form} ÷ {what}"
    sizes, ratio = (
        (format_mb(ours.proportional), format_mb(beside.proportional)),
        ours.proportional / beside.proportional,
    )
    if subject.bytes < SHARED_FROM_BYTES:
        return Row(name, *sizes, ratio)
    return Row(name, *sizes, ratio, f"≤ {goal:.2f}", ratio <= goal)


def _memory(subject: Subject, server: Server, instances: int) -> Memory:
    """Return the memory of so many workers of the model, each after one inference on zeros."""
    model = subject.network.name
    (server.repository / model / "loadledger.toml").write_text(ONCE)
    server.load(model, instances=instances)
    workers = list_workers(server.pid)
    texts = [(PROC / str(worker) / "smaps_rollup").read_text() for worker in workers]
    if len(texts) != instances:
        raise SystemExit(f"{model} has {len(texts)} workers and not {instances}")
    server.unload(model)
    return Memory(
        sum(map(parse_private, texts)),
        sum(parse_field(text, "Pss") for text in texts),
    )
