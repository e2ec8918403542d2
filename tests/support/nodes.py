"""Servers in this process as nodes of one ledger, with one repository."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from support.http import Json, LocalApi, local_server
from support.postgres import Database
from support.reachable import share_keys


@asynccontextmanager
async def local_node(ledger: Database, folder: Path, name: str, **settings: Any) -> AsyncIterator[LocalApi]:
    """Serve as a node with a data directory of its own, over `repository` in a folder."""
    (folder / "repository").mkdir(exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    if not (folder / name / "repository").exists():
        (folder / name / "repository").symlink_to(folder / "repository")
    share_keys(folder, folder / name / "data")
    about = {"ledger": ledger.server_url, "node_name": name, "node_address": f"http://{name}"}
    async with local_server(folder / name, **{**about, **settings}) as api:
        yield api


async def list_nodes(api: LocalApi) -> dict[str, Json]:
    """Return the nodes that a server lists, by name."""
    answer = await api.get("/api/v1/nodes", roles=("infer",))
    assert answer.status == 200
    return {node["id"]: node for node in answer.json["nodes"]}
