"""Inferences per second, beside a constant response, the model called directly, and Triton."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import baselines, driver, generator, models, peers
from bench.generator import Result
from bench.requests import Request, Target, add_one_inputs, add_one_request
from bench.table import Row

# As many as no machine answers: it is counted against, like any limit.
OPTIONS = ("--limit-inference", "100000000/minute")
OURS, CONSTANT, TRITON = "ours", "constant reply", "Triton"
SMALL, LARGE, LARGER = 16, 150_000, 600_000
"""Elements of four bytes: 64 bytes, where the server's own work counts; 600 KB and 2.4 MB: copies do."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Required share of a peer's rate, and the share below which the work is not done."""

    ratio: float
    not_done: float

    def __str__(self) -> str:
        return f"≥ {self.ratio:.1f} (< {self.not_done:.2f}: not done)"


@dataclass(frozen=True, slots=True)
class Case:
    """A measured case: request, number of clients, and peers.

    Args:
        what: Its name in the table.
        elements: Of the request's tensor.
        clients: Connections with one request in flight each.
        beside: The servers and what is wanted beside each; Triton is asked only when it is there.
        binary: In and out as raw bytes rather than as JSON.
    """

    what: str
    elements: int
    clients: int
    beside: Mapping[str, Goal | None]
    binary: bool = True

    @property
    def request(self) -> Request:
        """Return the request."""
        return add_one_request(self.elements, binary=self.binary)


AS_TRITON = Goal(1.0, 0.75)
PAST_TRITON = Goal(2.0, 0.75)
CASES = (
    Case("16 floats, 1 client", SMALL, 1, {CONSTANT: None, TRITON: AS_TRITON}),
    Case(
        "16 floats, 8 clients",
        SMALL,
        8,
        {CONSTANT: Goal(0.6, 0.45), TRITON: AS_TRITON},
    ),
    Case(
        "16 floats in JSON, 8 clients",
        SMALL,
        8,
        {CONSTANT: None, TRITON: None},
        binary=False,
    ),
    Case("600 KB, 1 client", LARGE, 1, {TRITON: PAST_TRITON}),
    Case("600 KB, 8 clients", LARGE, 8, {TRITON: PAST_TRITON}),
    Case("2.4 MB, 1 client", LARGER, 1, {TRITON: None}),
    Case("2.4 MB, 8 clients", LARGER, 8, {TRITON: None}),
)
Rates = Mapping[tuple[str, str], Result]
"""Rates, by the names of case and server."""


def measure(folder: Path, *, rounds: int, seconds: float, peers_at: Path | None) -> list[Row]:
    """Measure each case for `seconds` in each round, one server after the other; medians.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each measurement, after its warm-up.
        peers_at: The environment that Triton is installed in; without it nothing is said of Triton.
    """
    with ExitStack() as stack:
        server = stack.enter_context(driver.running(folder, *OPTIONS))
        model = models.write(server.repository, models.ADD_ONE, models.add_one())
        server.load(models.ADD_ONE)
        targets = [Target(OURS, server.port, server.token)]
        targets.append(Target(CONSTANT, stack.enter_context(baselines.constant_reply())))
        if peers_at is not None:
            served = {models.ADD_ONE: models.add_one()}
            triton = stack.enter_context(peers.running(peers_at, folder, served, threads=1))
            targets.append(Target(TRITON, triton))
        rates = _alternated(targets, folder, rounds, seconds)
        calls = _direct(model, rounds, seconds)
    return list(_rows(rates, calls))


def _alternated(targets: Sequence[Target], folder: Path, rounds: int, seconds: float) -> Rates:
    """Measure all cases on all servers in every round; each round begins with another server."""
    for case in CASES:
        for target in _select_targets(case, targets):
            if target.name != CONSTANT:
                case.request.check(target)
    results = defaultdict[tuple[str, str], list[Result]](list)
    for index in range(rounds):
        turned = [*targets[index % len(targets) :], *targets[: index % len(targets)]]
        for case in CASES:
            for target in _select_targets(case, turned):
                results[case.what, target.name].append(_run(case, target, folder, seconds))
    return {key: _median(measured) for key, measured in results.items()}


def _select_targets(case: Case, targets: Sequence[Target]) -> list[Target]:
    return [target for target in targets if target.name in {OURS, *case.beside}]


def _run(case: Case, target: Target, folder: Path, seconds: float) -> Result:
    request = case.request.write(target, folder)
    return generator.measure_rate(target.port, request, clients=case.clients, seconds=seconds)


def _direct(model: Path, rounds: int, seconds: float) -> dict[int, float]:
    """Return the direct calls per second, by elements."""
    return {
        elements: median(
            baselines.measure_calls(model, add_one_inputs(elements), threads=1, seconds=seconds).per_s
            for _ in range(rounds)
        )
        for elements in (SMALL, LARGE, LARGER)
    }


def _median(results: Sequence[Result]) -> Result:
    return Result(
        median(result.per_s for result in results),
        median(result.p50_ms for result in results),
        median(result.p99_ms for result in results),
    )


def _rows(rates: Rates, calls: Mapping[int, float]) -> Iterator[Row]:
    for name in (CONSTANT, TRITON):
        for case in CASES:
            if beside := rates.get((case.what, name)):
                yield _row(case, name, rates[case.what, OURS], beside)
    for case in CASES:
        ours, direct_per_s = rates[case.what, OURS], calls[case.elements]
        what = f"{case.what} ÷ the model called directly"
        yield Row(what, _told(ours), f"{direct_per_s:,.0f}/s", ours.per_s / direct_per_s)


def _row(case: Case, name: str, ours: Result, beside: Result) -> Row:
    what, ratio, goal = f"{case.what} ÷ {name}", ours.per_s / beside.per_s, case.beside[name]
    if goal is None:
        return Row(what, _told(ours), _told(beside), ratio)
    return Row(what, _told(ours), _told(beside), ratio, str(goal), ratio >= goal.ratio)


def _told(result: Result) -> str:
    return f"{result.per_s:,.0f}/s, p99 {result.p99_ms:.2f} ms"
