"""`GET /api/v1/events/head`: the signed head, its key, and that it is never ahead of the disk."""

import asyncio
import base64
import json
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from support import models
from support.http import LocalApi, application
from support.ledgers import unwritable
from support.servers import events

from events.audit.backup import back_up
from events.audit.kepthead import KEPT_HEAD
from events.audit.signing import HeadSigner, as_signed_head, key_id
from events.errors import RolledBack
from events.sqlite.datalock import LEDGER
from events.types import RollbackAccepted
from server.auth.keys import LEDGER_KEY, KeyProblem, ensure_data_dir, keys_folder, list_keys, open_signer
from server.config import Config

HEAD = "/api/v1/events/head"
Start = Callable[..., Awaitable[LocalApi]]


async def head(api: LocalApi) -> dict[str, Any]:
    answer = await api.get(HEAD, roles=("audit",), subject="ann")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def last_row(api: LocalApi) -> tuple[int, str, str]:
    """Read the head through a connection of its own."""
    with closing(sqlite3.connect(f"{(api.config.data / LEDGER).as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute(
            "SELECT position, lower(hex(hash)), recorded_at FROM events ORDER BY position DESC LIMIT 1"
        ).fetchone()
        return int(row[0]), str(row[1]), str(row[2])


async def test_head_is_the_last_row_of_the_ledger(shared: LocalApi) -> None:
    shared.save(models.add(1), "m")
    first = await head(shared)
    assert (first["position"], first["hash"], first["recorded_at"]) == last_row(shared)
    await shared.load("m")
    second = await head(shared)
    assert second["position"] > first["position"]
    assert (second["position"], second["hash"], second["recorded_at"]) == last_row(shared)


async def test_signature_covers_the_documented_message(shared: LocalApi) -> None:
    shown = await head(shared)
    message = (f"loadledger-head-v1\n{shown['position']}\n{shown['hash']}\n{shown['recorded_at']}\n").encode(
        "ascii"
    )
    key: Any = load_der_public_key(base64.b64decode(shown["public_key"]))
    key.verify(base64.b64decode(shown["signature"]), message)
    assert shown["key_id"] == key_id(base64.b64decode(shown["public_key"]))
    assert as_signed_head(shown).holds()


async def test_ledger_key_signs_no_tokens(shared: LocalApi) -> None:
    data = shared.config.data
    [token_key] = [keys_folder(data) / f"{info.kid}.pem" for info in list_keys(data)]
    key_file = data / "ledger.key"
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
        assert before["hash"] == last_row(shared)[1]
    await shared.load("new")
    assert (await head(shared))["position"] > before["position"]
    assert (await shared.get(f"{HEAD}?x=1", roles=("audit",))).refusal == (400, "invalid_parameter")


async def test_answered_head_is_kept_beside_the_key(start: Start) -> None:
    api = await start()
    answered = await head(api)
    path = api.config.data / KEPT_HEAD
    assert json.loads(path.read_text()) == answered
    api.save(models.add(1), "m")
    await api.load("m")
    await api.client.close()
    kept = as_signed_head(json.loads(path.read_text()))
    assert (kept.statement.position, kept.statement.hash.hex()) == last_row(api)[:2]


async def test_older_ledger_in_the_same_directory_is_refused(start: Start) -> None:
    api = await start()
    await api.client.close()
    ledger = api.config.data / LEDGER
    older = ledger.read_bytes()
    await (await start()).client.close()
    ledger.write_bytes(older)
    with pytest.raises(RolledBack, match="--accept-rollback"):
        await start()
    assert ledger.read_bytes() == older


def forge(data: Path) -> None:
    kept = as_signed_head(json.loads((data / KEPT_HEAD).read_text()))
    forged = HeadSigner(Ed25519PrivateKey.generate())(kept.statement)
    (data / KEPT_HEAD).write_text(json.dumps(forged.members()))


async def test_ledger_without_its_own_head_is_served_once_accepted(start: Start, config: Config) -> None:
    """As somebody leaves it who can write the data directory, and cannot read the ledger's key."""
    await (await start()).client.close()
    forge(config.data)
    with pytest.raises(RolledBack, match="signed by another key"):
        await start()
    async with application(config, accepts_rollback=True):
        pass
    assert [event.type for event in await events(config)].count(RollbackAccepted.TYPE) == 1
    await (await start()).client.close()


async def test_server_killed_before_its_first_event_starts(start: Start, config: Config) -> None:
    ensure_data_dir(config.data)
    kept = as_signed_head(json.loads((config.data / KEPT_HEAD).read_text()))
    assert (kept.statement.position, kept.holds()) == (0, True)
    await start()


async def test_lost_key_is_no_rollback(start: Start, config: Config) -> None:
    await (await start()).client.close()
    (config.data / LEDGER_KEY).unlink()
    await (await start()).client.close()
    assert RollbackAccepted.TYPE not in [event.type for event in await events(config)]


async def test_copy_with_the_keys_of_before_is_served(start: Start, config: Config, tmp_path: Path) -> None:
    """The head that was kept beside the keys is older than the copy, which contains it."""
    await (await start()).client.close()
    restored = Config(repository=config.repository, data=tmp_path / "restored")
    shutil.copytree(config.data, restored.data)
    await (await start()).client.close()
    back_up(config.data / LEDGER, restored.data / LEDGER)
    async with application(restored):
        pass


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
