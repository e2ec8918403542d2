"""Prints the product modules that a load enters in the server's process: `python -m tools.loadtrace`.

A load's way begins with its handler, which waits for the job, and ends with the commit of `ModelLoaded`.
Workers are other processes, and imports are no steps, so neither counts.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from types import FrameType

import aiohttp
from aiohttp import web

from events.log import Log
from events.models import ModelState
from server.app import create_app
from server.appkeys import LOG
from server.auth.keys import ensure_data_dir, sign_token
from server.config import Config

ROOT = Path(__file__).parent.parent
PRODUCT = tuple(
    f"{ROOT}/{package}/"
    for package in ("answers", "events", "features", "loadledger", "nodes", "runtime", "server")
)
MODEL = "digits"
"""Of `examples`."""
BESIDE = "beside it"
FOLLOWERS = frozenset({"denials", "presence", "streams", "tails", "time series", "upkeep", "uploads"})
"""Names of the tasks that no load waits for: commits and timers wake them."""


class Profiler:
    """Records the modules of each load, by the load's name, and what `FOLLOWERS` enter beside all of them."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {BESIDE: set()}
        self._log: Log | None = None

    def follow(self, load: str, log: Log) -> None:
        """Record the next load, which this log gets."""
        self._modules = self.found[load] = set()
        self._callers, self._before = set[FrameType](), _serving_load(log)
        self._log = log

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Record a call, in any thread; a coroutine that goes on is called again, its callers first."""
        code = frame.f_code
        if self._log is None or event != "call" or not code.co_filename.startswith(PRODUCT):
            return
        if code.co_name == "load_model":
            self._callers = self._callers or set(_callers(frame))
        if not self._callers or frame in self._callers or code.co_name == "<module>":
            return
        if _serving_load(self._log) not in (None, self._before):
            self._log = None
            return
        modules = self.found[BESIDE] if _running_task() in FOLLOWERS else self._modules
        if not code.co_filename.endswith("/__init__.py"):
            modules.add(code.co_filename.removeprefix(f"{ROOT}/"))


def _callers(frame: FrameType) -> Iterator[FrameType]:
    while (caller := frame.f_back) is not None:
        yield caller
        frame = caller


def _serving_load(log: Log) -> str | None:
    model = log.state.models.get(MODEL)
    serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
    return serving.load_job_id if serving is not None else None


def _running_task() -> str | None:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # a thread without a loop
        return None
    return task.get_name() if task is not None else None


async def trace_loads() -> dict[str, set[str]]:
    """Return the modules of each kind of load and those entered beside them, as paths in the tree."""
    profiler = Profiler()
    threading.setprofile(profiler)
    sys.setprofile(profiler)
    try:
        await _trace(profiler)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # ends it
    return profiler.found


async def _trace(profiler: Profiler) -> None:
    """Load a model twice on a new server, and unload it each time."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = Config(repository=folder / "repository", data=folder / "data")
        copytree(ROOT / "examples", config.repository)
        ensure_data_dir(config.data)
        token = sign_token(config.data, "trace", ("admin",), expires_s=600, audience=config.jwt_audience)
        headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=60"}
        runner = web.AppRunner(app := create_app(config))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            async with aiohttp.ClientSession(f"http://{host}:{port}", headers=headers) as client:
                for load in ("first load", "later load"):
                    profiler.follow(load, app[LOG])
                    for verb in ("load", "unload"):
                        async with client.post(f"/api/v1/models/{MODEL}/{verb}", json={}) as answer:
                            assert (await answer.json())["status"] == "completed", await answer.text()
        finally:
            await runner.cleanup()


def _package(module: Path) -> Path:
    return module.parent


if __name__ == "__main__":
    gc.disable()  # a generator that it closes is entered
    for load, found in asyncio.run(trace_loads()).items():
        print(f"{load}: {len(found)} modules")  # noqa: T201 - its result
        for package, paths in groupby(sorted(sorted(map(Path, found)), key=_package), _package):
            print(f"  {package}: {' '.join(path.stem for path in paths)}")  # noqa: T201
