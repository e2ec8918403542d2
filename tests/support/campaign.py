"""What all attacks of `make hostile` share: a server with a good model, a probe of it, and the aftermath.

    async with attacked(config) as attack:
        ...  # harms neither the good model's worker, nor the fork server, nor the server
        async with attack.disturbing():  # may harm them, and ends when the good model serves again
            await attack.kill(attack.good_worker)
        attack.counts["kills"] += 1

While the block runs, a process asks the good model every 10 ms (`support.probe`). After the block, `attacked`
checks that each inference outside of `disturbing` was answered 200 (within it, 503 with Retry-After is fine),
each accepted job has ended, the next load works, the server holds no more processes, descriptors and files
than before, stops with 0 and logged no error, and its ledger verifies. It prints the counts and the longest
wait.

An attack has a short form for the suite and a long one for `make hostile`: see `of_both`, `new_dice` and
`tell` of `support.fleet`.
"""

import asyncio
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from runtime.memory import list_descendants
from server.config import Config
from support import models, probe
from support.fleet import UNLIMITED, Source, agreed, as_text, check_ledger, own_bytes, settled, tell
from support.http import LIMIT_S, ONE, Json, when
from support.models import save
from support.servers import Server, address, limited, serving
from support.store import check_store
from support.workers import hold, wait_gone

GOOD = "good"
"""The model that is asked all the time."""
GOOD_MB = 24
"""More than another model of a campaign takes, so that its worker is known by it."""
QUESTION: Json = {"name": "x", "shape": [1], "datatype": "INT64", "data": [7]}
NEXT = "next"
"""The model whose load shows that loads still work."""
SETTINGS = (*UNLIMITED, "--inference-timeout-s=2", "--drain-timeout-s=5")
COMMAND = limited(inference_grace_s=1.0)
BACK_S = 5.0
"""The goal for serving again, from when nothing stands in the way."""
REST_S = 10.0
"""For what a server closes after its clients are gone."""
HANG_S = 20.0
"""Nothing that is untouched takes this long, even on a busy machine."""
GOAL_S = 0.25
"""The longest wait that `make hostile` reports without a remark."""


RESERVE = "/dev/null"
"""What libuv keeps open, to close it where there is no other descriptor; after that, it is "/"."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference of the probe: when it began (CLOCK_MONOTONIC), how long it took, and its outcome."""

    began: float
    wait_s: float
    outcome: str

    @property
    def is_fair(self) -> bool:
        """Whether a client can deal with it: it is answered, told to come later, or told that time is up."""
        return self.outcome in ("200", "504 inference_timeout") or self.outcome.endswith(" retry-after")


@dataclass(slots=True)
class Traces:
    """What a server holds while it is at rest: open descriptors by process, and processes."""

    workers: int
    server: Counter[str]
    fork_server: Counter[str]


