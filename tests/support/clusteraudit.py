"""The audit of a ledger of nodes: one whole history, and no fact of a node whose epoch is over."""

import asyncio
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from events.codec import decode_event
from events.models import Model, ModelState
from events.state import State
from events.types import (
    REPLACEMENTS,
    Cause,
    Event,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    UnloadRequested,
    WorkerExited,
)
from features.nodes.facts import LoadPlaced, NodeDraining, NodeJoined, NodeLeft, NodeLost
from nodes.postgres.admin import verify_address
from server.observability.eventlog import ENDS
from support.cluster import Cluster
from support.fleet import Source
from support.ledgers import rows_of
from support.replicas import Row, rows_in
from support.servers import verified
from support.workers import LIMIT_S


@dataclass(slots=True)
class EpochAudit:
    """Follows the events of a ledger, and refuses what no node may have recorded.

    Attributes:
        present: the epochs that have begun and not ended, by node.
        last: the latest epoch of each node.
        ends: the type of each job's end, by job.
        asked: the jobs.
        failures: codes of failed loads.
        loaded: the node and the files of each load that has completed.
        ended: the position at which a load was taken from its model; not of one that went on.
        swaps: how many events each swap of a model with copies took, from its first load to its last step.
        lost: how often each node was lost.
    """

    present: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    loaded: dict[Source, tuple[str, frozenset[str]]] = field(default_factory=dict)
    ended: dict[Source, int] = field(default_factory=dict)
    swaps: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _state: State = field(default_factory=State)
    _replaced: set[str] = field(default_factory=set)
    _serving: dict[str, set[Source]] = field(default_factory=dict)
    _mixed: dict[str, int] = field(default_factory=dict)
    _wanted: dict[str, int] = field(default_factory=dict)

    def follow(self, events: Iterable[Event]) -> None:
        """Check the events, which are all of the ledger."""
        for event in events:
            self._check_node(event)
            self._check_job(event)
            self._check_model(event)
            self._state.apply(event)
            models = self._state.models
            for model_id in [event.model_id] if event.model_id else list(models):
                if model_id in models:
                    self._check_copies(models[model_id], event)
        assert not self._replaced, f"loaded at two nodes, and nothing unloads these loads: {self._replaced}"
        assert not self._mixed, f"models serve two versions in the end: {self._mixed}"

    def _check_copies(self, model: Model, event: Event) -> None:
        """Note the loads that a model serves from: one at each node, and of two versions during a swap."""
        held = model.servings if model.phase is ModelState.LOADED else ()
        assert len({each.server for each in held}) == len(held), f"two copies at one node: {event}"
        before = self._serving.get(model.id, set())
        now = {Source(model.id, each.version, each.position) for each in held}
        self.ended.update(dict.fromkeys(before - now, event.position))
        for source in now - before:
            self.ended.pop(source, None)  # its unload was cancelled
        self._serving[model.id] = now
        versions = {source.version for source in now}
        if len(versions) > 1 and not versions <= {source.version for source in before}:
            assert isinstance(event.data, ModelLoaded), f"another version serves: {event}"
            self._mixed.setdefault(model.id, event.position)
        elif len(versions) < 2 and (began := self._mixed.pop(model.id, None)) is not None:
            self.swaps.append(event.position - began)

    def _check_model(self, event: Event) -> None:
        """Check that a further copy is of the version that serves.

        A load that gives way to one at another node is noted: nothing but its unload may follow.
        """
        data = event.data
        if isinstance(data, LoadRequested) and data.cause is Cause.COPY:
            copied = self._state.models[event.model_id or ""]
            assert copied.version == event.version, event
        if isinstance(data, UnloadRequested) and data.cause in REPLACEMENTS:
            self._replaced.discard(data.load_job_id or "")
        if isinstance(data, ModelLoaded):
            model = self._state.models.get(event.model_id or "")
            held = model.servings if model is not None and model.phase is ModelState.LOADED else ()
            is_alone = self._wanted.get(event.job_id or "") == 1
            others = (each for each in held if each.server not in (None, data.server))
            self._replaced |= {each.load_job_id for each in others if is_alone}

    def _check_node(self, event: Event) -> None:
        match event.data:
            case NodeJoined(node_id=node_id, epoch=epoch):
                assert epoch == self.last.get(node_id, 0) + 1, event
                self.present[node_id] = self.last[node_id] = epoch
            case NodeLeft(node_id=node_id, epoch=epoch) | NodeLost(node_id=node_id, epoch=epoch):
                assert self.present.pop(node_id, None) == epoch, event
                if isinstance(event.data, NodeLost):
                    self.lost.append(node_id)
            case NodeDraining(node_id=node_id, epoch=epoch) | LoadPlaced(server=node_id, node_epoch=epoch):
                assert self.present.get(node_id) == epoch, event
            case LoadStarted(server=node_id) | ModelLoaded(server=node_id) | WorkerExited(server=node_id):
                assert node_id in self.present, event

    def _check_job(self, event: Event) -> None:
        data = event.data
        if isinstance(data, ModelLoaded):
            source = Source(event.model_id or "", event.version or 0, event.position)
            self.loaded[source] = data.server or "", frozenset(file.sha256 for file in data.files)
        if isinstance(data, LoadFailed):
            self.failures.append(f"{data.code}: {data.message}")
        if isinstance(data, LoadRequested | UnloadRequested):
            self.asked.add(event.id)
            if isinstance(data, LoadRequested) and data.cause is not Cause.COPY:
                self._wanted[event.id] = data.parameters.wanted_copies
        elif isinstance(data, ENDS):
            assert event.job_id in self.asked - self.ends.keys(), event
            self.ends[event.job_id] = event.type


