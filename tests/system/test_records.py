"""Recorded inferences of real servers: stopped, killed at each step, on full disks, as nodes, over gRPC."""

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import ANY

import aiohttp
import numpy as np
import pytest
from support import models
from support.cluster import clustered, find_nodes
from support.disks import small_disk
from support.fleet import UNLIMITED, new_dice, of_both, question
from support.grpccalls import GRPC, find_gateway, grpc_client, inference
from support.http import ONE, Answer, Api, Json, when
from support.models import save
from support.postgres import PostgresServer
from support.records import (
    age,
    change_byte,
    check_file,
    check_records,
    files_are_closed,
    find_files,
    killed,
    list_files,
    list_lines,
    patched,
    read_lines,
    verify,
    write_rule,
)
from support.servers import MODULE, Server, events, serving, verified

from features.nodes.facts import NodeLeft
from features.records import files, verification
from features.records.facts import RecordsClosed, RecordsErased
from features.records.files import CLOSED, COMPLETE, OPEN, RecordFile, RecordFiles
from server.config import Config

TORN = b'{"type":"loadledger.inference","id":"half'


async def ask(api: Api, request_id: str, model_id: str = "m") -> Answer:
    headers = {"X-Request-Id": request_id}
    body = {"inputs": [ONE]}
    return await api.post(f"/v2/models/{model_id}/infer", roles=("infer",), json=body, headers=headers)


def ids_of(lines: list[Json]) -> list[str]:
    return [line["id"] for line in lines if line["type"] == "loadledger.inference"]


async def ask_until_gone(api: Api, name: str, answered: list[str]) -> None:
    """Ask `m` until the server is gone, and note the ids of answers."""
    number = 0
    with suppress(aiohttp.ClientError):
        while (await ask(api, f"{name}-{number}")).status == 200:
            answered.append(f"{name}-{number}")
            number += 1


# Stops


async def test_stopped_server_has_closed_and_announced_its_files(config: Config) -> None:
    rule = write_rule(config.repository.parent)
    names = [f"r{number}" for number in range(5)]
    for model_id in ("m", "n"):
        save(models.add(1), config.repository, model_id)
    async with serving(config, *rule) as server:
        for model_id in ("m", "n"):
            await server.api.load(model_id)
            for name in names:
                assert (await ask(server.api, f"{model_id}-{name}", model_id)).status == 200
        assert await server.stop() == 0
        assert server.warnings() == []
    found = await check_records(config)
    wanted = [[f"{model_id}-{name}" for name in names] for model_id in ("m", "n")]
    assert sorted(ids_of(lines) for lines in found.values()) == wanted
    assert verify(config) == (0, "verified: 2 files: 2 as announced, 0 erased, 0 open\n")


def rename(path: Path) -> None:
    path.rename(path.with_stem("00000000-0000-7000-8000-000000000000"))


@pytest.mark.parametrize(
    ("change", "states"),
    [(change_byte, ["changed"]), (Path.unlink, ["missing"]), (rename, ["unknown", "missing"])],
)
async def test_changed_files_are_not_verified(
    config: Config, change: Callable[[Path], None], states: list[str]
) -> None:
    rule = write_rule(config.repository.parent)
    save(models.add(1), config.repository, "m")
    async with serving(config, *rule) as server:
        await server.api.load("m")
        assert (await ask(server.api, "r")).status == 200
        assert await server.stop() == 0
    [(name, file)] = find_files(config).items()
    copy = file.parent.parent.parent / file.name
    copy.write_bytes(file.read_bytes())
    assert verify(config, copy)[0] == 0
    change(file)
    code, said = verify(config)
    assert code == 1
    found = [line.split(": ")[:3] for line in said.splitlines()]
    assert [state for _, _, state in found] == states
    assert ["NOT verified", f"m/{name}", states[-1]] in found
    assert verify(config, "--json")[0] == 1
    change_byte(copy)
    assert f"NOT verified: {copy.parent.name}/{name}: changed" in verify(config, copy)[1]


SLOW_S = 0.03
HURRIED = patched(
    "import time\n"
    "from features.records import files, recorder\n"
    "files.FULL_BYTES, recorder.FLUSH_S, real = 2048, 0.001, files.RecordFiles.give_name\n"
    f"files.RecordFiles.give_name = lambda *each: (time.sleep({SLOW_S}), real(*each))"
)
"""A file is closed after three or four inferences, and gets its name on a slow disk."""


def list_files_slowly(folder: Path) -> list[RecordFile]:
    """List files on a busy machine, which has others when the list is complete."""
    found = files.list_files(folder)
    time.sleep(SLOW_S)
    return found


