"""Record a history: a real runtime with real workers runs a scenario, and its ledger is kept.

    PYTHONPATH=.:tests python tests/histories/record.py NAME

writes the events to NAME.jsonl and the states that a fold gives to NAME.json. Record new scenarios only,
written like the one below: recorded histories stay as they are, since ledgers like them exist. `--refold`
instead of a name makes all states anew; use it only together with a new `events.sqlite.storage.FOLDS`.

- `loads-and-swaps`: see below
- `deaths`: workers of one and of two instances die, until recovery gives up; a later load tries again
- `restarts`: the server ends during loads, a swap and with a queue, cleanly or not; models are reloaded
- `cancels-and-force`: cancels in time and too late, forced unloads of loading models, jobs that time out
- `evictions-and-memory`: with room for one model, others are evicted; then there is memory for none
- `settings`: a load changes settings of what is loaded, and another version takes the defaults
- `joins`: others join a load, a forced unload and a loaded model; a person's load supersedes an on-demand one
- `tokens`: tokens are issued over all ways, revoked, and used by a sign-in link; one of a provider is revoked
- `keys`: requests with idempotency keys, repeated, reused for another request, and expired after a day
- `approvals`: versions are refused, approved, withdrawn, reloaded without, and loaded in an emergency
- `versions`: versions that are added, with where they come from and without, and removed
- `nodes`: a worker of three nodes dies, then a node; another one is drained and leaves, and one joins again
- `devices`: written, not run: loads on devices fall back to the CPU, are measured, swapped, and restored
- `copies`: written, not run: copies lose a worker, a node and a load, are swapped and unloaded
"""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from msgspec.structs import replace
from support import models
from support.cluster import are_elsewhere, clustered, find_nodes, find_places, is_lost
from support.folding import fold_steps
from support.history import History, opened
from support.ledgers import ledger_of
from support.postgres import postgres_server
from support.running import job_of, running
from support.signing import make_key, public_pem, sign_folder

from events.clock import uuid7
from events.codec import encode_event
from events.commands import Record
from events.jobcommands import RequestLoad, RequestUnload
from events.models import ModelState
from events.registercommands import IssueToken, RevokeToken
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import open_reader
from events.sqlite.storage import FOLDS
from events.types import (
    SYSTEM,
    AccessDenied,
    AddedFile,
    Cause,
    Draft,
    Idempotency,
    Justification,
    LoadParameters,
    ModelSettingsChanged,
    ModelUnloaded,
    PolicyInForce,
    Provenance,
    SignInLinkIssued,
    TokenIssued,
    digest_of,
)
from events.values import Credential
from events.versioncommands import AddVersion, RemoveVersion
from features.approvals.rules import ApprovalRule
from features.devices.facts import DeviceUse
from features.nodes.register import NodePhase
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode, TrustRule
from runtime.scheduler.view import Policy

HERE = Path(__file__).parent

Scenario = Callable[[Path], Awaitable[None]]


def write_states(name: str) -> None:
    steps, last = fold_steps((HERE / f"{name}.jsonl").read_text().splitlines())
    states = {"folds": FOLDS, "steps": steps, "last": last}
    (HERE / f"{name}.json").write_text(json.dumps(states, indent=1) + "\n")


async def settings(folder: Path) -> None:
    """Settings of a loaded model change; then another version is loaded, and they change again."""
    async with running(folder, stops_cleanly=True) as engine:
        await engine.load("adder", 1)
        await engine.submit_load("adder", 1, LoadParameters(pinned=True), {"pinned"})
        await engine.submit_load("adder", 1, LoadParameters(keep_alive_s=600), {"keep_alive_s"})
        await engine.load("adder", 2)
        await engine.submit_load("adder", 2, LoadParameters(pinned=True), {"pinned"})
        await engine.unload("adder")


