"""The signed head over HTTP: what is signed, with which key, and that it is never ahead of the disk."""

import base64
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from support import models
from support.http import LocalApi
from support.models import save

from events.signing import as_signed_head, key_id
from server.app import LEDGER
from server.auth.keys import KeyProblem, keys_folder, list_keys
from server.ledger.key import open_signer

HEAD = "/api/v1/events/head"


async def head(api: LocalApi) -> dict[str, Any]:
    answer = await api.get(HEAD, roles=("audit",), subject="ann")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def last_row(api: LocalApi) -> tuple[int, str, str]:
    """Read the head as anybody can, through a connection of its own."""
    with closing(sqlite3.connect(f"{(api.config.data / LEDGER).as_uri()}?mode=ro", uri=True)) as connection:
        row = connection.execute(
            "SELECT position, lower(hex(hash)), recorded_at FROM events ORDER BY position DESC LIMIT 1"
        ).fetchone()
        return int(row[0]), str(row[1]), str(row[2])


async def test_the_head_is_that_of_the_file_and_moves_with_it(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    first = await head(api)
    assert (first["position"], first["hash"], first["recorded_at"]) == last_row(api)
    assert first["base"] == {"position": 0, "hash": "00" * 32}
    await api.load("m")
    second = await head(api)
    assert second["position"] > first["position"]
    assert (second["position"], second["hash"], second["recorded_at"]) == last_row(api)


async def test_what_is_signed_is_what_the_documentation_says_byte_for_byte(api: LocalApi) -> None:
    told = await head(api)
    message = (
        f"loadledger-head-v1\n{told['position']}\n{told['hash']}\n{told['recorded_at']}\n"
        f"{told['base']['position']}\n{told['base']['hash']}\n"
    ).encode("ascii")
    key: Any = load_der_public_key(base64.b64decode(told["public_key"]))
    key.verify(base64.b64decode(told["signature"]), message)  # raises if it is not so
    assert told["key_id"] == key_id(base64.b64decode(told["public_key"]))
    assert as_signed_head(told).holds()


async def test_the_key_is_the_ledgers_and_none_that_signs_tokens(api: LocalApi) -> None:
    data = api.config.data
    told = await head(api)
    assert base64.b64decode(told["public_key"]) == open_signer(data).public_key
    tokens: list[Any] = [
        load_pem_private_key((keys_folder(data) / f"{info.kid}.pem").read_bytes(), None)
        for info in list_keys(data)
    ]
    ledger: Any = load_pem_private_key((data / "ledger.key").read_bytes(), None)
    assert ledger.private_bytes_raw() not in [key.private_bytes_raw() for key in tokens]
    assert (data / "ledger.key").stat().st_mode & 0o777 == 0o600


async def test_a_key_that_signs_tokens_is_refused_as_the_ledgers(api: LocalApi) -> None:
    data = api.config.data
    (info,) = list_keys(data)
    (data / "ledger.key").write_bytes((keys_folder(data) / f"{info.kid}.pem").read_bytes())
    with pytest.raises(KeyProblem, match="signs tokens"):
        open_signer(data)


async def test_a_head_is_never_ahead_of_what_is_durable(api: LocalApi, repository: Path) -> None:
    save(models.add(1), repository, "m")
    before = await head(api)
    with closing(sqlite3.connect(api.config.data / LEDGER)) as other:
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
        assert (await api.post("/api/v1/models/m/load")).refusal == (503, "log_unavailable")
        assert await head(api) == before
        assert before["hash"] == last_row(api)[1]
        other.execute("DROP TRIGGER full")
    await api.load("m")
    assert (await head(api))["position"] > before["position"]


async def test_the_head_is_for_auditors(api: LocalApi) -> None:
    assert (await api.get(HEAD, roles=("predict",))).refusal == (403, "forbidden")
    assert (await api.get(HEAD, roles=())).refusal == (401, "no_credentials")
    assert (await api.get(f"{HEAD}?x=1", roles=("audit",))).refusal == (400, "invalid_parameter")
