"""The least that a Python server can do: read a POST and answer a constant, over the same framework and loop.

`python -m bench.constant` prints its port when it is ready and ends when its standard input does.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvloop
from aiohttp import web

HOST = "127.0.0.1"
ANSWER = b'{"outputs":[]}'
STOP_LIMIT_S = 60


@contextmanager
def running() -> Iterator[int]:
    """Run it in a process of its own and yield its port."""
    command = [sys.executable, "-m", "bench.constant"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own module
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise SystemExit("the constant reply did not start; what it wrote stands above")
            yield int(port)
            process.communicate(timeout=STOP_LIMIT_S)
        finally:
            process.kill()


async def answer(request: web.Request) -> web.Response:
    """Read the body and answer."""
    await request.read()
    return web.Response(body=ANSWER, content_type="application/json")


async def serve() -> None:
    """Serve until nobody holds the other end of the standard input."""
    application = web.Application(client_max_size=2**26)
    application.router.add_post("/v2/models/{id}/infer", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    print(site.port, flush=True)
    await ended.wait()
    await runner.cleanup()


if __name__ == "__main__":
    uvloop.run(serve())
