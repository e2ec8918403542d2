"""The cost of a forwarded inference, with two nodes over one ledger: one has the model, the other forwards.

The client, both nodes, the worker and the database share these cores.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import generator, models
from bench.inference import LARGE, SMALL
from bench.nodes import NAMES, Fleet
from bench.postgres import Postgres
from bench.requests import Target, add_one_request
from bench.table import Row, format_ms


@dataclass(frozen=True, slots=True)
class Case:
    """A measured case, and the goal for what forwarding adds to the median latency of one client."""

    what: str
    elements: int
    goal_ms: float


CASES = (Case("64 B, 1 client", SMALL, 1.0), Case("600 KB, 1 client", LARGE, 3.5))
HERE, FORWARDED = "at the node", "forwarded"


def measure(folder: Path, database: Postgres, *, rounds: int, seconds: float) -> list[Row]:
    """Measure each case for `seconds` at each node in each round; medians.

    Args:
        folder: Does not exist yet.
        database: Where the nodes' ledger is made.
        rounds: How often.
        seconds: Of each measurement, after its warm-up.
    """
    folder.mkdir()
    fleet = Fleet(folder, database.create_ledger())
    fleet.repository.mkdir()
    models.write(fleet.repository, models.ADD_ONE, models.add_one())
    try:
        owner = fleet.start(NAMES[0])
        owner.load(models.ADD_ONE)  # here, as no other node is there yet
        other = fleet.start(NAMES[1])
        targets = [Target(HERE, owner.port, owner.token), Target(FORWARDED, other.port, owner.token)]
        rows = [_measure(case, targets, folder, rounds, seconds) for case in CASES]
        for name in list(fleet.nodes):
            fleet.stop(name)
        return rows
    finally:
        for name in list(fleet.nodes):
            fleet.kill(name)


def _measure(case: Case, targets: Sequence[Target], folder: Path, rounds: int, seconds: float) -> Row:
    request = add_one_request(case.elements, binary=True)
    p50_ms = defaultdict[str, list[float]](list)
    for index in range(rounds):
        for target in targets if index % 2 else reversed(targets):
            request.check(target)
            path = request.write(target, folder)
            result = generator.measure_rate(target.port, path, clients=1, seconds=seconds)
            p50_ms[target.name].append(result.p50_ms)
    here, there = median(p50_ms[HERE]), median(p50_ms[FORWARDED])
    return Row(
        f"inference of {case.what}, forwarded ÷ at the node that has the model",
        f"p50 {format_ms(there, decimals=2)}, {there - here:+.2f}",
        f"p50 {format_ms(here, decimals=2)}",
        there / here,
        f"≤ +{case.goal_ms:g} ms",
        there - here <= case.goal_ms,
    )
