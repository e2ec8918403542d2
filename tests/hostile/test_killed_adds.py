"""kill -9 of `add` at random moments of its download and its upload; `make hostile` does so 50 times.

No version is visible until all of it is there, and each further command goes on: it asks the source for the
rest of a file, and sends a server the files that it lacks.
"""

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support import models
from support.fleet import as_text, new_dice, of_both, tell
from support.origins import Asked, RangedFile, serving_site
from support.servers import MODULE, Server, clean_environment, serving, verified
from support.sources import environment_of
from support.uploads import files_in

from server.config import Config

KILLS = of_both(short=3, long=50)
PARTS = 8
"""Files of the version: a model and weights."""
SIDE = 300
MODEL, WEIGHTS = models.sharded(SIDE, PARTS)
"""Weights by path, 360 KB each."""


@dataclass
class SlowSource:
    """A registry whose blobs are cut at random places, until it is `open`."""

    dice: random.Random
    is_open: bool = False
    counts: Counter[str] = field(default_factory=Counter)


async def add(server: Server, environment: dict[str, str], source: str, life_s: float | None) -> int | None:
    """Run the command, and kill it after a while; return how it ended."""
    me = {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": server.api.token("admin")}
    process = await asyncio.create_subprocess_exec(
        *(*MODULE, "add", "m", source, "--version", "1"), env=clean_environment() | environment | me
    )
    try:
        async with asyncio.timeout(life_s):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
