"""The cost of records: one server with each model under three names, of which it records two, in turn.

Two processes of the same server differ by up to a tenth, so that two servers are not compared.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import baselines, driver, generator, models
from bench.driver import Server
from bench.inference import LARGE, OPTIONS, SMALL
from bench.models import NETWORKS
from bench.requests import Request, Target, add_one_inputs
from bench.table import Row, rate_row

OFF, DIGESTS, TENSORS = "off", "digests", "tensors"
TABLES = "".join(f'[[record]]\nmodels = ["*-{what}"]\nwhat = "{what}"\n' for what in (DIGESTS, TENSORS))
CLIENTS = 8
CNN = next(network for network in NETWORKS if network.name == "cnn")
FLOATS = "16 floats"
GOALS = {(FLOATS, DIGESTS): 0.90, (CNN.what, DIGESTS): 0.97}
Requests = Mapping[str, Mapping[str, Request]]
"""By what is asked, and by what is recorded of it."""


def measure(folder: Path, *, rounds: int, seconds: float) -> list[Row]:
    """Measure each request in every round, recorded and not, one after the other; medians of the ratios.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each measurement, after its warm-up.
    """
    rates = defaultdict[tuple[str, str], list[float]](list)
    config = folder / "server.toml"
    config.write_text(TABLES)
    with driver.running(folder, *OPTIONS, f"--config={config}") as server:
        target, requests = Target("ours", server.port, server.token), _load(server)
        for index in range(rounds):
            for what, by_record in requests.items():
                names = (OFF, DIGESTS, TENSORS)
                for name in (*names[index % 3 :], *names[: index % 3]):
                    by_record[name].check(target)
                    request = by_record[name].write(target, folder)
                    result = generator.measure_rate(target.port, request, clients=CLIENTS, seconds=seconds)
                    rates[what, name].append(result.per_s)
    return list(_rows(rates, list(requests)))


def _load(server: Server) -> Requests:
    requests = defaultdict[str, dict[str, Request]](dict)
    network = CNN.build()
    for name in (OFF, DIGESTS, TENSORS):
        one, cnn = f"{models.ADD_ONE}-{name}", f"{CNN.name}-{name}"
        models.write(server.repository, one, models.add_one())
        path = models.write(server.repository, cnn, network)
        server.load(one)
        server.load(cnn)
        for what, elements in ((FLOATS, SMALL), ("600 KB", LARGE)):
            inputs = add_one_inputs(elements)
            requests[what][name] = Request(one, inputs, [inputs["x"][0] + 1], binary=True)
        values = CNN.values()
        outputs = baselines.measure_calls(path, values, threads=baselines.THREADS, seconds=0.01).outputs
        requests[CNN.what][name] = Request(cnn, values, outputs, binary=True)
    return requests


def _rows(rates: Mapping[tuple[str, str], Sequence[float]], requests: Sequence[str]) -> Iterator[Row]:
    for name in (DIGESTS, TENSORS):
        for what in requests:
            label = f"{what}, {CLIENTS} clients, {name} of all ÷ not recorded"
            yield rate_row(label, rates[what, name], rates[what, OFF], GOALS.get((what, name)))
