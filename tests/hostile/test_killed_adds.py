"""kill -9 of `add` at random moments of its download and its upload; `make hostile` does so 50 times.

No version is visible until all of it is there, and each further command goes on where it was: it asks the
source for the rest of a file.
"""

import asyncio
import random
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.http import LocalApi
from support.origins import HANG, Asked, RangedFile, serving_site
from support.servers import MODULE, clean_environment
from support.sources import environment_of
from support.uploads import staged
from support.workers import until

from events.audit.verify import verify

KILLS = of_both(short=3, long=50)
SOON_S, LATE_S, UPLOAD_S = 0.3, 1.0, 0.15
"""A download begins within half a second; its upload takes a quarter of one."""
MODEL = models.weights(40).SerializeToString()
VERSION = "/api/v1/models/m/versions/1"
PINNED = f"sha256:{sha256(MODEL).hexdigest()}"


@dataclass
class Source:
    """Sends a random part of what is asked for and then nothing, or all of it while it is `open`."""

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
        return head + b"\r\n\r\n" + body[: self.dice.randrange(len(body) + 1)] + HANG


@dataclass
class Adder:
    """Runs the command, again and again."""

    api: LocalApi
    source: str
    environment: dict[str, str]

    async def start(self) -> Process:
        me = {"LOADLEDGER_URL": self.api.url, "LOADLEDGER_TOKEN": self.api.token("admin")}
        command = (*MODULE, "add", "m", self.source, "--version", "1", "--digest", PINNED)
        environment = clean_environment() | self.environment | me
        return await create_subprocess_exec(*command, env=environment, stdout=DEVNULL)

    async def kill_after(self, life_s: float, *, uploads: bool) -> bool:
        """Kill it so long after its start, or after its upload's; return whether it had ended before."""
        process = await self.start()
        if uploads:
            await until(lambda: bool(staged(self.api.config.repository)) or process.returncode is not None)
        await asyncio.sleep(life_s)  # a random moment
        if process.returncode is None:
            process.kill()
        return await process.wait() == 0


def visible(repository: Path) -> dict[str, bytes]:
    """Return the contents of all files by path; uploads are not looked into, as the server may end one."""
    shown = [each for top in repository.glob("[!.]*") for each in (top, *top.rglob("*"))]
    return {each.relative_to(repository).as_posix(): each.read_bytes() for each in shown if each.is_file()}


async def test_killed_add_leaves_no_half_version_and_goes_on(api: LocalApi, tmp_path: Path) -> None:
    repository = api.config.repository
    dice, whole = new_dice(), {"m/1/model.onnx": MODEL}
    slow = Source(dice)
    async with serving_site(slow) as site:
        adder = Adder(api, site.url(), environment_of(site, tmp_path))
        while slow.counts["kills"] < KILLS:
            slow.is_open = dice.random() < 1 / 2  # then it is killed in its upload
            life_s = dice.uniform(0, UPLOAD_S) if slow.is_open else dice.uniform(SOON_S, LATE_S)
            has_ended = await adder.kill_after(life_s, uploads=slow.is_open)
            slow.counts["ended" if has_ended else "kills"] += 1
            found = visible(repository)
            assert found in (whole, {})
            assert found == whole or not has_ended
            slow.counts["in mid-upload"] += not found and bool(staged(repository))
            if found:  # the answer to its commit may have been lost
                slow.counts["added"] += 1
                assert (await api.send("DELETE", VERSION)).status == 204
        slow.is_open = True
        while await (await adder.start()).wait():  # a commit that was on its way has come
            assert (await api.send("DELETE", VERSION)).status == 204
        assert visible(repository) == whole
        assert [*(tmp_path / "cache/loadledger").iterdir()] == []
    assert verify(api.ledger).finding is None
    tell(f"adds that were killed: {as_text(slow.counts)}")
