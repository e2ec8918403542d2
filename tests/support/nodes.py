"""Servers in this process as nodes of one ledger, with one repository and the same keys of tokens."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server.auth.keys import ensure_data_dir, keys_folder
from server.config import Config
from support.http import Json, LocalApi, application
from support.postgres import Database


@asynccontextmanager
async def local_node(
    ledger: Database | str, folder: Path, name: str, **settings: Any
) -> AsyncIterator[LocalApi]:
    """Serve a node over `repository` in a folder; its data are in a folder of its name.

    Args:
        ledger: the database, or its URL for servers.
        folder: of all nodes.
        name: of this one. No other node can reach it by its address, unless the settings have another.
        settings: other than the usual ones.
    """
    usual = {
        "repository": folder / "repository",
        "data": folder / name,
        "node_name": name,
        "node_address": f"http://{name}",
        "ledger": ledger if isinstance(ledger, str) else ledger.server_url,
        "visible_devices": "none",
    }
    config = Config(**{**usual, **settings})
    config.repository.mkdir(exist_ok=True)
    share_keys(folder, config.data)
    async with application(config) as api:
        yield api


def share_keys(folder: Path, data: Path) -> None:
    """Give a data directory the keys of tokens that all nodes of a folder have."""
    ensure_data_dir(folder / "keys")
    if not keys_folder(data).exists():
        shutil.copytree(keys_folder(folder / "keys"), keys_folder(data))


async def list_nodes(api: LocalApi) -> dict[str, Json]:
    """Return the nodes that a server lists, by name."""
    answer = await api.get("/api/v1/nodes", roles=("infer",))
    assert answer.status == 200
    return {node["id"]: node for node in answer.json["nodes"]}