async def test_files_of_running_server_are_verified(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are opened, closed, announced and erased while they are compared with the ledger."""
    monkeypatch.setattr(verification, "list_files", list_files_slowly)
    rule, answered = write_rule(config.repository.parent), list[str]()
    save(models.add(1), config.repository, "m")
    async with serving(config, *rule, *UNLIMITED, command=HURRIED) as server:
        await server.api.load("m")
        clients = [
            asyncio.create_task(ask_until_gone(server.api, str(client), answered)) for client in range(3)
        ]
        eraser = asyncio.create_task(erase_until_gone(server.api))
        for _ in range(of_both(short=60, long=1000)):
            assert await asyncio.to_thread(verify, config) == (0, ANY)
        assert await server.stop() == 0
        await asyncio.gather(*clients, eraser)
    assert await check_records(config)


async def erase_until_gone(api: Api) -> None:
    """Erase the oldest closed file, again and again, until the server is gone."""
    with suppress(aiohttp.ClientError):
        while True:
            files = await list_files(api)
            if files and files[0]["state"] == "closed":
                path = f"/api/v1/records/files/{files[0]['file']}?reason=a%20test"
                assert (await api.send("DELETE", path)).status in (204, 503)


# Kills


async def live(config: Config, rule: tuple[str, str], command: tuple[str, ...]) -> list[str]:
    """Run a server that kills itself, at the latest when it stops; return the ids that it answered."""
    answered = list[str]()
    async with serving(config, *rule, *UNLIMITED, command=command) as server:
        await server.api.load("m")
        with suppress(aiohttp.ClientError):
            for number in range(4):
                assert (await ask(server.api, f"r{number}")).status == 200
                answered.append(f"r{number}")
        with suppress(ProcessLookupError):
            server.send(signal.SIGTERM)
        assert await server.ended() == -signal.SIGKILL
        await server.nothing_left()
    verified(config)
    assert verify(config)[0] == 0
    return answered


async def mend(config: Config, rule: tuple[str, str]) -> dict[str, list[Json]]:
    """Let the next server complete what the one before left, and return the lines of all files."""
    before = {path.stem for path in find_files(config).values()}
    async with serving(config, *rule, *UNLIMITED) as server:
        files = await files_are_closed(server.api)
        assert {file["file"] for file in files} <= before
        assert await server.stop() == 0
        assert "Traceback" not in server.output.read_text()
    return await check_records(config)


@pytest.mark.parametrize(
    ("step", "before", "is_interrupted"),
    [
        ("write", True, None),
        ("write", False, True),
        ("close_old", False, False),
        ("give_name", True, False),
        ("give_name", False, False),
    ],
    ids=["queued", "written", "closed", "announced", "named"],
)
async def test_server_killed_at_step_keeps_files(
    config: Config, step: str, *, before: bool, is_interrupted: bool | None
) -> None:
    """Written lines are kept; the ledger has their digest, and says whether the end is missing."""
    rule = write_rule(config.repository.parent)
    save(models.add(1), config.repository, "m")
    answered = await live(config, rule, killed(step, before=before))
    left = [path.suffix for path in find_files(config).values()]
    found = await mend(config, rule)
    if is_interrupted is None:
        assert found == {}  # no file had been opened
        return
    is_named = (step, before) == ("give_name", False)
    assert left == [OPEN if is_interrupted else CLOSED if is_named else COMPLETE]
    [lines] = found.values()
    assert ids_of(lines) == [f"r{number}" for number in range(len(ids_of(lines)))]
    assert set(answered) >= set(ids_of(lines)) if step == "write" else answered == ids_of(lines)
    [closed] = [event.data for event in await events(config) if isinstance(event.data, RecordsClosed)]
    assert closed.interrupted is is_interrupted
    assert [line.get("reason") for line in lines][-1:] == (["interrupted"] if is_interrupted else [None])


@pytest.mark.parametrize("torn", [b"", TORN], ids=["whole", "torn"])
async def test_server_killed_while_completing_completes_once(config: Config, torn: bytes) -> None:
    rule = write_rule(config.repository.parent)
    save(models.add(1), config.repository, "m")
    await live(config, rule, killed("write", before=False))
    [path] = find_files(config).values()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    RecordFiles(path.parents[1], (), "").complete(path)  # and the server that did this died then
    assert verify(config)[0] == 0
    path.write_bytes(path.read_bytes() + torn)
    [lines] = (await mend(config, rule)).values()
    assert lines[:-1] == [json.loads(line) for line in whole.splitlines()]
    assert (lines[-1]["type"], lines[-1]["dropped"]) == ("loadledger.dropped", None)


LIVES = of_both(short=3, long=100)
LIFE_S = 1.0


async def test_server_killed_at_random_keeps_announced_files(config: Config) -> None:
    rule, dice, answered = write_rule(config.repository.parent), new_dice(), list[str]()
    save(models.add(1), config.repository, "m")
    for life in range(LIVES):
        async with serving(config, *rule, *UNLIMITED, command=HURRIED) as server:
            await server.api.load("m")
            clients = [
                asyncio.create_task(ask_until_gone(server.api, f"{life}-{client}", answered))
                for client in range(4)
            ]
            await asyncio.sleep(dice.uniform(0, LIFE_S))  # a random moment
            await server.kill()
            await asyncio.gather(*clients)
        assert verify(config)[0] == 0
    found = await mend(config, rule)
    recorded = [name for lines in found.values() for name in ids_of(lines)]
    assert len(recorded) == len(set(recorded))
    assert len(found) > LIVES
    log = [event.data for event in await events(config) if isinstance(event.data, RecordsClosed)]
    assert sum(closed.interrupted for closed in log) <= LIVES
    unanswered = set(recorded) - set(answered)
    assert len(unanswered) <= 4 * LIVES  # those whose answers the clients did not receive


# The end of the time that files are kept


async def test_old_files_are_erased_and_the_ledger_says_so(config: Config) -> None:
    rule = write_rule(config.repository.parent, 'keep = "1h"', 'max_bytes = "10MB"')
    save(models.add(1), config.repository, "m")
    for name in ("old", "large", "new"):
        async with serving(config, *rule) as server:
            await server.api.load("m")
            assert (await ask(server.api, name)).status == 200
            assert await server.stop() == 0
    by_id = {ids_of(read_lines(path))[0]: path for path in find_files(config).values()}
    age(by_id["old"], 3601)
    age(by_id["new"], 3500)
    with by_id["large"].open("ab") as file:
        file.truncate(11_000_000)  # the rule counts bytes, and erases what it has no room for
    old = by_id["old"].read_bytes()
    for _ in range(2):
        async with serving(config, *rule) as server:
            await when(lambda: list_files(server.api), lambda files: len(files) == 1)
            assert await server.stop() == 0
        if not by_id["old"].exists():
            by_id["old"].write_bytes(old)  # as if the server had died before the file was gone
    by_id["old"].unlink()
    erased = [event for event in await events(config) if isinstance(event.data, RecordsErased)]
    assert [(event.actor, event.model_id, event.data) for event in erased] == [
        ("system", "m", RecordsErased(file=by_id["old"].stem, reason="kept for as long as its rule says")),
        ("system", "m", RecordsErased(file=by_id["large"].stem, reason="its rule has no more room")),
    ]
    [lines] = (await check_records(config)).values()
    assert ids_of(lines) == ["new"]
    code, said = verify(config)
    assert (code, said.count(": erased "), said.splitlines()[-1]) == (
        0, 2, "verified: 3 files: 1 as announced, 2 erased, 0 open"
    )  # fmt: skip


# A full disk

DISK_BYTES = 96 * 2**20
LITTLE_BYTES = 3 * 2**20
"""Less than a twentieth of the disk; the ledger has room."""
STOPPED = "inferences are not recorded, and go on: "


async def read_metrics(server: Server) -> dict[str, float]:
    text = (await server.api.get("/metrics", roles=())).body.decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("loadledger_records")]
    return {name.removeprefix("loadledger_records_"): float(value) for name, _, value in lines}


async def test_full_disk_stops_recording_and_no_inference(config: Config, tmp_path: Path) -> None:
    rule = write_rule(tmp_path)
    save(models.add(1), config.repository, "m")
    dropped = 'dropped_total{reason="not_writable"}'
    with small_disk(tmp_path / "small", DISK_BYTES) as disk:
        config = replace(config, data=disk.folder)
        command, settings = (*disk.prefix, *MODULE), (*rule, *UNLIMITED, "--metrics=open")
        informed = {"LOADLEDGER_LOG_LEVEL": "info"}
        async with serving(config, *settings, command=command, environment=informed) as server:
            await server.api.load("m")
            assert (await ask(server.api, "before")).status == 200
            assert ids_of(await list_lines(server.api)) == ["before"]
            disk.fill(LITTLE_BYTES)
            for number in range(6):
                assert (await ask(server.api, f"lost-{number}")).status == 200
                if number == 2:
                    assert ids_of(await list_lines(server.api)) == ["before"]
            metrics = await when(partial(read_metrics, server), lambda seen: seen[dropped] == 6)
            assert (metrics["stopped"], metrics["total"]) == (1, 1)
            [notice] = (await server.api.get("/api/v1/resources")).json["notices"]
            assert notice["title"] == "Inferences are not recorded"
            assert "MiB left" in notice["why"]
            disk.drain()
            assert (await ask(server.api, "after")).status == 200
            lines = await list_lines(server.api)
            assert [line.get("dropped", line["id"]) for line in lines] == ["before", 6, "after"]
            assert (lines[1]["type"], lines[1]["reason"]) == ("loadledger.dropped", "not_writable")
            metrics = await when(partial(read_metrics, server), lambda seen: seen["stopped"] == 0)
            assert (metrics[dropped], metrics["total"]) == (6, 2)
            assert "notices" not in (await server.api.get("/api/v1/resources")).json
            said = await server.logged("inferences are recorded again")
            assert (said.count(STOPPED), said.count("inferences are recorded again")) == (1, 1)
            disk.fill(LITTLE_BYTES)
            for number in range(2):
                assert (await ask(server.api, f"last-{number}")).status == 200
            assert await server.stop() == 0
        [path], copy = find_files(config).values(), disk.copy_ledger(config)
        [closed] = [event for event in await events(copy) if isinstance(event.data, RecordsClosed)]
        lines = check_file(closed, path)
        assert [line.get("dropped", line["id"]) for line in lines] == ["before", 6, "after", 2]


# gRPC


async def test_grpc_call_is_recorded_under_its_id(config: Config) -> None:
    rule = write_rule(config.repository.parent)
    save(models.add(1), config.repository, "m")
    x = np.array([1, 2, 3], np.float32)
    async with serving(config, *GRPC, *rule) as server:
        await server.api.load("m")
        gateway = await find_gateway(server)
        async with grpc_client(gateway.address, server.api.token("infer", subject="pia")) as client:
            answer = client.call("ModelInfer", inference("m", x), request_id="theirs-9")
            assert (await answer).raw_output_contents[0] == (x + 1).tobytes()
        [line] = await list_lines(server.api)
        assert (line["id"], line["subject"], line["status"]) == ("theirs-9", "pia", 200)
        assert [(tensor["name"], tensor["bytes"]) for tensor in line["inputs"]] == [("x", x.nbytes)]


# Nodes


async def test_nodes_record_and_announce_what_they_answered(tmp_path: Path, postgres: PostgresServer) -> None:
    dice, rule = random.Random(1), write_rule(tmp_path)
    async with clustered(tmp_path, postgres, names=("n1", "n2"), settings=rule) as cluster:
        first, second = cluster.nodes.values()
        model_ids = cluster.fleet.ids[:4]
        state = await cluster.load(*model_ids)
        owners, answered = find_nodes(state, model_ids), dict[str, str]()
        assert set(owners.values()) == {"n1", "n2"}
        for node, model_id in product((first, second), model_ids):
            for given in (f"{node.name}-{model_id}", None):  # without one, the node that answers makes it
                name, by = await infer_as(node.api, given, model_id, question(dice))
                assert given in (None, name)
                assert by == owners[model_id]
                answered[name] = by
        assert len(answered) == 4 * len(model_ids)
        for node in (first, second):
            lines = await list_lines(node.api)
            own = sorted(name for name, by in answered.items() if by == node.name)
            assert sorted(ids_of(lines)) == own
            assert {line["source"] for line in lines} == {node.name}
        await second.stop()
        assert not [path for path in find_files(second.config).values() if path.suffix == OPEN]
        await first.catch_up()
        await first.kill()
        await first.start()
        await files_are_closed(first.api)
        log = await events(first.config)
        closed = [(event, event.data) for event in log if isinstance(event.data, RecordsClosed)]
        for node in (first, second):
            files = find_files(node.config)
            own_files = {event.id: each for event, each in closed if each.server == node.name}
            assert own_files.keys() == files.keys()
            assert {each.interrupted for each in own_files.values()} == {node is first}
        [left] = [event for event in log if isinstance(event.data, NodeLeft)]
        assert max(event.position for event, each in closed if each.server == "n2") < left.position
        await first.stop()
        for node, other in ((first, second), (second, first)):
            assert verify(node.config, "--node", node.name)[0] == 0
            assert verify(node.config)[0] == 0
            assert verify(node.config, "--node", other.name)[0] == int(node is first)


async def infer_as(api: Api, request_id: str | None, model_id: str, asked: Json) -> tuple[str, str]:
    """Return the id that the answer has, and the node that answered."""
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    body = {"inputs": [asked]}
    answer = await api.post(f"/v2/models/{model_id}/infer", roles=("infer",), json=body, headers=headers)
    assert answer.status == 200, answer.body
    return answer.headers["X-Request-Id"], answer.headers["Loadledger-Node"]
