"""First and later loads, from the request to ready, beside bare sessions of the same files, and parts."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import baselines, models
from bench.baselines import THROWN_AWAY, FileCosts
from bench.driver import Server
from bench.models import LARGE, Network
from bench.table import Row, format_mb, format_ms

RATIO_GOAL = 1.10
ABOVE_GOAL_MS = 15.0
"""For sessions so quick that a tenth of one is less than the noise."""
LATER_GOAL = 1.35
"""Of a second load, whose files are in the store and hashed."""
LARGE_REPEATS, LARGE_THROWN_AWAY = 3, 1
"""A round of a gigabyte takes half a minute, most of it to write the files."""
STAGES = {
    "first commit, looks": "waiting_us",
    "copying": "copying_us",
    "session": "loading_us",
    "warm-up": "warming_up_us",
    "measuring": "measuring_us",
    "hashing": "hashing_us",
}
"""Of a load, as `ModelLoaded` has them; hashing runs beside the session."""
COMMITS = re.compile(r"^loadledger_ledger_commit_duration_seconds_(count|sum) (\S+)$", re.MULTILINE)
SCRAPE_KEPT_S = 0.15
"""Longer than the server keeps an answer of `/metrics`."""
AS_SERVED, NO_WARM_UP = "", "[warm_up]\nenabled = false\n"
"""As `loadledger.toml`."""


@dataclass(frozen=True, slots=True)
class Round:
    """Two loads and a bare session of the same new files.

    Args:
        ours: Milliseconds from the request to ready.
        later: Those of the second load.
        bare: Milliseconds of the bare session, with as many inferences.
        plain: The same without huge pages.
        parts: Milliseconds of the parts of ours.
        costs: Of hashing and copying the files.
        bytes: Their size.
        written: Bytes that the server wrote for the load and its unload.
    """

    ours: float
    later: float
    bare: float
    plain: float
    parts: Mapping[str, float]
    costs: FileCosts
    bytes: int
    written: int


def measure(server: Server, networks: Iterable[Network], *, repeats: int) -> list[Row]:
    """Load files that are new to the server, `repeats` times each, alternated with bare sessions of them.

    Networks that the server warms up are loaded without a warm-up, too.
    """
    rows: list[Row] = []
    for network in networks:
        rounds = _rounds(server, network, repeats, AS_SERVED)
        rows += _rows(network, "first load", rounds)
        if rounds[0].parts["warm-up"]:
            rows += _rows(network, "first load, no warm-up", _rounds(server, network, repeats, NO_WARM_UP))
    return rows


def _rounds(server: Server, network: Network, repeats: int, settings: str) -> list[Round]:
    """Measure in turn; the first rounds are thrown away."""
    thrown_away = THROWN_AWAY
    if network is LARGE:
        repeats, thrown_away = min(repeats, LARGE_REPEATS), LARGE_THROWN_AWAY
    content, rounds = network.build(), list[Round]()
    for number in range(repeats + thrown_away):
        model_id = f"{network.name}-{'cold-' if settings else ''}{number:02}"
        path = models.write(server.repository, model_id, models.renamed(content, model_id))
        network.write_weights(path, number)
        (path.parents[1] / "loadledger.toml").write_text(settings)
        os.sync()  # none of it is written later, beside what is measured
        runs = bool(rounds) and rounds[-1].parts["warm-up"] > 0
        rounds.append(_round(server, model_id, path, ours_first=number % 2 == 0, runs=runs))
        for file in path.parent.iterdir():  # to save disk
            file.unlink()
    return rounds[thrown_away:]


def _round(server: Server, model_id: str, path: Path, *, ours_first: bool, runs: bool) -> Round:
    """Measure both; the bare session runs an inference if ours did, or as `runs` says if it comes first."""
    files = sorted(path.parent.iterdir())
    costs = baselines.measure_files(files, server.repository.parent)
    written_before = server.written_bytes()
    before = _load(server, model_id) if ours_first else None
    inferences = int(runs if before is None else before[1]["warm-up"] > 0)
    bare = baselines.measure_session(path, inferences=inferences)
    plain = baselines.measure_session(path, inferences=inferences, environment=baselines.PLAIN_ENVIRONMENT)
    ours, parts = before or _load(server, model_id)
    written = server.written_bytes() - written_before
    os.sync()  # what the first load left to be written
    later, _ = _load(server, model_id)
    return Round(ours, later, bare, plain, parts, costs, sum(file.stat().st_size for file in files), written)


def _load(server: Server, model_id: str) -> tuple[float, dict[str, float]]:
    """Load and unload a model; return the milliseconds until it was ready, and those of the parts.

    What the ledger's times do not contain is HTTP, and the commit of `ModelLoaded`.
    """
    before = _commits(server, 0)
    took_ms = server.load(model_id)
    server.unload(model_id)
    after = _commits(server, before[0] + 1)
    count, seconds = (now - then for now, then in zip(after, before, strict=True))
    (data,) = server.newest_events(f"type=ModelLoaded&model={model_id}", 1)
    durations = data["durations"]
    parts = {name: (durations[key] or 0) / 1000 for name, key in STAGES.items()}
    http_ms = took_ms - durations["total_us"] / 1000
    return took_ms, {"HTTP, last commit": http_ms, **parts, "one commit": 1000 * seconds / count}


def _commits(server: Server, at_least: float) -> tuple[float, float]:
    """Return how many commits there were so far, once there were so many, and how many seconds they took."""
    while True:
        time.sleep(SCRAPE_KEPT_S)
        found = dict(COMMITS.findall(server.ask("GET", "/metrics").content.decode()))
        if float(found["count"]) >= at_least:
            return float(found["count"]), float(found["sum"])


def _rows(network: Network, what: str, rounds: Sequence[Round]) -> Iterator[Row]:
    """Yield a first load beside its goal, its parts, and for the CNN what else is of interest.

    New files are copied and hashed, so the goal is that of a session, or the time to hash them if that is
    longer, and the time to copy them.
    """
    ours, later, bare = (median(getattr(each, name) for each in rounds) for name in ("ours", "later", "bare"))
    hashing, copying = (
        median(getattr(each.costs, name) for each in rounds) for name in ("hashing_ms", "copying_ms")
    )
    goal = max(bare * RATIO_GOAL, bare + ABOVE_GOAL_MS, hashing) + copying
    label = f"{rounds[0].bytes / 1e6:.0f} MB {network.what}: {what}"
    for name, took, shown_goal, most in (
        (label, ours, f"≤ {goal:.1f} ms", goal),
        (label.replace("first", "later"), later, f"≤ {LATER_GOAL}", LATER_GOAL * bare),
    ):
        ours_ms, bare_ms = format_ms(took, decimals=1), format_ms(bare, decimals=1)
        yield Row(f"{name} ÷ bare first session", ours_ms, bare_ms, took / bare, shown_goal, took <= most)
    parts = {name: median(each.parts[name] for each in rounds) for name in rounds[0].parts}
    beside = [parts.pop(name) for name in ("hashing", "one commit")]
    parts["all else"] = ours - sum(parts.values())
    yield Row(
        f"{label}: {', '.join(parts)}; beside that hashing; of that one commit; sha256sum, cp",
        "; ".join(", ".join(f"{took_ms:.1f}" for took_ms in each) for each in (parts.values(), beside)),
        f"{hashing:.1f}, {copying:.1f} ms",
        None,
    )
    if network.name == "cnn":
        plain = median(each.plain for each in rounds)
        written = int(median(each.written for each in rounds))
        size = rounds[0].bytes
        yield Row(f"{label} ÷ bare without huge pages", format_ms(ours), format_ms(plain), ours / plain)
        yield Row(f"{label}: written ÷ its files", format_mb(written), format_mb(size), written / size)