async def read_at_rest(cluster: Cluster) -> tuple[list[Row], dict[str, list[Row]]]:
    """Return the rows of the database and of each replica, read while nothing was recorded.

    On a busy machine a node may be late at any time, and lost.
    """
    async with asyncio.timeout(LIMIT_S):
        while True:
            await cluster.settled()
            rows = await rows_in(cluster.database)
            replicas = {
                node.name: await asyncio.to_thread(rows_of, node.replica) for node in cluster.nodes.values()
            }
            if rows == await rows_in(cluster.database):
                return rows, replicas


async def audit_cluster(cluster: Cluster, failures: Collection[str] = ()) -> EpochAudit:
    """Audit a settled cluster: the database's ledger, every replica, and what clients were answered.

    Args:
        cluster: whose clients have ended.
        failures: codes that loads may have failed with.
    """
    found = await asyncio.to_thread(verify_address, cluster.database.server_url, None)
    assert found.finding is None, found
    rows, replicas = await read_at_rest(cluster)
    assert [position for position, _, _ in rows] == list(range(1, len(rows) + 1))
    for node in cluster.nodes.values():
        await asyncio.to_thread(verified, node.config)
        replica = replicas[node.name]
        assert replica == rows[: len(replica)], node.name
        assert len(replica) == len(rows) or not node.answers, node.name
    audit = EpochAudit()
    audit.follow(decode_event(body.encode()) for _, body, _ in rows)
    assert audit.asked == audit.ends.keys(), audit.asked - audit.ends.keys()
    assert cluster.accepted <= audit.ends.keys(), cluster.accepted - audit.ends.keys()
    check_answers(cluster, audit)
    refused = [each for each in audit.failures if each.partition(":")[0] not in failures]
    assert not refused, refused
    for node in cluster.nodes.values():
        assert "Traceback" not in node.output, node.output[-5000:]
    return audit


def check_answers(cluster: Cluster, audit: EpochAudit) -> None:
    """Check that each answer is of a load that its node recorded, and of none whose end the node had read."""
    for answer in cluster.answers:
        source = answer.source
        path = cluster.fleet.root / source.model_id / str(source.version) / "model.onnx"
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert audit.loaded.get(source) == (answer.node_id, frozenset({found})), answer
        ended = audit.ended.get(source)
        assert ended is None or answer.known < ended, f"{answer}, which ended at {ended}"
