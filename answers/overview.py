"""The first page of the console."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about
from answers.events import EventInfo
from answers.jobs import JobInfo
from answers.models import ModelInfo
from answers.nodes import NodeInfo
from answers.resources import Resources


class Overview(AnswerBody, frozen=True, kw_only=True):
    """The state of the server."""

    models: Annotated[list[ModelInfo], about("The first `limit` models, by id.")]
    next_cursor: Annotated[str | None, about("`cursor` of the next models in `GET /api/v1/models`.")]
    jobs: Annotated[list[JobInfo], about("The last 1000 that have not ended, and the 40 newest.")]
    failed_jobs: Annotated[
        list[JobInfo],
        about("Of each model with an `error`, its last failed job, if it is among the last 1000."),
    ]
    resources: Resources
    nodes: Annotated[list[NodeInfo], about("None if the server is alone.")]
    server_started: Annotated[
        EventInfo | None, about("The last `ServerStarted`; null for those who may not read events.")
    ]
    as_of: Annotated[int, about("The position that the models reflect.")]
