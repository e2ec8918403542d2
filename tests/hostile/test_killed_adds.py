"""kill -9 of the server at random moments of an add from a source; `make hostile` does so 100 times.

No version is visible until all of it is there. What was fetched stays only while its job has not ended, and
is gone on with: the source is asked for the rest.
"""

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.http import Api
from support.origins import HANG, Asked, RangedFile, serving_site, write_authority
from support.servers import Server, serving, verified
from support.uploads import files_in, staged

from server.config import Config

KILLS = of_both(short=2, long=100)
LIFE_S = 1.0
"""A fetch begins within half a second."""
MODEL = models.slow_identity(side=400).SerializeToString()
"""640 KB."""
PINNED = f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
VERSION = "/api/v1/models/m/versions/1"


@dataclass
class SlowSite:
    """Sends a random part of what is asked for, and then nothing, until it is `open`."""

    dice: random.Random
    is_open: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    _file: RangedFile = field(default_factory=lambda: RangedFile(MODEL))

    def __call__(self, asked: Asked) -> bytes:
        self.counts["continued" if "range" in asked.headers else "begun"] += 1
        reply = self._file(asked)
        if self.is_open:
            return reply
        head, _, body = reply.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n" + body[: self.dice.randrange(len(body) // 4)] + HANG


async def check_left(server: Server, config: Config, dice: random.Random) -> None:
    """Check what a killed server left: no version, and an add that goes on; sometimes end it."""
    assert (await server.api.get("/api/v1/models/m")).status == 404
    for job in [job for job in await server.api.jobs() if job["status"] in {"pending", "in_progress"}]:
        if dice.random() < 1 / 3:
            await server.api.post(f"/api/v1/jobs/{job['id']}/cancel")
            assert (await server.api.ended(job["id"]))["status"] == "cancelled"
            assert staged(config.repository) == []


async def ask(api: Api, source: str) -> None:
    """Ask for the add, unless it goes on from a life before."""
    answer = await api.send("PUT", VERSION, json={"source": source, "digest": PINNED})
    assert answer.status in {202, 409}, answer


async def test_add_of_killed_server_leaves_no_version_and_goes_on(config: Config, tmp_path: Path) -> None:
    dice = new_dice()
    slow = SlowSite(dice)
    environment = {"SSL_CERT_FILE": write_authority(tmp_path)}
    async with serving_site(slow) as site:
        sources = f"--sources=https://{site.host}"
        for _ in range(KILLS):
            async with serving(config, sources, environment=environment) as server:
                await check_left(server, config, dice)
                await ask(server.api, site.url())
                await asyncio.sleep(dice.uniform(0, LIFE_S))  # a random moment
                await server.kill()
            verified(config)
            slow.counts["kills"] += 1
        slow.is_open = True
        async with serving(config, sources, environment=environment) as server:
            await ask(server.api, site.url())
            for job in await server.api.jobs():
                await server.api.ended(job["id"])
            await server.api.load("m")
            model = await server.api.model("m")
            assert model["versions"] == [1]
            assert model["sources"][0]["source"] == site.url()
            assert files_in(config.repository) == {"m/1/model.onnx": MODEL}
            await server.stop()
    verified(config)
    tell(f"adds of killed servers: {as_text(slow.counts)}")
