"""Events are pushed to receivers that take them, refuse them, or hang; notices and metrics of that."""

import asyncio
from dataclasses import replace

import pytest
from conftest import Start
from support.http import ONE, LocalApi, application
from support.models import add
from support.receivers import (
    answer,
    answer_and_close,
    answer_late,
    close,
    delivered,
    hang,
    list_notices,
    metrics_of,
    metrics_when,
    notice_when,
    receiving,
    tables_of,
    write_raw,
)

from features.notify import app, delivery
from features.records.app import RECORDING
from features.records.files import FOLDER
from features.records.rules import RecordRule
from server.config import Config


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed delivery is sent again at once."""
    monkeypatch.setattr(delivery, "FIRST_BACK_OFF_S", 0.001)
    monkeypatch.setattr(delivery, "LONGEST_BACK_OFF_S", 0.05)


async def load_and_unload(api: LocalApi, *model_ids: str) -> None:
    for model_id in model_ids:
        api.save(add(1), model_id)
        await api.load(model_id)
        await api.unload(model_id)


async def test_receiver_gets_each_event_from_its_first_position(start: Start) -> None:
    async with receiving() as receiver:
        api = await start(tables=receiver.tables(first=2))
        await load_and_unload(api, "m", "n")
        await delivered(api, receiver)
        receiver.check(await api.events(), 2, api.position)
        assert receiver.sequences == list(range(2, api.position + 1))
        await metrics_when(api, metrics_of(receiver, waiting=0))
        assert await list_notices(api) == {}


async def test_receiver_from_later_position_waits_until_it_is_there(start: Start) -> None:
    async with receiving("early") as early, receiving("later") as later:
        tables = {"notify": (*early.tables(first=1)["notify"], *later.tables(first=9)["notify"])}
        api = await start(tables=tables)
        assert api.position < 8
        await delivered(api, early)
        await load_and_unload(api, "m", "n")
        await delivered(api, later)
        later.check(await api.events(), 9, api.position)
        assert await list_notices(api) == {}


async def test_receiver_from_now_gets_later_events_alone(config: Config) -> None:
    async with application(config) as api:
        await load_and_unload(api, "m")
        before = api.position
    async with receiving() as receiver:
        config = replace(config, tables=receiver.tables())
        async with application(config) as api:
            await load_and_unload(api, "n")
            await delivered(api, receiver)
            await metrics_when(api, metrics_of(receiver, waiting=0))
        first, arrived = receiver.sequences[0], len(receiver.arrived)
        assert first > before
        async with application(config) as api:  # with the events of the stop and the start
            await receiver.until(lambda: len(receiver.arrived) > arrived)
            await delivered(api, receiver)
            receiver.check(await api.events(), first, api.position)
        assert len({each.id for each in receiver.arrived}) == len(receiver.arrived)


REFUSALS = {
    "it answered 500": answer(500),
    "it answered 404": answer(404, b"nothing here"),
    "it answered 101": answer(101, Connection="upgrade", Upgrade="another"),
    "it answered 301, and redirects are not followed": answer(301, Location="/other-path"),
    "it answered 308, and redirects are not followed": answer(308, Location="http://127.0.0.1:1/other-path"),
    "the connection failed: ServerDisconnectedError": close,
    "its answer is no HTTP": write_raw(b"220 tests SMTP\r\n\r\n"),
    "it did not answer within 0.5 s": hang,
}


async def test_refused_event_is_sent_again_until_acknowledged(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event is sent before the one before it was acknowledged."""
    monkeypatch.setattr(app, "TIMEOUT_S", 0.5)
    async with receiving() as receiver:
        api = await start(tables=receiver.tables(first=1))
        for number, (why, plan) in enumerate(REFUSALS.items()):
            await delivered(api, receiver)
            receiver.usual, arrived, known = plan, len(receiver.arrived), api.position
            await load_and_unload(api, f"m{number}")
            assert (await notice_when(api, "tests", why)).startswith(f"{api.position - known} of them wait: ")
            await receiver.until(lambda arrived=arrived: len(receiver.arrived) >= arrived + 3)  # type: ignore[misc]
            await metrics_when(api, metrics_of(receiver, waiting=api.position - known, is_failing=True))
            assert {*receiver.sequences[arrived:]} == {known + 1}
            receiver.usual = answer(200, b"thanks")
            await notice_when(api, "tests", "")
        await delivered(api, receiver)
        receiver.check(await api.events(), 1, api.position)
        assert {each.target for each in receiver.arrived} == {receiver.path}


async def test_repeated_delivery_has_new_timestamp_and_signature(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_BACK_OFF_S", 1.01)
    monkeypatch.setattr(delivery, "LONGEST_BACK_OFF_S", 1.01)
    async with receiving() as receiver:
        receiver.plans.extend([answer(500), answer(503)])
        api = await start(tables=receiver.tables(first=1))
        await receiver.until(lambda: len(receiver.arrived) >= 3)
        await load_and_unload(api, "m")
        await delivered(api, receiver)
        attempts = receiver.arrived[:3]
        assert len({(each.id, each.body) for each in attempts}) == 1
        assert len({each.at_s for each in attempts}) == len({each.signatures for each in attempts}) == 3
        receiver.check(await api.events(), 1, api.position)


async def test_receivers_do_not_disturb_each_other(start: Start) -> None:
    released = asyncio.Event()
    async with (
        receiving("slow", usual=answer_late(released)) as slow,
        receiving("sick", usual=answer(500)) as sick,
        receiving("deaf", is_deaf=True) as deaf,
        receiving("good") as good,
    ):
        api = await start(tables=tables_of(slow, sick, deaf, good, first=1))
        await load_and_unload(api, "m", "n")
        await delivered(api, good)
        assert (len(slow.arrived), len(deaf.arrived), len(good.arrived)) == (1, 0, api.position)
        assert await list_notices(api) == {"sick": f"{api.position} of them wait: it answered 500."}
        for each in (slow, sick, deaf):
            await metrics_when(api, metrics_of(each, waiting=api.position, is_failing=each is sick))
        released.set()
        sick.usual = answer(204)
        await delivered(api, slow, sick)
        for each in (slow, sick, good):
            each.check(await api.events(), 1, api.position)
        assert deaf.arrived == []


async def test_connection_that_ends_after_answer_costs_no_event(start: Start) -> None:
    async with receiving(usual=answer_and_close) as receiver:
        api = await start(tables=receiver.tables(first=1))
        await load_and_unload(api, "m", "n")
        await delivered(api, receiver)
        receiver.check(await api.events(), 1, api.position)


async def test_notices_of_records_and_receivers_appear_together(start: Start) -> None:
    async with receiving(usual=answer(500)) as receiver:
        api = await start(tables={**receiver.tables(first=1), "record": (RecordRule(models=("*",)),)})
        (api.config.data / FOLDER).touch()  # in the place of the folder
        api.save(add(1), "m")
        await api.load("m")
        assert (await api.infer("m", ONE)).status == 200
        await api.app[RECORDING].flush()
        answered = await api.get("/api/v1/resources")
        titles = [each["title"] for each in answered.json["notices"]]
        assert titles == ["Inferences are not recorded", "Events are not delivered to tests"]
