"""One version after the other under clients that never pause: none of them notices.

`make soak` swaps 1,000 times.
"""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from support.fleet import (
    Fleet,
    Source,
    agreed,
    check_ends,
    check_inference,
    check_sources,
    question,
    repeated,
    settled,
)
from support.process import PREPARING, Server, events, serving, verified
from support.soak import new_dice, of_both, tell

from server.config import Config

SWAPS = of_both(short=10, long=1000)
CLIENTS = 8


@dataclass
class Asking:
    """Clients of one model, until they are told that it is over."""

    server: Server
    model_id: str
    on: bool = True
    answers: int = 0
    sources: set[Source] = field(default_factory=set)

    async def ask(self, dice: random.Random) -> None:
        """Ask once; there is an answer, and it is that of the version that it names."""
        asked = question(dice)
        answer = await self.server.api.infer(self.model_id, asked)
        assert answer.status == 200, answer
        self.sources.add(check_inference(self.model_id, asked, answer))
        self.answers += 1


async def test_no_request_of_eight_clients_fails_while_one_version_after_the_other_takes_over(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path / "repository", 1)
    fleet.write()
    [model_id] = fleet.ids
    config = Config(repository=fleet.root, data=tmp_path / "data")
    dice = new_dice()
    limits = ("--limit-management=off", "--limit-inference=off", "--limit-reads=off")
    async with serving(config, *limits, environment=PREPARING) as server:
        await server.api.load(model_id, version=2)
        asking = Asking(server, model_id)
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                own = random.Random(dice.random())
                group.create_task(repeated(lambda own=own: asking.ask(own), lambda: asking.on))  # type: ignore[misc]
            for number in range(SWAPS):
                job = await server.api.load(model_id, version=1 + number % 2)
                assert job["parameters"]["strategy"] == "beside"
            asking.on = False
        await settled(server)
        loaded = await agreed(server)
        assert [model["version"] for model in loaded.values()] == [2 - SWAPS % 2]
        assert await server.stop() == 0
        assert server.output.read_text() == ""
    verified(config)
    log = await events(config)
    check_sources(log, asking.sources)
    assert list(check_ends(log).values()).count("ModelUnloaded") == SWAPS
    versions = len({source.position for source in asking.sources})
    tell(f"{SWAPS} swaps, {asking.answers} answers of {versions} loads, none failed")
    assert {source.version for source in asking.sources} == {1, 2}
