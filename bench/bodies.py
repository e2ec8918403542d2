"""How long do hostile JSON bodies hold up others? Inferences of tiny tensors beside them.

Each body is as long as the server accepts and is sent again and again, as it is and compressed. Beside it a
client sends a tiny inference every few milliseconds and counts its waits. Other work on the machine adds to
them, so the goal is for the processor time that the event loop spends on one body.
"""

import gzip
import http.client
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench import driver, generator, models
from bench.driver import Server
from bench.inference import SMALL
from bench.requests import Target, add_one_request
from bench.table import Row, format_ms

MIB = 2**20
PAUSE_S = 0.005
"""Between two tiny inferences."""
GOAL_MS = 50.0
"""Processor time of the event loop for one body: so long it serves nobody else."""
ATTACKED = "attacked"
"""The model of the hostile bodies: another one, whose worker no tiny inference waits for."""
CROWD = 4
"""Connections that send the worst body at once, as subject of one token."""

_TENSOR = b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32",'
_INPUT = b'{"name":"x","shape":[1],"datatype":"FP32","data":[0]}'


@dataclass(frozen=True, slots=True)
class Body:
    """A hostile body: a unit repeated between a beginning and an end, up to a length."""

    what: str
    unit: bytes
    begin: bytes = _TENSOR + b'"data":['
    end: bytes = b"0]}]}"

    def content(self, size: int) -> bytes:
        """Return the body, as long as fits into `size` bytes."""
        count = (size - len(self.begin) - len(self.end)) // len(self.unit)
        return self.begin + self.unit * count + self.end


BODIES = (
    Body('"data":[1] repeated', b'"data":[1],', _TENSOR, b'"data":[1,2,3,4]}]}'),
    Body("empty arrays", b"[],"),
    Body("zeros", b"0,"),
    Body("objects", b"{},"),
    Body("white space", b" "),
    Body("arrays nested 900 deep", b"[" * 900 + b"]" * 900 + b","),
    Body("one array nested without end", b"["),
    Body("one long string", b"\\n", _TENSOR + b'"data":["', b'"]}]}'),
    Body("empty strings", b'"",'),
    Body(
        "unknown members in 16 KiB", b"0,", b'{"mine":[' + b"{}," * 5000 + b"0]," + _TENSOR[1:] + b'"data":['
    ),
    Body("unknown keys", b'"":0,', _TENSOR, b'"data":[1,2,3,4]}]}'),
    Body("parameters", b'"":0,', b'{"parameters":{', b'"a":0},"inputs":[' + _INPUT + b"]}"),
    Body("inputs", _INPUT + b",", b'{"inputs":[', _INPUT + b"]}"),
    Body("outputs", b'{"name":""},', b'{"outputs":[', b'{"name":""}],"inputs":[' + _INPUT + b"]}"),
    Body("dimensions", b"0,", b'{"inputs":[{"name":"x","datatype":"FP32","data":[0],"shape":[', b"0]}]}"),
)


@dataclass(frozen=True, slots=True)
class Waits:
    """Waits of the tiny inferences, in milliseconds; how many there were, and the loop's processor time."""

    p99_ms: float
    longest_ms: float
    count: int
    loop_ms: float

    def __str__(self) -> str:
        return f"p99 {format_ms(self.p99_ms, decimals=1)}, longest {format_ms(self.longest_ms, decimals=1)}"


def measure(folder: Path, *, seconds: float, mib: int = 4) -> list[Row]:
    """Measure each body for `seconds`, plain and compressed, and the worst one from several connections.

    Args:
        folder: An empty directory.
        seconds: Of each measurement.
        mib: The length of the bodies, decompressed.
    """
    with driver.running(folder, *driver.UNLIMITED) as server:
        for model_id in (models.ADD_ONE, ATTACKED):
            models.write(server.repository, model_id, models.add_one())
            server.load(model_id)
        attack = Attack(server, folder, _waits(server, seconds), seconds)
        cases = [(body, coding) for body in BODIES for coding in ("", "gzip")]
        found = {case: attack.measure(*case, size=mib * MIB, clients=1) for case in cases}
        worst = max(cases, key=lambda case: found[case][0])
        _, crowd = attack.measure(*worst, size=mib * MIB, clients=CROWD)
    rows = [_row(f"{mib} MiB of {_name(*case)}", attack.quiet, *found[case]) for case in cases]
    what = f"{mib} MiB of {_name(*worst)}, {CROWD} connections"
    return [*rows, Row(what, str(crowd), str(attack.quiet), crowd.p99_ms / attack.quiet.p99_ms)]


def _name(body: Body, coding: str) -> str:
    return f"{body.what}, compressed" if coding else body.what


def _row(what: str, quiet: Waits, hold_ms: float, waits: Waits) -> Row:
    ours, ratio = f"{format_ms(hold_ms, decimals=1)} a body; {waits}", waits.p99_ms / quiet.p99_ms
    return Row(what, ours, str(quiet), ratio, f"≤ {GOAL_MS:.0f} ms a body", hold_ms <= GOAL_MS)


def _request(server: Server, body: Body, size: int, coding: str) -> bytes:
    content = body.content(size)
    lines = [
        f"POST /v2/models/{ATTACKED}/infer HTTP/1.1",
        f"Host: {generator.HOST}",
        f"Authorization: Bearer {server.token}",
    ]
    if coding:
        content = gzip.compress(content)
        lines.append(f"Content-Encoding: {coding}")
    lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass(frozen=True, slots=True)
class Attack:
    """A server, a folder for requests, the waits without an attack, and the seconds of each measurement."""

    server: Server
    folder: Path
    quiet: Waits
    seconds: float

    def measure(self, body: Body, coding: str, *, size: int, clients: int) -> tuple[float, Waits]:
        """Return the loop's milliseconds for each body, and the waits beside them."""
        path = self.folder / "body"
        path.write_bytes(_request(self.server, body, size, coding))
        with generator.recording(self.server.port, path, clients=clients) as stop:
            begin_ms = _loop_ms(self.server)
            waits = _waits(self.server, self.seconds)
            bodies = stop().total
            spent_ms = _loop_ms(self.server) - begin_ms
        if not bodies:
            raise SystemExit("no body was answered")
        others_ms = waits.count * self.quiet.loop_ms / self.quiet.count
        return max(0.0, spent_ms - others_ms) / bodies, waits


def _loop_ms(server: Server) -> float:
    """Return the processor time of the server's first thread, which runs its event loop."""
    return int(Path(f"/proc/{server.pid}/schedstat").read_text().split()[0]) / 1e6


def _waits(server: Server, seconds: float) -> Waits:
    begin_ms = _loop_ms(server)
    with closing(server.connect()) as connection:
        took_ms = sorted(_ask_for(server, connection, seconds))
    return Waits(_p99(took_ms), took_ms[-1], len(took_ms), _loop_ms(server) - begin_ms)


def _ask_for(server: Server, connection: http.client.HTTPConnection, seconds: float) -> Iterator[float]:
    request = add_one_request(SMALL, binary=True).content(Target("ours", server.port, server.token))
    until = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until:
        connection.sock.sendall(request)
        response = http.client.HTTPResponse(connection.sock)
        response.begin()
        response.read()
        if response.status != http.HTTPStatus.OK:
            raise SystemExit(f"a tiny inference was answered {response.status}")
        yield (time.perf_counter() - begin) * 1000
        time.sleep(PAUSE_S)


def _p99(ordered: Sequence[float]) -> float:
    return ordered[int(len(ordered) * 0.99)]
