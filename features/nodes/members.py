"""What answers say of several servers: where a job or a model is, its copies, and which nodes were there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from answers.models import ModelCopy
from answers.past import NodePresence
from events.history import ShownModel
from events.jobs import Job
from events.presence import Liveness
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
