"""kill -9 of `add` at random moments of its download and its upload; `make hostile` does so 50 times.

No version is visible until all of it is there, and each further command goes on where it was: it asks the
source for the rest of a file.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.origins import HANG, Asked, RangedFile, serving_site
from support.servers import MODULE, Server, clean_environment, serving, verified
from support.sources import environment_of
from support.uploads import files_in, staged

from server.config import Config

KILLS = of_both(short=3, long=50)
SOON_S, LATE_S = 0.3, 1.5
"""A download begins half a second after its command, and the upload ends another half later."""
MODEL = models.weights(40).SerializeToString()
PINNED = f"sha256:{sha256(MODEL).hexdigest()}"


@dataclass
class Source:
    """Sends what is asked for, or a random part of it and then nothing, unless it is `open`."""

    dice: random.Random
    is_open: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    _file: RangedFile = field(default_factory=lambda: RangedFile(MODEL))

    def __call__(self, asked: Asked) -> bytes:
        self.counts["continued" if "range" in asked.headers else "begun"] += 1
        reply = self._file(asked)
        if self.is_open or self.dice.random() < 1 / 2:
            return reply
        head, _, body = reply.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n" + body[: self.dice.randrange(len(body) + 1)] + HANG


async def add(server: Server, source: str, environment: dict[str, str], life_s: float | None) -> bool:
    """Run the command; return whether it ended before it was killed."""
    me = {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": server.api.token("admin")}
    command = (*MODULE, "add", "m", source, "--version", "1", "--digest", PINNED)
    process = await asyncio.create_subprocess_exec(
        *command, env=clean_environment() | environment | me, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(life_s):
            assert await process.wait() == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
    return True


def visible(repository: Path) -> dict[str, bytes]:
    return {path: content for path, content in files_in(repository).items() if not path.startswith(".")}


async def test_killed_add_leaves_no_half_version_and_goes_on(config: Config, tmp_path: Path) -> None:
    dice, whole = new_dice(), {"m/1/model.onnx": MODEL}
    slow = Source(dice)
    async with serving_site(slow) as site, serving(config) as server:
        environment = environment_of(site, tmp_path)
        while slow.counts["kills"] < KILLS:
            has_ended = await add(server, site.url(), environment, dice.uniform(SOON_S, LATE_S))
            slow.counts["ended" if has_ended else "kills"] += 1
            is_there = (await server.api.get("/api/v1/models/m")).status == 200
            assert visible(config.repository) == (whole if is_there else {})
            slow.counts["in mid-upload"] += not is_there and bool(staged(config.repository))
            assert is_there or not has_ended
            if is_there:  # the answer to its commit may have been lost
                slow.counts["added"] += 1
                assert (await server.api.send("DELETE", "/api/v1/models/m/versions/1")).status == 204
        slow.is_open = True
        assert await add(server, site.url(), environment, None)
        assert visible(config.repository) == whole
        assert [*(tmp_path / "cache/loadledger").iterdir()] == []
        await server.stop()
    verified(config)
    tell(f"adds that were killed: {as_text(slow.counts)}")
