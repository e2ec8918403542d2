"""Denied attempts: counted for who was verified, appended each minute and at the stop, within a bound."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.events import PLAIN
from support.http import LocalApi
from support.models import save
from support.workers import until

from events.commands import Command, Record
from events.errors import LogUnavailable
from events.reader import open_reader
from events.types import SYSTEM, AccessDenied
from server.app import LEDGER
from server.appkeys import GATE
from server.auth.gate import MAX_EVENTS, NO_ROUTE, OTHER, Denials

Start = Callable[..., Awaitable[LocalApi]]
Told = dict[tuple[str, str], int]


async def recorded(api: LocalApi) -> Told:
    """Stop the server and return what its ledger says of denied attempts."""
    await api.client.close()
    async with open_reader(api.config.data / LEDGER) as reader:
        events = await reader.events(0)
    assert events[-1].type == "ServerStopped"
    denied = [event for event in events if isinstance(event.data, AccessDenied)]
    return {
        (event.actor, event.data.action): event.data.count
        for event in denied
        if isinstance(event.data, AccessDenied)
    }


class Ledger:
    """Takes commands as the log does, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.told: list[Told] = []
        self.failures = failures

    def has(self, minutes: int) -> bool:
        return len(self.told) >= minutes

    async def submit(self, command: Command) -> None:
        if self.failures:
            self.failures -= 1
            raise LogUnavailable
        assert isinstance(command, Record)
        told = {}
        for draft in command.drafts:
            assert isinstance(draft.data, AccessDenied)
            told[draft.actor, draft.data.action] = draft.data.count
        self.told.append(told)


async def appended(attempts: Sequence[tuple[str, str]], ledger: Ledger) -> Denials:
    """Count attempts, and append them at the stop."""
    denials = Denials()
    for subject, action in attempts:
        denials.count(subject, action)
    denials.close()
    await denials.run(ledger.submit)
    return denials


async def test_what_was_refused_is_in_the_ledger_when_the_server_has_stopped(api: LocalApi) -> None:
    for _ in range(3):
        assert (await api.post("/api/v1/models/m/load", roles=("predict",), subject="pia")).status == 403
    assert (await api.get("/api/v1/events/head", roles=("predict",), subject="pia")).status == 403
    assert (await api.post("/api/v1/models/x/load", roles=("audit",), subject="ann")).status == 403
    assert await recorded(api) == {
        ("pia", "POST /api/v1/models/{id}/load"): 3,
        ("pia", "GET /api/v1/events/head"): 1,
        ("ann", "POST /api/v1/models/{id}/load"): 1,
    }


async def test_the_short_way_of_inferences_counts_as_the_long_one_does(
    start: Start, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    api = await start()
    for path in ("/v2/models/m/infer", "/v2/models/%6D/infer", "/v2/models/m/versions/1/infer"):
        assert (await api.post(path, roles=("audit",), subject="ann", data=b"{}")).status == 403
    assert await recorded(api) == {
        ("ann", "POST /v2/models/{id}/infer"): 2,
        ("ann", "POST /v2/models/{id}/versions/{version}/infer"): 1,
    }


async def test_a_route_that_is_refused_for_its_parameters_is_counted_with_a_question_mark(
    api: LocalApi,
) -> None:
    assert (await api.get("/api/v1/models", roles=("predict",), subject="pia")).status == 200
    assert (await api.get("/api/v1/models?at=1", roles=("predict",), subject="pia")).status == 403
    assert await recorded(api) == {("pia", "GET /api/v1/models?"): 1}


async def test_who_was_not_verified_leaves_nothing_in_the_ledger(api: LocalApi) -> None:
    path = "/api/v1/models/m/load"
    assert (await api.post(path, roles=())).status == 401
    bad = {"Authorization": f"Bearer {api.token('predict')}x"}
    assert (await api.post(path, roles=(), headers=bad)).status == 401
    assert (await api.post(path, roles=("admin",))).status == 404
    assert await recorded(api) == {}


async def test_who_has_no_role_at_all_is_counted_whatever_the_path(api: LocalApi) -> None:
    gate = api.app[GATE]
    gate.denials.count("nobody", NO_ROUTE)
    assert await recorded(api) == {("nobody", NO_ROUTE): 1}


async def test_a_minute_is_appended_at_its_end_and_the_next_one_for_itself() -> None:
    denials, ledger = Denials(), Ledger()
    counting = asyncio.create_task(denials.run(ledger.submit, minute_s=0.01))
    for minute in range(1, 4):
        denials.count("pia", "a")
        denials.count("pia", "a")
        await until(partial(ledger.has, minute))
    denials.close()
    await counting
    assert sum(told["pia", "a"] for told in ledger.told) == 6


async def test_nothing_is_appended_for_a_minute_without_attempts() -> None:
    ledger = Ledger()
    await appended([], ledger)
    assert ledger.told == []


@PLAIN
@given(st.lists(st.tuples(st.integers(0, 90).map(str), st.sampled_from("ab")), max_size=400))
def test_no_attempt_is_lost_and_no_minute_has_more_events_than_it_may(
    attempts: list[tuple[str, str]],
) -> None:
    ledger = Ledger()
    asyncio.run(appended(attempts, ledger))
    told = ledger.told[0] if ledger.told else {}
    assert sum(told.values()) == len(attempts)
    assert len(told) <= MAX_EVENTS
    kept = {key for key in told if key != (SYSTEM, OTHER)}
    assert kept <= set(attempts)
    assert ((SYSTEM, OTHER) in told) == (len(set(attempts)) > MAX_EVENTS - 1)
    for key in kept:
        assert told[key] == attempts.count(key)


async def test_what_could_not_be_appended_is_appended_with_the_next_minute() -> None:
    denials, ledger = Denials(), Ledger(failures=2)
    denials.count("pia", "a")
    counting = asyncio.create_task(denials.run(ledger.submit, minute_s=0.001))
    await until(lambda: not ledger.failures)
    for number in range(2 * MAX_EVENTS):
        denials.count("pia", f"b{number}")
    await until(lambda: bool(ledger.told))
    denials.close()
    await counting
    assert sum(sum(told.values()) for told in ledger.told) == 1 + 2 * MAX_EVENTS
    assert all(len(told) <= MAX_EVENTS for told in ledger.told)
    assert ledger.told[0]["pia", "a"] == 1
