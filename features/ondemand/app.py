"""On-demand loads as a resource of the application."""

from __future__ import annotations

from aiohttp import web

from events.jobcommands import RequestLoad
from events.types import Cause
from features.ondemand.loads import OnDemand
from server.api.jobs import JOB_REQUESTS
from server.api.loads import make_load_command
from server.appkeys import CONFIG, CONSUMER, LOG, READER, ROUTER, STOPPING

DEMAND = web.AppKey("demand", OnDemand)


def open_demand(app: web.Application) -> OnDemand:
    """Open what loads models on demand, and add it to the application."""

    async def look_up(model_id: str, version: int | None, subject: str) -> RequestLoad:
        asked = {} if version is None else {"version": version}
        model = app[LOG].state.models.get(model_id)
        chosen = None if model is None or not model.chosen else model.chosen
        return await make_load_command(app, model_id, asked, subject, cause=Cause.DEMAND, chosen=chosen)

    app[DEMAND] = demand = OnDemand(
        log=app[LOG],
        submit=app[JOB_REQUESTS].submit,
        reader=app[READER],
        router=app[ROUTER],
        demand=app[CONSUMER].demand,
        look_up=look_up,
        waiting_for=app[CONSUMER].waiting_for,
        stopping=app[STOPPING],
        is_personal=lambda model_id: app[CONFIG].policy.count_persons(model_id) > 0,
        max_waiting=app[CONFIG].inference_queue,
        on=app[CONFIG].loads_for_inferences,
    )
    return demand
