"""The nginx configuration of `docs/deployment.md`, with real nginx and a real server."""

import asyncio
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.http import LIMIT_S, Api, LocalApi, local_server, when
from yarl import URL

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
MAIN = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ worker_connections 100; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {page}
}}
"""
"""What a distribution's nginx.conf has around the page's file, without root."""


def page_configuration(**changes: str) -> str:
    """Return the page's configuration with these directives changed; each has to be there."""
    found = re.search(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    text = found[1]
    for name, value in changes.items():
        text, count = re.subn(rf"\b{name} [^;]+;", f"{name} {value};", text)
        assert count == 1, name
    return text


@asynccontextmanager
async def proxied(server: LocalApi, folder: Path, **changes: str) -> AsyncIterator[Api]:
    """Run nginx before a server, and yield a client of it."""
    program = os.environ.get("NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = page_configuration(listen=f"127.0.0.1:{port}", **changes)
    page = page.replace("127.0.0.1:8080", f"127.0.0.1:{URL(server.url).port}")
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, page=page))
    process = await asyncio.create_subprocess_exec(program, "-c", folder / "nginx.conf", "-p", folder)
    try:
        async with aiohttp.ClientSession() as session:
            api = Api(session, f"http://127.0.0.1:{port}", server.config)
            await when(lambda: is_up(api), bool)
            yield api
    finally:
        process.terminate()
        async with asyncio.timeout(LIMIT_S):
            await process.wait()


async def is_up(api: Api) -> bool:
    try:
        return await status(api) == HTTPStatus.OK
    except aiohttp.ClientConnectorError:
        return False


async def status(api: Api) -> int:
    """Return the status of a probe, nginx's own or the server's."""
    async with api.session.get(f"{api.url}/health/live") as response:
        return response.status


async def test_nginx_passes_tensors_and_events_and_limits_clients(tmp_path: Path) -> None:
    changes = {"limit_conn addresses": "1", "client_header_timeout": "1s"}
    async with (
        local_server(tmp_path, trusted_proxies="127.0.0.1") as server,
        proxied(server, tmp_path, **changes) as api,
    ):
        server.save(models.identity(shape=[None]), "m")
        await api.load("m")
        floats = [float(number) for number in range(100_000)]
        tensor = {"name": "x", "shape": [len(floats)], "datatype": "FP32", "data": floats}
        assert (await api.infer("m", tensor)).json["outputs"][0]["data"] == floats

        token = {"Authorization": f"Bearer {api.token('admin')}"}
        async with api.session.get(f"{api.url}/api/v1/events/stream?after=0", headers=token) as stream:
            assert stream.status == HTTPStatus.OK
            async with asyncio.timeout(LIMIT_S):
                assert await stream.content.readline()  # an event comes while the request is open
            assert await status(api) == HTTPStatus.SERVICE_UNAVAILABLE
            stream.close()
        await when(lambda: status(api), lambda seen: seen == HTTPStatus.OK)

        url = URL(api.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /health/live HTTP/1.1\r\n")  # a head that does not end
        async with asyncio.timeout(LIMIT_S):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