@dataclass(slots=True)
class Attack:
    """A server under attack.

    Attributes:
        config: of the server.
        server: it has the good model loaded.
        counts: what was done; printed at the end.
        back_s: how long it took until the good model served again, after each disturbance.
        is_disturbing: whether the block is within `disturbing`, or has killed the server.
        accepted: jobs that a client was told of, each of which must have an end.
        sources: loads that answers named, each of which must be recorded.
    """

    config: Config
    server: Server
    counts: Counter[str] = field(default_factory=Counter)
    back_s: list[float] = field(default_factory=list)
    is_disturbing: bool = False
    accepted: set[str] = field(default_factory=set)
    sources: set[Source] = field(default_factory=set)
    _phases: list[tuple[float, float]] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)

    @property
    def fork_server(self) -> int:
        """The process id of the fork server."""
        return self.server.children()[0]

    @property
    def good_worker(self) -> int:
        """The process id of the good model's worker: the one with so much memory."""
        return max(self.server.children()[1:], key=own_bytes)

    def other_workers(self) -> list[int]:
        """Return the process ids of all workers but the good model's."""
        *others, _ = sorted(self.server.children()[1:], key=own_bytes)
        return others

    @asynccontextmanager
    async def disturbing(self) -> AsyncIterator[None]:
        """Harm the good model's worker, the fork server or the server, until the model serves again."""
        began, self.is_disturbing = time.monotonic(), True
        yield
        if self.server.process.returncode is not None:
            self._phases.append((began, math.inf))
            return
        await self.serve_again()
        self.is_disturbing = False
        self._phases.append((began, time.monotonic()))

    async def refused(self) -> None:
        """Wait until an inference on the good model fails."""
        await when(lambda: self.server.api.infer(GOOD, QUESTION), lambda answer: answer.status != 200)

    async def kill(self, pid: int) -> None:
        """Kill a process, and wait until it and its children are gone."""
        pidfds = hold((pid, *list_descendants(pid)))
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(wait_gone, pidfds)

    async def serve_again(self) -> None:
        """Wait until the good model serves; as its operator, load it when it failed five times in a row."""
        began = time.monotonic()
        answer = await self.server.api.infer(GOOD, QUESTION)
        while answer.status != 200:
            assert time.monotonic() - began < LIMIT_S, answer
            if (await self.server.api.model(GOOD))["state"] == "failed":
                await self.server.api.load(GOOD)
                began = time.monotonic()
            await asyncio.sleep(0.01)
            answer = await self.server.api.infer(GOOD, QUESTION)
        self.back_s.append(time.monotonic() - began)

    async def work_again(self) -> None:
        """Wait until the server is ready; then a load works."""
        began, api = time.monotonic(), self.server.api
        await when(lambda: api.get("/health/ready"), lambda answer: answer.status == 200)
        self.back_s.append(time.monotonic() - began)
        await self.check_load()

    async def check_load(self) -> None:
        """Check that a load works, now."""
        api = self.server.api
        await api.load(NEXT)
        assert (await api.infer(NEXT, ONE)).json["outputs"][0]["data"] == [3]
        await api.unload(NEXT)

    def _is_disturbed(self, sample: Sample) -> bool:
        end = sample.began + sample.wait_s
        return any(sample.began <= until and end >= since for since, until in self._phases)

    async def traces(self) -> Traces:
        """Return what the server holds, once no job and no process is on its way."""
        await settled(self.server)
        await agreed(self.server)
        own, *others = self.server.children()
        return Traces(len(others), _descriptors(self.server.pid, self.server), _descriptors(own, self.server))

    async def more_than(self, before: Traces) -> Counter[str]:
        """Return what the server holds now and did not hold before."""
        after = await self.traces()
        processes = Counter({"workers": after.workers}) - Counter({"workers": before.workers})
        return (after.server - before.server) + (after.fork_server - before.fork_server) + processes

    def report(self) -> None:
        """Print what was counted, and check what the probe saw."""
        touched = [sample for sample in self._samples if self._is_disturbed(sample)]
        untouched = [sample for sample in self._samples if not self._is_disturbed(sample)]
        longest = max((sample.wait_s for sample in untouched), default=0.0)
        outcomes = Counter(sample.outcome for sample in touched)
        goal = "" if longest <= GOAL_S else f", goal {GOAL_S * 1000:.0f} ms"
        tell(
            f"{as_text(self.counts)}; {len(untouched)} inferences beside, longest wait"
            f" {longest * 1000:.0f} ms{goal}; {len(touched)} while disturbed: {as_text(outcomes)}"
            f"; serving again after {max(self.back_s, default=0.0):.2f} s at most"
        )
        failed = [sample for sample in untouched if sample.outcome != "200"]
        assert not failed, failed[:10]
        if self.server.process.returncode is None:
            unfair = [sample for sample in touched if not sample.is_fair]
            assert not unfair, unfair[:10]
        assert longest < HANG_S
        assert max(self.back_s, default=0.0) < HANG_S


