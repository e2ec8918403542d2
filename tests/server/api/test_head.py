"""`GET /api/v1/events/head`: the signed head, never ahead of the disk, and what it proves at a start."""

import asyncio
import base64
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from support import models
from support.http import LocalApi, application, local_server
from support.ledgers import unwritable
from support.servers import events

from events.audit.backup import back_up
from events.audit.kepthead import KEPT_HEAD, find_rollback
from events.audit.signing import HeadSigner, as_signed_head, key_id
from events.errors import RolledBack
from events.sqlite.datalock import LEDGER
from events.types import RollbackAccepted
from server.auth.keys import LEDGER_KEY, KeyProblem, ensure_data_dir, keys_folder, list_keys, open_signer
from server.config import Config

HEAD = "/api/v1/events/head"

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def head(api: LocalApi) -> dict[str, Any]:
    answer = await api.get(HEAD, roles=("audit",), subject="ann")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def kept_head(data: Path) -> dict[str, Any]:
    """Return what is kept beside the keys."""
    found: dict[str, Any] = json.loads((data / KEPT_HEAD).read_text())
    return found


def last_row(data: Path) -> tuple[int, str, str]:
    """Read the head through a connection of its own."""
    with closing(sqlite3.connect(f"{(data / LEDGER).as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute(
            "SELECT position, lower(hex(hash)), recorded_at FROM events ORDER BY position DESC LIMIT 1"
        ).fetchone()
        return int(row[0]), str(row[1]), str(row[2])


async def test_head_is_the_last_row_signed_and_kept(shared: LocalApi) -> None:
    shared.save(models.add(1), "m")
    first = await head(shared)
    await shared.load("m")
    shown, data = await head(shared), shared.config.data
    assert shown["position"] > first["position"]
    assert (shown["position"], shown["hash"], shown["recorded_at"]) == last_row(data)
    assert kept_head(data) == shown
    message = f"loadledger-head-v1\n{shown['position']}\n{shown['hash']}\n{shown['recorded_at']}\n".encode()
    key: Any = load_der_public_key(base64.b64decode(shown["public_key"]))
    key.verify(base64.b64decode(shown["signature"]), message)
    assert shown["key_id"] == key_id(base64.b64decode(shown["public_key"]))
    assert as_signed_head(shown).holds()


async def test_ledger_key_signs_no_tokens(shared: LocalApi) -> None:
    data = shared.config.data
    [token_key] = [keys_folder(data) / f"{info.kid}.pem" for info in list_keys(data)]
    key_file = data / LEDGER_KEY
    assert base64.b64decode((await head(shared))["public_key"]) == open_signer(data).public_key
    tokens: Any = load_pem_private_key(token_key.read_bytes(), None)
    ledger: Any = load_pem_private_key(key_file.read_bytes(), None)
    assert ledger.private_bytes_raw() != tokens.private_bytes_raw()
    assert key_file.stat().st_mode & 0o777 == 0o600
    key_file.write_bytes(token_key.read_bytes())
    with pytest.raises(KeyProblem, match="signs tokens"):
        open_signer(data)


async def test_head_is_never_ahead_of_durable_events(shared: LocalApi) -> None:
    shared.save(models.add(1), "new")
    before = await head(shared)
    with unwritable(shared.ledger, "LoadRequested"):
        assert (await shared.post("/api/v1/models/new/load")).refusal == (503, "log_unavailable")
        assert await head(shared) == before
        assert before["hash"] == last_row(shared.config.data)[1]
    await shared.load("new")
    assert (await head(shared))["position"] > before["position"]
    assert (await shared.get(f"{HEAD}?x=1", roles=("audit",))).refusal == (400, "invalid_parameter")


async def test_readers_leave_the_writers_locks(shared: LocalApi) -> None:
    """Closing any descriptor of the ledger would end them, and another process might remove the WAL."""
    await head(shared)
    for path in ("models?at=1", "jobs", "events?limit=1", "resources"):
        assert (await shared.get(f"/api/v1/{path}")).status == 200
    inode = f":{(shared.config.data / LEDGER).stat().st_ino}"
    lines = await asyncio.to_thread(Path("/proc/locks").read_text)
    locks = [line.split() for line in lines.splitlines() if f"{inode} " in line]
    ours = [kind for _, kind, _, mode, pid, *_ in locks if pid == str(os.getpid()) and mode == "READ"]
    assert ours == ["POSIX"]


# What the head beside the keys proves at the next start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `data` of a server that ran twice, and `before`, its copy after the first run."""
    folder = tmp_path_factory.mktemp("stopped")
    async with local_server(folder):
        pass
    shutil.copytree(folder / "data", folder / "before")
    async with local_server(folder):
        pass
    return folder


def restored(data: Path, config: Config) -> Path:
    """Restore a data directory for a server with this configuration, and return its ledger."""
    shutil.copytree(data, config.data)
    return config.data / LEDGER


async def count_rollbacks(config: Config) -> int:
    return [event.type for event in await events(config)].count(RollbackAccepted.TYPE)


async def test_head_is_kept_before_the_first_event_and_at_the_stop(stopped: Path, config: Config) -> None:
    ensure_data_dir(config.data)
    first, last = kept_head(config.data), kept_head(stopped / "before")
    assert (first["position"], as_signed_head(first).holds()) == (0, True)
    assert (last["position"], last["hash"]) == last_row(stopped / "before")[:2]


async def test_older_ledger_is_served_once_accepted(stopped: Path, config: Config) -> None:
    ledger, older = restored(stopped / "data", config), (stopped / "before" / LEDGER).read_bytes()
    ledger.write_bytes(older)
    with pytest.raises(RolledBack, match="--accept-rollback"):
        async with application(config):
            pass
    assert ledger.read_bytes() == older
    async with application(config, accepts_rollback=True):
        pass
    assert await count_rollbacks(config) == 1
    assert find_rollback(config.data, ledger, open_signer(config.data).public_key) is None


async def test_head_signed_by_another_key_is_a_rollback(stopped: Path, config: Config) -> None:
    """As somebody leaves it who can write the data directory, and cannot read the ledger's key."""
    ledger, kept = restored(stopped / "data", config), as_signed_head(kept_head(stopped / "data"))
    forged = HeadSigner(Ed25519PrivateKey.generate())(kept.statement)
    (config.data / KEPT_HEAD).write_text(json.dumps(forged.members()))
    _, reason = find_rollback(config.data, ledger, open_signer(config.data).public_key) or (None, "")
    assert "signed by another key" in reason


async def test_lost_key_is_no_rollback(stopped: Path, config: Config) -> None:
    restored(stopped / "data", config)
    (config.data / LEDGER_KEY).unlink()
    async with application(config):
        pass
    assert await count_rollbacks(config) == 0


async def test_copy_with_the_keys_of_before_is_served(stopped: Path, config: Config) -> None:
    """The head that was kept beside the keys is older than the copy, which contains it."""
    back_up(stopped / "data" / LEDGER, restored(stopped / "before", config))
    async with application(config):
        pass