async def joins(folder: Path) -> None:
    """Others join a load, an unload and a loaded model; a requested load supersedes an on-demand load."""
    async with running(folder, loads_at_once=1, stops_cleanly=True) as engine:
        slow = await engine.ask_load("slow")
        await engine.loading("slow")
        joiner = RequestLoad("slow", 1, (), "bob", idempotency=Idempotency("5f" * 32, "c0" * 32))
        await engine.log.submit(joiner)
        with engine.consumer.demand.hold("adder"):
            await engine.log.submit(RequestLoad("adder", 1, (), "pia", cause=Cause.DEMAND))
            requested = await engine.ask_load("adder", 1)
            for actor in ("bob", "bob"):
                await engine.log.submit(RequestUnload("slow", actor, force=True))
                await engine.log.submit(RequestUnload("slow", "carol", force=True))
            await engine.ended(slow)
            await engine.ended(requested)
        for actor in ("alice", "bob", "bob"):
            await engine.submit_load("adder", 1, actor=actor)


async def loads_and_swaps(folder: Path) -> None:
    """Loads, repeated loads, swaps beside and in place, failed loads, unloads, and a denied request."""
    async with running(folder, stops_cleanly=True) as engine:
        await engine.load("adder", 1)
        await engine.load("adder", 1)
        await engine.load("other", parameters=LoadParameters(pinned=True, keep_alive_s=600))
        await engine.load("adder", 2)
        await engine.ended(await engine.ask_unload("adder"))
        await engine.load("adder", 1, LoadParameters(strategy="in_place"))
        await engine.load("adder", 2, LoadParameters(strategy="in_place"))
        await engine.load("broken")
        await engine.load("adder", 3)
        await engine.load("adder", 4, LoadParameters(strategy="in_place"))
        await engine.becomes("adder", ModelState.LOADED)
        denied = Draft("denied-1", AccessDenied("POST /api/v1/models/{id}/load", 3), "mallory", None, "other")
        await engine.log.submit(Record((denied,)))
        await engine.ended(await engine.ask_unload(None))
        await engine.unload("other")


async def tokens(folder: Path) -> None:
    """Tokens are issued over all ways, revoked, and got by a sign-in link."""

    def issued(jti: str, via: str) -> TokenIssued:
        return TokenIssued(jti, "bob", ("admin", "audit"), "2030-01-31T14:02:00.000000Z", via)

    async with running(folder, stops_cleanly=True) as engine:
        submit = engine.log.submit
        await submit(IssueToken(issued("first", "serve"), "root"))
        await submit(IssueToken(issued("second", "api"), "alice"))
        await submit(IssueToken(issued("third", "socket"), "local:loadledger"))
        await submit(RevokeToken("second", "alice"))
        await submit(RevokeToken("provider/1", "alice", "2030-01-31T14:02:00.000000Z"))
        await submit(Record((Draft("link-1", SignInLinkIssued("link"), "alice"),)))
        await submit(IssueToken(issued("fourth", "link"), "alice", "link"))
        await engine.load("adder", 1)


async def nodes(folder: Path) -> None:
    """A worker dies, a node is killed, one is drained and leaves; the killed one joins again, and leaves."""
    async with postgres_server() as server, clustered(folder, server) as cluster:
        first, second, third = cluster.nodes.values()
        state = await cluster.load(*cluster.fleet.ids[:4])
        os.kill(third.server.worker(), signal.SIGKILL)
        await cluster.until(lambda now: now.position > state.position)
        state = await cluster.settled()
        moved, epoch = find_places(state, first.name), state.registers.nodes[first.name].epoch
        assert moved, find_nodes(state, cluster.fleet.ids)
        await first.kill()
        await cluster.until(is_lost(first.name, epoch))
        await cluster.until(are_elsewhere(moved, first.name))
        moved = find_places(await cluster.settled(), second.name)
        await third.api.post(f"/api/v1/nodes/{second.name}/drain")
        await cluster.until(are_elsewhere(moved, second.name))
        await cluster.settled()
        await second.stop()
        await cluster.until(lambda now: now.registers.nodes[second.name].phase is NodePhase.LEFT, at=third)
        await first.start()
        await third.api.post(f"/api/v1/models/{moved[0]}/unload", wait=60)
        await cluster.settled()
        await third.stop()
        await first.stop()
        shutil.copyfile(first.replica, folder / LEDGER)


