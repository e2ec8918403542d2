"""Ten loads that are asked for at once, beside bare first sessions of the same files one after the other."""

from datetime import datetime
from statistics import median

from bench import bare, driver, models
from bench.driver import Server
from bench.table import Row

LOADS = 10


def measure(server: Server, *, rounds: int) -> list[Row]:
    """Load ten networks at once, each new to the server, in each of the rounds; medians of these.

    The time of a load is that from its acceptance, which is what 202 says, to its `ModelLoaded`, on the
    ledger's clock.
    """
    network = models.convnet()
    ours, bares = zip(*(_round(server, network, index) for index in range(rounds)), strict=True)
    first, half, last = (median(figures) for figures in zip(*map(_ranks, ours), strict=True))
    one, all_of_them = median(map(median, bares)), median(map(sum, bares))
    name = f"{LOADS} loads of {len(network) / 1e6:.0f} MB at once, 202 to ready"
    return [
        Row(f"{name}: first ÷ one bare session", _ms(first), _ms(one), first / one),
        Row(f"{name}: median ÷ one bare session", _ms(half), _ms(one), half / one),
        Row(f"{name}: last ÷ {LOADS} bare in turn", _ms(last), _ms(all_of_them), last / all_of_them),
    ]


def _round(server: Server, network: bytes, index: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of our loads, and of bare sessions of the same files."""
    ids = [f"queued-{index:02}-{number}" for number in range(LOADS)]
    paths = [models.write(server.repository, model_id, models.renamed(network, model_id)) for model_id in ids]
    before = _at_once(server, ids) if index % 2 == 0 else None
    bares = [bare.run(path) for path in paths]
    ours = before or _at_once(server, ids)
    for path in paths:  # the next round brings as many again
        path.unlink()
    return ours, bares


def _at_once(server: Server, ids: list[str]) -> list[float]:
    paths = [f"/api/v1/models/{model_id}/load" for model_id in ids]
    connections = [server.connect() for _ in paths]
    for connection, path in zip(connections, paths, strict=True):
        server.send(connection, "POST", path, headers=driver.WAIT)
    took_ms = []
    for connection, path in zip(connections, paths, strict=True):
        job = driver.completed_job(driver.read(connection), path)
        took = datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["created_at"])
        took_ms.append(took.total_seconds() * 1000)
        connection.close()
    for model_id in ids:
        server.unload(model_id)
    return took_ms


def _ranks(took_ms: list[float]) -> tuple[float, float, float]:
    return min(took_ms), median(took_ms), max(took_ms)


def _ms(value: float) -> str:
    return f"{value:.0f} ms"
