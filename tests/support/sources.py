"""Servers in a thread, for commands and clients that block: a hub with models, for one."""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import TypeVar

from support import models
from support.origins import COMMIT, Asked, Hub, RangedFile, Reply, Site, serving_site, write_authority

T = TypeVar("T")

MODEL = models.weights(4).SerializeToString()
SHA256 = sha256(MODEL).hexdigest()
NAMED, RESOLVED = "hf://org/repo@main", f"hf://org/repo@{COMMIT}"
"""A name that moves, and one of what it means, which does not."""
_HUB = Hub({"model.onnx": MODEL}, large=frozenset({"model.onnx"}))


def reply(asked: Asked) -> bytes:
    """Answer as the hub, and as a site with a model at each path of /files/."""
    return RangedFile(MODEL)(asked) if asked.path.startswith("/files/") else _HUB(asked)


def environment_of(site: Site, folder: Path) -> dict[str, str]:
    """Return the variables of a command whose hub is this site, and whose home is a folder."""
    return {
        "HF_ENDPOINT": site.url(""),
        "HF_HOME": str(folder / "hub"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "SSL_CERT_FILE": write_authority(folder),
    }


@contextmanager
def in_thread(context: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter a context in a thread, whose loop runs until it is left."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def standing_site(answer: Reply = reply) -> AbstractContextManager[Site]:
    """Return what serves a site in a thread."""
    return in_thread(serving_site(answer))
