"""Hostile inputs of all kinds at once: model files, inference bodies, tokens, and what is no HTTP."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from hostile.bodies import Request, make_body
from hostile.conversations import Conversation, Talker, answers, talk
from hostile.mutations import mutate_bytes, mutate_model
from hostile.tokens import Forger
from multidict import CIMultiDict
from onnx import ModelProto, TensorProto
from support import models
from support.campaign import Attack, attacked
from support.fleet import SOAK, as_text, new_dice, tell
from support.http import Json
from support.models import save_bytes
from support.servers import ROOT, address, events, limited

from events.types import LoadFailed, WorkerExited
from runtime.errors import Exit
from server.config import Config

ROUNDS = {"model": 20, "body": 150, "token": 60, "conversation": 60}
"""Of each kind, in the short form."""
LONG_S = {"model": 180.0, "body": 60.0, "token": 30.0, "conversation": 60.0}
"""For each kind, in the long form."""
SETTINGS = ("--memory-budget=1500000000",)
COMMAND = limited(limit_auth_failures="20000/minute", head_timeout_s=2.0, timeout_s=20)
LIMIT_BYTES = 200_000_000
"""Of each mutated model."""
CODES = {
    "invalid_model", "unsafe_file", "warm_up_failed", "out_of_memory", "worker_died", "insufficient_memory",
    "timeout",
}  # fmt: skip
"""With which a mutated model may fail to load."""
MUTATED = "mutated"
"""How the names of mutated models begin."""
QUIET_S = 0.3
"""A server that has not answered a whole request by then waits for more of it."""
SERVER_STATUSES = {501, 503, 505}
"""Answers of the server to what it does not know, or not now."""

FILES: dict[str, ModelProto] = {
    "add": models.add(), "subtract": models.subtract(), "maps": models.zip_map(),
    "optional": models.optional_input(), "options": models.optional_output(),
    "scan": models.running_total(), "loop": models.counting_loop(), "unique": models.distinct_rows(),
    "sequence": models.sequence_input(), "default": models.with_default(), "grown": models.grown(1000),
    "widened": models.widened(1000), "texts": models.strings(), "layers": models.misaligned(side=20),
    "table": models.look_up(), "zeros": models.memory_bomb_on_zeros(1000),
    "external": models.external("w.bin"), "crash": models.crash_on_load(),
    "crash on zeros": models.crash_on_zeros(), "bomb": models.memory_bomb_on_load(),
    "bomb on zeros": models.memory_bomb_on_zeros(),
}  # fmt: skip
ORIGINALS = {name: model.SerializeToString() for name, model in FILES.items()} | {
    f"digits {version}": (ROOT / f"examples/digits/{version}/model.onnx").read_bytes() for version in (1, 2)
}
"""Model files that are mutated."""


def tensor(name: str, datatype: str, *data: object, shape: list[int] | None = None) -> Json:
    shape = [len(data)] if shape is None else shape
    return {"name": name, "shape": shape, "datatype": datatype, "data": [*data]}


ASKED: dict[str, tuple[ModelProto, Request]] = {
    "floats": (models.add(), Request((tensor("x", "FP32", 1, 2, 3),))),
    "doubles": (models.identity(TensorProto.DOUBLE), Request((tensor("x", "FP64", 1.5, -1),))),
    "bytes": (models.identity(TensorProto.UINT8), Request((tensor("x", "UINT8", 0, 255),))),
    "truths": (models.identity(models.BOOL), Request((tensor("x", "BOOL", True, False),))),
    "texts": (models.strings(), Request((tensor("x", "BYTES", "a", "b\u00e9"),))),
    "rows": (models.rows(), Request((tensor("x", "FP32", 1, 2, shape=[1, 2]),))),
    "any": (models.identity_of_any_shape(models.FLOAT), Request((tensor("x", "FP32", 1, shape=[1, 1]),))),
    "table": (models.look_up(), Request((tensor("x", "INT64", 0, 3, shape=[1, 2]),))),
    "optional": (models.optional_input(), Request((tensor("x", "FP32", 1),))),
    "zeros": (models.memory_bomb_on_run(), Request((tensor("shape", "INT64", 2, 2),))),
    "pair": (
        models.subtract(),
        Request(
            (tensor("a", "FP32", 1, 2), tensor("b", "FP32", 3, 4)),
            {"outputs": [{"name": "y"}], "id": "7", "parameters": {"timeout": 1_000_000}},
        ),
    ),
}
"""Models that are loaded all the time, and a right request of each, which is made wrong."""


@dataclass(slots=True)
class Inputs:
    """The kinds of hostile inputs: each method sends one that the generator makes, and checks the outcome."""

    attack: Attack
    numbers: count[int] = field(default_factory=count)

    async def model(self, rng: Random) -> None:
        """Load a mutated model, ask it if it loads, and unload it."""
        api, name = self.attack.server.api, rng.choice(sorted(ORIGINALS))
        model_id = f"{MUTATED}{next(self.numbers)}"
        folder = save_bytes(mutate_model(rng, ORIGINALS[name]), self.attack.config.repository, model_id)
        weights = models.external_bytes()
        if name == "external":
            (folder / "w.bin").write_bytes(mutate_bytes(rng, weights) if rng.random() < 0.3 else weights)
        path = f"/api/v1/models/{model_id}"
        job = (await api.post(f"{path}/load", json={"memory_limit_bytes": LIMIT_BYTES}, wait=60)).json
        outcome = job["error"]["code"] if job["status"] == "failed" else job["status"]
        assert outcome in CODES | {"completed"}, (name, job)
        self.attack.counts[f"model {outcome}"] += 1
        if outcome == "completed":
            await self._ask(model_id)
            ended = (await api.post(f"{path}/unload?force=true", wait=60)).json
            assert ended["status"] == "completed", ended
        shutil.rmtree(folder.parent)

    async def _ask(self, model_id: str) -> None:
        """Ask a mutated model with ones."""
        api = self.attack.server.api
        described = await api.get(f"/v2/models/{model_id}", roles=("infer",))
        if described.status == 200:
            asked = [_ones(each) for each in described.json["inputs"]]
            answer = await api.infer(model_id, *asked, parameters={"timeout": 1_000_000})
            self.attack.counts[f"model answers {answer.status}"] += 1
            assert answer.status < 500 or answer.json["code"] in ("worker_died", "inference_timeout"), answer

    async def body(self, rng: Random) -> None:
        """Send an inference request that is wrong."""
        model_id = rng.choice(sorted(ASKED))
        body = make_body(rng, ASKED[model_id][1])
        answer = await self.attack.server.api.post(
            f"/v2/models/{model_id}/infer",
            roles=("infer",),
            data=body.data,
            headers=CIMultiDict(body.headers),
        )
        code = answer.status if answer.status == 200 else answer.json["code"]
        self.attack.counts[f"body {answer.status} {code}"] += 1
        assert answer.status < 500 or code == "inference_timeout", (model_id, body, answer)

    async def token(self, rng: Random) -> None:
        """Send a request with a token that is wrong, or odd."""
        sent = Forger(self.attack.config).field(rng)
        line = rng.choice(
            (b"GET /api/v1/models", b"GET /api/v1/events", b"GET /x", b"POST /v2/models/x/infer")
        )
        fields = (line + b" HTTP/1.1", b"Host: a", b"Connection: close", b"Authorization: " + sent.content)
        whole = Conversation((b"\r\n".join((*fields, b"", b"")),), 0, "read")
        [(status, _)] = answers(await self._talk(whole, limit_s=20))
        self.attack.counts[f"token {status}"] += 1
        allowed = {200, 404, 400, 401, 403, 429} if sent.is_signed else {400, 401, 429}
        assert status in allowed, (sent, status)

    async def conversation(self, rng: Random) -> None:
        """Send what is no HTTP, or not quite."""
        talker = Talker(self.attack.server.api.token("admin"), "floats")
        sent = talker.conversation(rng)
        received = await self._talk(sent, limit_s=QUIET_S)
        for status, _ in answers(received):
            self.attack.counts[f"conversation {status}"] += 1
            assert status < 500 or status in SERVER_STATUSES, (sent, received)
        self.attack.counts[f"conversation, then {sent.end}"] += 1

    async def _talk(self, conversation: Conversation, limit_s: float) -> bytes:
        host, _, port = address(self.attack.server).rpartition(":")
        return await talk(host, int(port), conversation, limit_s)


def _ones(described: Json) -> Json:
    """Return an input with a few ones, as far as its description allows."""
    shape = [length if 0 <= length <= 8 else 2 for length in described["shape"]][:4]
    elements = 1
    for length in shape:
        elements *= length
    one = {"BYTES": "a", "BOOL": True}.get(described["datatype"], 1)
    return {**described, "shape": shape, "data": [one] * elements}


async def test_hostile_inputs_leave_good_models_alone(config: Config) -> None:
    dice = new_dice()
    for model_id, (model, _) in ASKED.items():
        models.save(model, config.repository, model_id)
    async with attacked(config, *SETTINGS, command=COMMAND) as attack:
        for model_id in ASKED:
            await attack.server.api.load(model_id, memory_limit_bytes=LIMIT_BYTES)
        inputs = Inputs(attack)
        kinds = {inputs.model: 4, inputs.body: 4, inputs.token: 4, inputs.conversation: 24}
        for send, parallel in kinds.items():
            randoms = make_randoms(dice, send.__name__)
            await asyncio.gather(*(repeat(send, randoms) for _ in range(parallel)))
    await _check_exits(config)


def make_randoms(dice: Random, kind: str) -> Iterator[Random]:
    """Yield a generator for each input of a kind, for as many rounds or as long as there are to be."""
    seed, until = dice.randrange(2**32), time.monotonic() + LONG_S[kind]
    for number in count():
        if time.monotonic() > until if SOAK else number == ROUNDS[kind]:
            return
        yield Random(f"{seed} {number}")


async def repeat(send: Callable[[Random], Awaitable[None]], randoms: Iterator[Random]) -> None:
    """Send inputs one after the other, as long as there are generators."""
    for rng in randoms:
        await send(rng)


async def _check_exits(config: Config) -> None:
    """Check that only workers of mutated models ended by themselves, and that failures have a known code."""
    ends = Counter[str]()
    for event in await events(config):
        if isinstance(event.data, LoadFailed):
            assert event.data.code in CODES, event
        if isinstance(event.data, WorkerExited):
            assert (event.model_id or "").startswith(MUTATED), event
            ends[str(Exit(event.data.exit_code, event.data.signal))] += 1
    tell(f"workers of mutated models: {as_text(ends)}")