@asynccontextmanager
async def attacked(
    config: Config,
    *arguments: str,
    command: Sequence[str] = COMMAND,
    environment: Mapping[str, str] | None = None,
    expected_errors: Sequence[str] = (),
    see_data: Callable[[Config], Config] = lambda config: config,
) -> AsyncIterator[Attack]:
    """Start a server with a good model, probe it while the block runs, and check the aftermath.

    A block may kill the server, within `disturbing`: then this ends without checks of the live server.

    Args:
        config: the directories; where a server was attacked before, this goes on with its ledger.
        arguments: of `serve`, after `SETTINGS`.
        command: as for `serving`.
        environment: as for `serving`.
        expected_errors: beginnings of what the server may log as an error.
        see_data: returns where this process can read the ledger, once the server has ended.
    """
    save(models.table(GOOD_MB), config.repository, GOOD)
    save(models.add(2), config.repository, NEXT)
    async with serving(config, *SETTINGS, *arguments, command=command, environment=environment) as server:
        attack = Attack(config, server)
        await _use_once(server)
        before = await attack.traces()
        async with _probing(attack):
            yield attack
        if server.process.returncode is None:
            await _check_rest(attack, before)
            assert await server.stop() == 0
        output = server.output.read_text()
    attack.report()
    assert "\n    | Traceback" not in output, output[-4000:]  # within a line, it is what a worker printed
    errors = re.findall("^[^ ]+ (?:ERROR|CRITICAL) +(.*)", output, re.MULTILINE)
    assert not [line for line in errors if not line.startswith(tuple(expected_errors))]
    _check_processes(server.pid)
    if server.process.returncode == 0:
        assert list((config.data / "store" / "incoming").iterdir()) == []
        if not expected_errors:  # else a version may wait for its manifest until the next start
            check_store(config.data, loads_failed=any(name.startswith("kill") for name in attack.counts))
        ends, _ = await check_ledger(see_data(config), attack.sources, failures=None)
        assert attack.accepted <= ends.keys()


async def _use_once(server: Server) -> None:
    """Open what a server opens when it is first used."""
    for model_id, asked in ((GOOD, QUESTION), (NEXT, ONE)):
        await server.api.load(model_id)
        assert (await server.api.infer(model_id, asked)).status == 200
    await server.api.unload(NEXT)
    for path in ("/api/v1/events", "/api/v1/events/head", "/api/v1/models?at=1", "/metrics", "/health/ready"):
        answer = await server.api.get(path)
        assert answer.status == 200, answer


async def _check_rest(attack: Attack, before: Traces) -> None:
    """Check that a server works, and holds no more than before."""
    await settled(attack.server)
    await attack.check_load()
    for model_id in (await agreed(attack.server)).keys() - {GOOD}:
        await attack.server.api.unload(model_id)
    more = await attack.more_than(before)
    deadline = time.monotonic() + REST_S
    while more and time.monotonic() < deadline:  # what was open to clients that are gone
        await asyncio.sleep(0.1)
        more = await attack.more_than(before)
    assert not more, more


def _descriptors(pid: int, server: Server) -> Counter[str]:
    """Count a process's descriptors by their kind; connections of this process's client are left out."""
    ours = _connections(server)
    found = Counter[str]()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if target not in ours:
            found[RESERVE if target == "/" else target.partition(":")[0]] += 1
    return found


def _connections(server: Server) -> set[str]:
    """Return the server's ends of the connections that this process has open to it."""
    port = int(address(server).rpartition(":")[2])
    held = set[str]()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            held.add(str(entry.readlink()))
        except FileNotFoundError:
            continue
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = {line[1] for line in lines if f"socket:[{line[9]}]" in held}
    return {f"socket:[{line[9]}]" for line in lines if line[2] in local and line[1].endswith(f":{port:04X}")}


def _check_processes(pid: int) -> None:
    """Check that no fork server or worker of a server that has ended is left, whoever is its parent now."""
    left = list[str]()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"server" in command and str(pid).encode() in command:
            left.append(entry.parent.name)
    assert not left


@asynccontextmanager
async def _probing(attack: Attack) -> AsyncIterator[None]:
    """Run the probe while the block runs, and keep its samples."""
    server = attack.server
    body = json.dumps({"inputs": [QUESTION]})
    fields = (
        f"POST /v2/models/{GOOD}/infer HTTP/1.1",
        f"Host: {address(server)}",
        f"Authorization: Bearer {server.api.token('infer', subject='probe')}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    host, _, port = address(server).rpartition(":")
    target = {"host": host, "port": port, "request": "\r\n".join([*fields, "", body])}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", probe.__file__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**30,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(target).encode() + b"\n")
    try:
        async with asyncio.timeout(LIMIT_S):
            assert await process.stdout.readline() == probe.READY
        yield
        async with asyncio.timeout(LIMIT_S):
            output, _ = await process.communicate(b"")
        attack._samples = [Sample(*each) for each in json.loads(output)]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
