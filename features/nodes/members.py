"""Members of answers about several servers: the nodes, the places of jobs and models, and copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from answers.models import ModelCopy
from answers.nodes import NodeInfo, NodeJob, NodeModel
from answers.past import NodePresence
from events.history import ShownModel
from events.jobs import Job
from events.presence import Liveness
from events.state import State
from features.nodes.register import Lease, find_placer
from server.http.answers import show


def show_place(job: Job) -> Mapping[str, Any]:
    return {"node": job.server}


def show_copies(model: ShownModel) -> Mapping[str, Any]:
    row = model.row
    if row.copies_wanted == 1 and not row.copies:
        return {"node": row.server}
    counts = {"copies": row.copies_wanted, "copies_ready": model.count_ready()}
    return {"node": row.server, **counts, "copies_at": list(_list_copies(model))}


def _list_copies(model: ShownModel) -> Iterator[ModelCopy]:
    if not model.row.has_workers:
        return
    for place, load in zip(model.row.servings, model.loads, strict=True):
        yield ModelCopy(
            node=place.server,
            version=place.version,
            position=place.load,
            job_id=load.load_job_id,
            loaded_at=load.loaded_at,
            workers=place.workers,
            memory_bytes=load.memory_bytes,
        )


def show_presences(server: Liveness | None) -> Mapping[str, Any]:
    return {"nodes": [] if server is None else show(server.servers, list[NodePresence])}


def make_node_infos(
    state: State,
    leases: Iterable[Lease] = (),
    own_id: str | None = None,
    late: Iterable[str] = (),
    untrusted: Collection[str] = (),
    *,
    free_bytes: Mapping[str, int | None] = {},
) -> list[NodeInfo]:
    """Return the nodes of a state by name, with their models and jobs.

    Args:
        state: of the ledger.
        leases: those of earlier epochs say nothing.
        own_id: the node that answers.
        late: nodes that are late whatever the leases say.
        untrusted: nodes whose joins are not signed with a key that the nodes share.
        free_bytes: the rest of their budgets, as they last said.
    """
    models, jobs = defaultdict[str | None, list[NodeModel]](list), defaultdict[str | None, list[Job]](list)
    for model in sorted(state.models.values(), key=lambda model: model.id):
        for serving in model.servings:
            shown = NodeModel(id=model.id, version=serving.version, state=model.state)
            models[serving.server].append(shown)
    for job in state.unended():
        jobs[job.server].append(job)
    by_epoch = {(lease.node_id, lease.epoch): lease for lease in leases}
    placer = find_placer(state.registers.nodes, untrusted)
    infos = []
    for node in sorted(state.registers.nodes.values(), key=lambda node: node.id):
        lease = by_epoch.get((node.id, node.epoch))
        is_late = None if lease is None or not node.is_present else lease.is_late or node.id in late
        infos.append(
            NodeInfo(
                id=node.id,
                address=node.address,
                attributes=list(node.attributes),
                phase=node.phase,
                epoch=node.epoch,
                joined_at=node.joined_at,
                ended_at=node.ended_at,
                release=node.release,
                budget_bytes=node.budget_bytes,
                free_bytes=free_bytes.get(node.id) if lease is not None and node.is_present else None,
                models=models[node.id],
                jobs=show(jobs[node.id], list[NodeJob]),
                renewed_at=lease.renewed_at if lease is not None else None,
                late=is_late,
                this=node.id == own_id,
                trusted=node.id not in untrusted if node.is_present else None,
                placer=node.id == placer,
            )
        )
    return infos