async def copies(folder: Path) -> None:
    """One of three copies is replaced, all are swapped, one takes another's place, all are unloaded."""
    history = History()
    for node in ("a", "b", "c"):
        history.join(node)
    wanted: dict[str, Any] = {"instances": 2, "copies": 3}
    history.load_at("a", "A1", **wanted)
    for node, job in (("b", "B1"), ("c", "C1")):
        history.load_at(node, job, cause=Cause.COPY, **wanted)
    history.kill_worker("w-C1-2")
    history.unload("C1-ends", "C1", cause=Cause.COPY, node_id="c")
    history.load_at("c", "C2", cause=Cause.COPY, **wanted)
    history.load_at("a", "A2", version=2, **wanted)
    history.unload("A1-ends", "A1", cause=Cause.SWAP, node_id="a")
    history.load_at("b", "B2", version=2, cause=Cause.COPY, **wanted)
    history.unload("B1-ends", "B1", cause=Cause.SWAP, node_id="b")
    history.ask_load("C3", version=2, cause=Cause.COPY, **wanted)
    history.start_at("c", "C3", version=2)
    history.fail_load("C3", "insufficient_memory", version=2)
    history.lose("a")
    history.join("a", unclean=True)
    history.load_at("a", "A3", version=2, cause=Cause.COPY, **wanted)
    history.unload("C2-ends", "C2", cause=Cause.SWAP, node_id="c")
    history.ask_load("fewer", version=2, copies=1)
    history.add(ModelSettingsChanged("B2", None, pinned=False, copies=1), "fewer", version=2)
    history.unload("A3-ends", "A3", version=2, cause=Cause.COPY, node_id="a")
    history.load_at("c", "C4", version=2, cause=Cause.COPY, **wanted)
    history.ask_unload("B2-ends", "B2", version=2, node_id="b")
    history.ask_unload("C4-ends", "C4", version=2, cause=Cause.COPY, node_id="c")
    for step in (history.start_unload, history.end_unload):
        step("B2-ends", version=2)
        step("C4-ends", version=2)
    with ledger_of(history.facts) as connection:
        connection.execute("VACUUM INTO ?", (str(folder / LEDGER),))


async def devices(folder: Path) -> None:
    """A model moves from a device to another and to the CPU; not all of the memory comes back."""
    history = History()
    on_cuda = DeviceUse("cuda", "0.9.0", "cuda:0", 69, 600_000_000)
    on_cpu = DeviceUse("cpu", "1.30.0", "cpu", 9)
    asked: dict[str, Any] = {"devices": ("cuda:*", "cpu"), "fallback": "cpu"}
    history.ask_load("refused", devices=("openvino:cpu",))
    history.start_load("refused")
    history.fail_load("refused", "fallback_refused")
    history.load_on("A1", replace(on_cuda, nodes=60), on_cpu, instances=2, **asked)
    history.load_on("A2", on_cuda, version=2, instances=2, peak_memory_bytes=3_000, devices=("cuda:0",))
    history.unload("A1-ends", "A1", cause=Cause.SWAP)
    on_openvino = DeviceUse("openvino", "1.9.0", "openvino:cpu", 69)
    history.load_on("other", on_openvino, of="other", devices=("openvino:cpu",))
    history.restart()
    history.load("A3", version=2, cause=Cause.RESTART, devices=("cuda:0", "cpu"))
    history.load_on("other2", on_openvino, of="other", cause=Cause.RESTART, devices=("openvino:cpu",))
    history.load_on("A4", replace(on_cuda, memory_bytes=500_000_000), version=2, devices=("cuda:0",))
    history.unload("A3-ends", "A3", version=2, cause=Cause.SWAP)
    history.ask_unload("A4-ends", "A4", version=2)
    history.start_unload("A4-ends", version=2)
    unloaded = ModelUnloaded(51_200_000, 3, 0, unreturned_bytes=200_000_000)
    history.add(unloaded, "A4-ends", version=2)
    with ledger_of(history.facts) as connection:
        connection.execute("VACUUM INTO ?", (str(folder / LEDGER),))


