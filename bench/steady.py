"""What a prepared form is like to serve with: how quickly it infers, and how much memory it takes."""

import json
import time
from dataclasses import dataclass
from http import HTTPStatus
from statistics import median

from bench.driver import Server
from bench.memory import parse_pss
from bench.networks import Body, Network
from bench.requests import LENGTH
from bench.subject import Subject
from bench.table import Row
from runtime.memory import PROC, descendants, parse_private

MIN_INFERENCES = 10
INSTANCES = 4
RATE_GOAL = 0.97
# Of models that are large enough for their weights to be most of what a worker takes.
SHARED_FROM_BYTES, OF_ONE_GOAL, OF_BARE_GOAL = 50_000_000, 1.6, 0.5
ONCE = "[warm_up]\nenabled = true\n"
"""As `loadledger.toml`: memory is measured of workers that have run once."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What some workers take, in bytes: what no other process has, and with a part of what several have."""

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
    """Ask both servers in turn, and return what the quickest answer of each took."""
    both, network = (subject.server, subject.plain), subject.network
    request = network.request()
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
    """Return what an answer says of its tensors, and their bytes, which follow the JSON."""
    head, end = json.JSONDecoder().raw_decode(content.decode("latin-1"))
    return str(head["outputs"]), content[end:]


def memory_rows(subject: Subject) -> list[Row]:
    """Compare what one worker takes that nobody else has, and what several take together."""
    one, four = (_memory(subject, subject.server, number) for number in (1, INSTANCES))
    bare_one, bare_four = (_memory(subject, subject.plain, number) for number in (1, INSTANCES))
    name = f"{subject.label}: private memory of a worker, {subject.form} ÷ bare"
    return [
        Row(name, mb(one.private), mb(bare_one.private), one.private / bare_one.private),
        _shared_row(subject, four, one, f"of 1 {subject.form}", OF_ONE_GOAL),
        _shared_row(subject, four, bare_four, f"of {INSTANCES} bare", OF_BARE_GOAL),
    ]


def _shared_row(subject: Subject, ours: Memory, beside: Memory, what: str, goal: float) -> Row:
    name = f"{subject.label}: memory of {INSTANCES} workers, {subject.form} ÷ {what}"
    sizes, ratio = (mb(ours.proportional), mb(beside.proportional)), ours.proportional / beside.proportional
    if subject.bytes < SHARED_FROM_BYTES:
        return Row(name, *sizes, ratio)
    return Row(name, *sizes, ratio, f"≤ {goal:.2f}", ratio <= goal)


def _memory(subject: Subject, server: Server, instances: int) -> Memory:
    """Return what so many workers of the model take together, each after one inference on zeros."""
    model = subject.network.name
    (server.repository / model / "loadledger.toml").write_text(ONCE)
    before = set(descendants(server.pid))
    server.load(model, instances=instances)
    workers = set(descendants(server.pid)) - before
    texts = [(PROC / str(worker) / "smaps_rollup").read_text() for worker in workers]
    if len(texts) != instances:
        raise SystemExit(f"{model} has {len(texts)} workers and not {instances}")
    server.unload(model)
    return Memory(
        sum(map(parse_private, texts)),
        sum(map(parse_pss, texts)),
    )


def mb(value: int) -> str:
    """Write a size as the table does."""
    return f"{value / 1e6:.1f} MB"
