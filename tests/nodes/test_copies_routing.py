"""Requests about a model that is loaded at several nodes: any copy answers, and another one if it fails."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import pytest_asyncio
from support import models
from support.http import ENDLESS, ONE, Answer, when
from support.models import save
from support.postgres import join_shared_server
from support.reachable import (
    ReachableNode,
    forwarded,
    loaded_at_all,
    reachable_node,
    reachable_nodes,
    send,
)
from support.replicas import make_ledger
from support.workers import until

from features.nodes.commands import EndNode
from features.nodes.facts import NodeLeft
from loadledger import AsyncClient
from server.appkeys import CONSUMER, LOG

INFER, MAX_QUEUE = "/v2/models/m/infer", 50
BODY = json.dumps({"inputs": [ONE]}).encode()
COPIES, LOAD, NODE, ADDRESS = (
    "Loadledger-Copies",
    "Loadledger-Load",
    "Loadledger-Node",
    "Loadledger-Node-Address",
)

DEADLY = {"name": "x", "shape": [5], "datatype": "INT64", "data": [1] * 5}
"""Input that kills a worker of `crash_on_rows(5)`."""
MODELS = {
    "m": models.add(1),
    "loop": models.counting_loop(),
    **dict.fromkeys(("crash-a", "crash-c"), models.crash_on_rows(5)),
    **dict.fromkeys(("dying-a", "dying-c", "lost"), models.counting_loop()),
}

Nodes = Sequence[ReachableNode]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nodes]:
    """Three nodes; the models are loaded at the first two."""
    postgres, folder = await join_shared_server(), tmp_path_factory.mktemp("nodes")
    async with (
        postgres.database(make_ledger) as ledger,
        reachable_nodes(ledger.server_url, folder, "a", "b", inference_queue=MAX_QUEUE) as owners,
    ):
        for model_id, model in MODELS.items():
            save(model, folder / "repository", model_id)
            await loaded_at_all(owners, model_id)
        async with reachable_node(ledger.server_url, folder, "c") as other:
            yield *owners, other


async def ask(node: ReachableNode, path: str = INFER, body: bytes = BODY) -> Answer:
    return await node.api.post(path, data=body, roles=("infer",), subject="pia")


def in_flight(node: ReachableNode, model_id: str = "loop") -> int:
    return node.api.worker(model_id).in_flight


def position_at(node: ReachableNode, model_id: str = "m") -> str:
    [load] = [each for each in node.app[CONSUMER].loads.values() if each.model_id == model_id]
    model = node.node.log.state.models[model_id]
    serving = model.find_serving(load.job_id)
    assert serving is not None
    return f"{model_id}/1;position={serving.position}"


async def test_copy_answers_at_its_own_node(nodes: Nodes) -> None:
    for node in nodes[:2]:
        for path in (INFER, "/v2/models/m/versions/1/infer"):
            answer = await ask(node, path)
            assert answer.headers[NODE] == node.name
            assert answer.headers["Loadledger-Model"] == position_at(node)
            assert set(answer.headers[COPIES].split(" ")) == {each.address for each in nodes[:2]}
            assert not {LOAD, ADDRESS} & answer.headers.keys()
        assert (await node.api.get("/v2/models/m/ready")).headers[NODE] == node.name


async def test_node_without_a_copy_asks_all_in_turn(nodes: Nodes) -> None:
    *owners, other = nodes
    answers = await asyncio.gather(*(ask(other) for _ in range(40)))
    assert {answer.headers[NODE] for answer in answers} == {node.name for node in owners}
    sources = {node.name: position_at(node) for node in owners}
    for answer in answers:
        assert answer.headers["Loadledger-Model"] == sources[answer.headers[NODE]]
        assert LOAD not in answer.headers
        assert len(answer.headers[COPIES].split(" ")) == 2


@asynccontextmanager
async def four_inferences(busy: ReachableNode, idle: ReachableNode, trips: int) -> AsyncIterator[None]:
    """Have a copy run four inferences, when both copies are known to take a while for one."""
    for node in (busy, idle):
        assert (await node.api.infer("loop", {**ENDLESS, "data": [10**5]})).status == 200
    running = [asyncio.create_task(send_loop(busy, idle, trips)) for _ in range(4)]
    await until(lambda: in_flight(busy) == 4)
    yield
    for task in running:
        task.cancel()
    await until(lambda: not in_flight(busy))


async def send_loop(
    node: ReachableNode, sender: ReachableNode, trips: int = ENDLESS["data"][0], model_id: str = "loop"
) -> Answer:
    """Have a node run an inference, as if another one had forwarded it."""
    fields = forwarded(sender, node, model_id=model_id)
    body = {"inputs": [{**ENDLESS, "data": [trips]}]}
    return await node.api.send("POST", f"/v2/models/{model_id}/infer", roles=(), headers=fields, json=body)


async def test_busy_copy_leaves_requests_to_the_other(nodes: Nodes) -> None:
    busy, idle, _ = nodes
    async with four_inferences(busy, idle, ENDLESS["data"][0]):
        answer = await busy.api.infer("loop", {**ENDLESS, "data": [5]})
        assert (answer.status, answer.headers[NODE]) == (200, idle.name)
        assert answer.headers[ADDRESS] == idle.address
    assert busy.node.spread._sent == {}


async def test_busy_copy_answers_if_the_other_is_not_reached(nodes: Nodes) -> None:
    busy, idle, _ = nodes
    async with four_inferences(busy, idle, 10**5):
        await idle.proxy.cut()
        answers = [await busy.api.infer("loop", {**ENDLESS, "data": [5]}) for _ in range(2)]
        idle.proxy.heal()
    assert [(answer.status, answer.headers[NODE]) for answer in answers] == [(200, busy.name)] * 2


async def test_forwarded_request_gets_the_figures_of_the_copy(nodes: Nodes) -> None:
    answers = [await send(nodes[1], INFER, forwarded(nodes[2], nodes[1])) for _ in range(2)]
    answer = answers[-1]  # by now it has a mean
    in_flight, _, service_us = answer.headers[LOAD].partition(";")
    assert (in_flight, int(service_us) > 0) == ("0", True)
    assert COPIES not in answer.headers


async def test_unreachable_copy_is_avoided(nodes: Nodes) -> None:
    gone, left, other = nodes

    async def ask_at_once() -> list[Answer]:
        answers = await asyncio.gather(*(ask(other) for _ in range(20)))
        assert {answer.status for answer in answers} == {200}
        assert {answer.headers[NODE] for answer in answers} == {left.name}
        return answers

    await gone.proxy.cut()
    # A busy copy is not chosen again and again; once the other one was not reached, it is not named.
    await when(ask_at_once, lambda answers: any(COPIES not in answer.headers for answer in answers))
    gone.proxy.heal()


async def test_client_spreads_over_the_copies(nodes: Nodes) -> None:
    *owners, other = nodes
    values = np.ones(1, np.float32)
    await when(lambda: ask(other), lambda answer: COPIES in answer.headers)  # both have been reached
    before = [served(node) for node in owners]
    async with AsyncClient(other.api.url, token=other.api.token("infer")) as client:
        for _ in range(5):
            answers = await asyncio.gather(*(client.infer("m", {"x": values}) for _ in range(10)))
            assert [answer["y"].item() for answer in answers] == [2.0] * 10
    counts = [served(node) - count for node, count in zip(owners, before, strict=True)]
    assert sum(counts) == 50
    assert min(counts) > 0


def served(node: ReachableNode) -> int:
    return sum(load.statistics.requests for load in node.app[CONSUMER].loads.values() if load.model_id == "m")


@pytest.mark.parametrize("asked", ["a", "c"])
async def test_inference_that_kills_its_worker_spares_the_other_copy(nodes: Nodes, asked: str) -> None:
    model_id, [node] = f"crash-{asked}", [each for each in nodes if each.name == asked]
    workers = [each.api.worker(model_id) for each in nodes[:2]]
    assert (await node.api.infer(model_id, DEADLY)).refusal == (503, "worker_died")
    assert sorted(worker.dying for worker in workers) == [False, True]
    assert (await node.api.infer(model_id, {**DEADLY, "shape": [1], "data": [1]})).status == 200


@pytest.mark.parametrize("asked", ["a", "c"])
async def test_queued_inference_of_dead_worker_moves_to_another_copy(nodes: Nodes, asked: str) -> None:
    dying, left, other = nodes
    model_id, [node] = f"dying-{asked}", [each for each in nodes if each.name == asked]
    begun = asyncio.create_task(send_loop(dying, other, model_id=model_id))
    await until(lambda: in_flight(dying, model_id) == 1)
    other.node.spread.avoid(left.name, time.monotonic() + 60)
    queued = asyncio.create_task(node.api.infer(model_id, {**ENDLESS, "data": [5]}))
    await until(lambda: in_flight(dying, model_id) == 2)
    dying.api.worker(model_id).kill()
    assert (await begun).refusal == (503, "worker_died")
    answer = await queued
    assert (answer.status, answer.headers[NODE]) == (200, left.name)
    other.node.spread.avoid(left.name, 0.0)  # no more


async def test_full_queue_of_a_copy_leaves_requests_to_the_other(nodes: Nodes) -> None:
    busy, idle, other = nodes
    running = [asyncio.create_task(send_loop(busy, other)) for _ in range(MAX_QUEUE)]
    await until(lambda: in_flight(busy) == MAX_QUEUE)
    assert (await send_loop(busy, other)).refusal == (503, "inference_queue_full")
    for node in (busy, other):
        answer = await node.api.infer("loop", {**ENDLESS, "data": [5]})
        assert (answer.status, answer.headers[NODE]) == (200, idle.name)
    for task in running:
        task.cancel()
    await until(lambda: not in_flight(busy))


async def test_wait_for_a_lost_node_ends_at_another_copy(nodes: Nodes) -> None:
    gone, left, other = nodes  # the last test: the model's copy at the first one ends
    log, sent = other.app[LOG], other.node.spread._sent
    gone.proxy.swallow()
    running = list[asyncio.Task[Answer]]()
    while (gone.name, "lost") not in sent:
        running.append(asyncio.create_task(other.api.infer("lost", {**ENDLESS, "data": [5]})))
        await until(lambda: (gone.name, "lost") in sent or running[-1].done())
    await log.submit(EndNode(NodeLeft(gone.name, log.state.registers.nodes[gone.name].epoch)))
    answers = await asyncio.gather(*running)
    assert {(answer.status, answer.headers[NODE]) for answer in answers} == {(200, left.name)}
    gone.proxy.heal()