async def versions(folder: Path) -> None:
    """A version is added with where it comes from, one without, and one is removed."""
    source = Provenance("hf://org/other@main", f"hf://org/other@{'1' * 40}")
    files = (AddedFile("model.onnx", 3, "ab" * 32),)
    async with opened(folder / "ledger.db") as log:
        await log.submit(AddVersion("other", 1, "alice", files, uuid7(), source=source))
        await log.submit(AddVersion("other", 2, "bob", files, uuid7()))
        await log.submit(RemoveVersion("other", 2, "bob", uuid7()))


async def approvals(folder: Path) -> None:
    """Signed versions are refused, approved, withdrawn, reloaded without, and loaded in an emergency."""
    key = make_key()
    model = folder / "models" / "adder"
    signatures = [sign_folder(model / version, key) for version in ("1", "2")]
    rules = LoadPolicy(
        (TrustRule(("adder",), TrustMode.ENFORCE, (public_pem(key),)),),
        (ApprovalRule(("adder",)),),
    )
    said = Justification(Credential("idp", "t1"), "the new data", None)
    files = signatures[1], model / "2" / "model.onnx"
    digest = digest_of((each.name, sha256(each.read_bytes()).hexdigest()) for each in files)
    emergency = Justification(Credential(), emergency="the old version answers nonsense", digest=digest)
    policy = Policy(2, loads=rules)
    async with running(folder, policy=policy) as engine:
        await engine.log.submit(Record((Draft(uuid7(), PolicyInForce(rules), SYSTEM),)))
        await engine.ended(job_of(await engine.submit_load("adder", 1, justification=said)))
        await engine.approve("adder")
        await engine.ended(job_of(await engine.submit_load("adder", 1, justification=said)))
        await engine.withdraw("adder", by="dave")
        await engine.load("adder", 1, LoadParameters(pinned=True))
    async with running(folder, policy=policy, stops_cleanly=True) as engine:
        await engine.becomes("adder", ModelState.LOADED)
        await engine.ended(job_of(await engine.submit_load("adder", 2, justification=emergency)))


SCENARIOS: dict[str, Scenario] = {
    "loads-and-swaps": loads_and_swaps,
    "settings": settings,
    "joins": joins,
    "tokens": tokens,
    "nodes": nodes,
    "copies": copies,
    "devices": devices,
    "versions": versions,
    "approvals": approvals,
}


async def record(name: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        root = folder / "models"
        for version in (1, 2):
            models.save(models.add(version), root, "adder", version)
        models.save(models.crash_on_load(), root, "adder", 3)
        models.save_bytes(b"no model", root, "adder", 4)
        models.save(models.add(100), root, "other")
        models.save(models.slow_identity(side=400), root, "slow")
        models.save_bytes(b"no model either", root, "broken")
        await SCENARIOS[name](folder)
        async with open_reader(folder / "ledger.db") as reader:
            events = await reader.events(0, 10_000)
    (HERE / f"{name}.jsonl").write_text(
        "".join(f"{without_paths(encode_event(event))}\n" for event in events)
    )


def without_paths(body: str) -> str:
    """Replace the paths of this machine in a body; a worker's stderr names them."""
    return body.replace(str(HERE.parents[1]), "/srv/loadledger").replace(sys.prefix, "/srv/environment")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        if asked != "--refold":
            asyncio.run(record(asked))
        for each in [file.stem for file in HERE.glob("*.jsonl")] if asked == "--refold" else [asked]:
            write_states(each)
