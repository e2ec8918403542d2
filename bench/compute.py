"""Inferences of models that compute, beside a bare session in one process and Triton; many models at once."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import baselines, driver, generator, models, peers
from bench.driver import Server
from bench.inference import OPTIONS, OURS, TRITON
from bench.models import NETWORKS, Network
from bench.requests import Request, Target
from bench.table import Row, rate_row

BARE = "bare session"
BARE_GOAL, TRITON_GOAL = 0.90, 1.0
GOAL_CLIENTS = 8
"""Goals are for so many clients, in binary: then there is always a next request to compute."""
BUSY_MODELS = 8
BUSY_GOAL = 0.95
ONE_THREAD = "--threads=1"


@dataclass(frozen=True, slots=True, eq=False)
class ComputeCase:
    """A network, whether its tensors are binary, and how many clients."""

    network: Network
    binary: bool
    clients: int

    def __str__(self) -> str:
        form, plural = "binary" if self.binary else "JSON", "s" * (self.clients > 1)
        return f"{self.network.what}, {form}, {self.clients} client{plural}"


CASES = tuple(
    ComputeCase(network, binary, clients)
    for network in NETWORKS
    if network.name in {"cnn", "mlp"}
    for binary in (True, False)
    for clients in (1, 8)
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A network that all servers have loaded.

    Args:
        path: Its file.
        requests: An inference of it, in binary or not.
    """

    path: Path
    requests: Mapping[bool, Request]


def measure(folder: Path, *, rounds: int, seconds: float, peers_at: Path | None) -> list[Row]:
    """Measure each network on each server in every round, and bare; the medians of the rounds' ratios.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each measurement, after its warm-up.
        peers_at: The environment that Triton is installed in; without it nothing is said of Triton.
    """
    networks = {case.network.name: case.network for case in CASES}
    contents = {name: network.build() for name, network in networks.items()}
    with ExitStack() as stack:
        server = stack.enter_context(driver.running(folder, *OPTIONS))
        targets = [Target(OURS, server.port, server.token)]
        if peers_at is not None:
            triton = peers.running(peers_at, folder, contents, threads=baselines.THREADS)
            targets.append(Target(TRITON, stack.enter_context(triton)))
        subjects = {name: _load(server, networks[name], content) for name, content in contents.items()}
        for subject in subjects.values():
            for request in subject.requests.values():
                for target in targets:
                    request.check(target)
        rates = defaultdict[tuple[str, ComputeCase], list[float]](list)
        for index in range(rounds):
            turned = [*targets[index % len(targets) :], *targets[: index % len(targets)]]
            for name, case, per_s in _round(turned, subjects, folder, seconds):
                rates[name, case].append(per_s)
    return list(_rows(rates))


def _load(server: Server, network: Network, content: bytes) -> Subject:
    """Load it, and have a bare session compute what right answers are."""
    path = models.write(server.repository, network.name, content)
    server.load(network.name)
    inputs = network.values()
    outputs = baselines.measure_calls(path, inputs, threads=baselines.THREADS, seconds=0.01).outputs
    requests = {binary: Request(network.name, inputs, outputs, binary=binary) for binary in (True, False)}
    return Subject(path, requests)


def _round(
    targets: Sequence[Target], subjects: Mapping[str, Subject], folder: Path, seconds: float
) -> Iterator[tuple[str, ComputeCase, float]]:
    """Measure everything once; yield who, the case, and answers a second."""
    for case in CASES:
        subject, inputs = subjects[case.network.name], case.network.values()
        calls = baselines.measure_calls(subject.path, inputs, threads=baselines.THREADS, seconds=seconds)
        yield BARE, case, calls.per_s
        for target in targets:
            request = subject.requests[case.binary].write(target, folder)
            yield target.name, case, _rate(target, [request], case.clients, seconds)


def _rate(target: Target, requests: Sequence[Path], clients: int, seconds: float) -> float:
    return generator.measure_rate(target.port, *requests, clients=clients, seconds=seconds).per_s


def _rows(rates: Mapping[tuple[str, ComputeCase], Sequence[float]]) -> Iterator[Row]:
    for name, goal in ((BARE, BARE_GOAL), (TRITON, TRITON_GOAL)):
        for case in CASES:
            if beside := rates.get((name, case)):
                has_goal = case.binary and case.clients == GOAL_CLIENTS
                yield rate_row(f"{case} ÷ {name}", rates[OURS, case], beside, goal if has_goal else None)


def measure_many(folder: Path, *, rounds: int, seconds: float) -> list[Row]:
    """Infer with eight loaded networks at once, one client each, beside workers of one thread.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each measurement, after its warm-up.
    """
    network = NETWORKS[0]
    content = network.build()
    names = [f"{network.name}-{number}" for number in range(BUSY_MODELS)]
    rates = defaultdict[tuple[str, int], list[float]](list)
    with ExitStack() as stack:
        targets = []
        for name, options in ((OURS, OPTIONS), (ONE_THREAD, (*OPTIONS, ONE_THREAD))):
            server = stack.enter_context(driver.running(folder / name.strip("-"), *OPTIONS, *options))
            for model_id in names:
                models.write(server.repository, model_id, models.renamed(content, model_id))
                server.load(model_id)
            targets.append(Target(name, server.port, server.token))
        for index in range(rounds):
            for target in targets if index % 2 == 0 else targets[::-1]:
                for busy in (1, BUSY_MODELS):
                    paths = [
                        Request(name, network.values(), (), binary=True).write(target, folder)
                        for name in names[:busy]
                    ]
                    rates[target.name, busy].append(_rate(target, paths, busy, seconds))
    return [
        rate_row(
            f"{busy} busy {network.what}{'s' * (busy > 1)}, a client each ÷ with 1 thread each",
            rates[OURS, busy],
            rates[ONE_THREAD, busy],
            BUSY_GOAL if busy > 1 else None,
        )
        for busy in (1, BUSY_MODELS)
    ]
