"""Sources of a running server: a hub with models of which one never ends, and the server's trust in it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Thread

from support import models
from support.origins import COMMIT, HANG, Asked, Hub, RangedFile, Site, answer, serving_site, write_authority
from support.servers import Server, standing

MODEL = models.weights(4).SerializeToString()
SHA256 = sha256(MODEL).hexdigest()
NAMED, RESOLVED = "hf://org/repo@main", f"hf://org/repo@{COMMIT}"
"""A name that moves, and one of what it means, which does not."""
SLOW = f"{NAMED}/slow.onnx"
"""A file of the same repository, of which half arrives, and then nothing more."""
_SLOW_MODEL = models.weights(4, seed=1).SerializeToString()
SLOW_SHA256 = sha256(_SLOW_MODEL).hexdigest()
_HUB = Hub({"model.onnx": MODEL, "slow.onnx": _SLOW_MODEL}, large=frozenset({"model.onnx", "slow.onnx"}))


def reply(asked: Asked) -> bytes:
    """Answer as the hub, and as a site with a model at each path that ends in .onnx."""
    if asked.path.startswith("/cdn/slow.onnx"):
        return answer(200, _SLOW_MODEL[: len(_SLOW_MODEL) // 2], content_length=len(_SLOW_MODEL)) + HANG
    if asked.path.endswith(".onnx") and not asked.path.startswith("/org/"):
        return RangedFile(MODEL)(asked)
    return _HUB(replace(asked, path=asked.path.replace(f"/revision/{COMMIT}", "/revision/main")))


def environment_of(site: Site, folder: Path) -> dict[str, str]:
    """Return the variables of a server whose hub is this site, and which may fetch from there only."""
    return {
        "HF_ENDPOINT": site.url(""),
        "LOADLEDGER_SOURCES": f"hf://org https://{site.host}",
        "SSL_CERT_FILE": write_authority(folder),
    }


@contextmanager
def standing_site() -> Iterator[Site]:
    """Serve the site in a thread, for tests that block."""
    loop, context = asyncio.new_event_loop(), serving_site(reply)
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def standing_fetcher(site: Site, root: Path) -> Iterator[Server]:
    """Start `serve`, which may fetch from the site, on an empty repository in a folder."""
    (root / "repository").mkdir()
    with standing(root / "repository", environment=environment_of(site, root)) as server:
        yield server
