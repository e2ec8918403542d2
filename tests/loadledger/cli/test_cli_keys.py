"""`loadledger token` and `key`: what they create, print and refuse."""

import asyncio
import re
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from support.clients import printed, printed_json, refused
from support.history import opened

from events.sqlite.datalock import LEDGER, lock_data
from server.auth import localtokens
from server.auth.gate import create_verifier
from server.auth.keys import ensure_data_dir, list_keys
from server.config import Config

ALICE = ("--subject=alice", "--role=admin")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory in which a server has run."""

    async def run() -> None:
        async with opened(tmp_path / "data" / LEDGER) as log:
            await log.server_started()
            await log.server_stopped()

    (tmp_path / "data").mkdir(mode=0o700)
    ensure_data_dir(tmp_path / "data")
    asyncio.run(run())
    return tmp_path / "data"


def create(data: Path, *arguments: str, **environment: Any) -> str:
    """Return a new token of alice, an administrator; nothing else may be printed."""
    token = printed("token", f"--data={data}", *ALICE, *arguments, **environment)
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", token)
    return token.strip()


def claims(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def test_token_before_the_first_start_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert "start the server first" in refused("token", f"--data={data}", *ALICE)
    data.mkdir()
    for arguments in (ALICE, ("list",), ("revoke", "x")):
        assert "no server has run" in refused("token", *arguments, f"--data={data}")
    assert [path.name for path in data.iterdir()] == ["lock"]  # no ledger, which a node would refuse


def test_token_is_signed_with_a_key_of_the_directory(data: Path, tmp_path: Path) -> None:
    token = create(data, "--role", "audit")
    assert {"keys", "ledger.key", "ledger.head", LEDGER, "lock"} <= {path.name for path in data.iterdir()}
    assert {stat.S_IMODE((data / name).stat().st_mode) for name in (LEDGER, "ledger.key")} == {0o600}
    principal = create_verifier(Config(repository=tmp_path, data=data)).verify(token, time.time())
    assert (principal.subject, principal.roles) == ("alice", frozenset({"admin", "audit"}))
    printed("token", *ALICE, LOADLEDGER_DATA=str(data))


def test_token_has_lifetime_audience_and_issuer(data: Path) -> None:
    for expires, seconds in (("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1s", 1)):
        made = claims(create(data, "--expires", expires))
        assert made["exp"] - made["iat"] == seconds
    made = claims(create(data))
    assert (made["exp"] - made["iat"], made["aud"], "iss" in made) == (12 * 3600, "loadledger", False)
    made = claims(create(data, LOADLEDGER_JWT_AUDIENCE="there", LOADLEDGER_JWT_ISSUER="me"))
    assert (made["aud"], made["iss"]) == ("there", "me")


def test_token_in_json_repeats_its_claims(data: Path) -> None:
    roles = ("--role=predict", "--role=audit")
    found = printed_json("token", f"--data={data}", "--subject=alice", *roles, "--expires=1h")
    assert found == {
        "token": found["token"],
        "jti": claims(found["token"])["jti"],
        "subject": "alice",
        "roles": ["audit", "predict"],
        "expires_at": f"{datetime.fromtimestamp(claims(found['token'])['exp'], UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kid": list_keys(data)[-1].kid,
    }


def test_token_refuses_options(data: Path) -> None:
    there = f"--data={data}"
    for option, values, words in (
        ("expires", ["", "0s", "-1h", "1", "h", "1.5h", "1w", "1h30m", " 1h", "\u0661h", "9" * 9 + "d"], ""),
        ("subject", ["", "SYSTEM ", "a\nb", "x" * 129], "subject"),
        ("subject", ["al\u00adice"], "U+00AD: it is invisible"),
        ("role", ["", "root"], "admin, audit, predict"),
    ):
        for value in values:
            assert words in refused("token", there, *ALICE, f"--{option}={value}"), value
    assert "--role" in refused("token", there, "--subject=a")
    assert "--subject" in refused("token", there, "--role=admin")
    assert "--data" in refused("token", *ALICE, HOME="")
    assert "LOADLEDGER_JWT_AUDIENCE" in refused("token", there, *ALICE, LOADLEDGER_JWT_AUDIENCE=" ")


def test_tokens_are_listed_and_revoked_without_a_server(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = f"--data={data}"
    first, second = (claims(create(data))["jti"] for _ in range(2))
    assert printed("token", "revoke", option, first) == ""
    again = printed_json("token", "revoke", option, first)
    assert again["revoked_by"].startswith("local:")
    head, *rows = printed("token", "list", LOADLEDGER_DATA=str(data)).splitlines()
    assert head.split()[:3] == ["ID", "SUBJECT", "ROLES"]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [(second, "valid"), (first, "revoked")]
    assert again.pop("issued") == []
    assert printed_json("token", "list", option)["tokens"][1] == again
    assert "`token list`" not in refused("token", "revoke", option, "nope")
    assert printed_json("token", "revoke", option, "idp", "--expires=1h")["subject"] is None
    monkeypatch.setattr(localtokens, "STARTING_S", 0)
    with lock_data(data):
        assert "control.sock" in refused("token", option, *ALICE)
    assert "no server runs" in refused("console", option)


@pytest.mark.parametrize(
    "command", ["token --subject=a --role=admin", "key list", "key rotate", "key revoke x"]
)
def test_unusable_data_directory_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys").write_text("")
    for name in ("file", "data", "file/beneath", "x" * 300):
        assert refused(*command.split(), f"--data={tmp_path / name}")


def test_keys_are_listed_rotated_and_revoked(data: Path) -> None:
    option = ("--data", str(data))
    first = create(data)
    rotated = printed("key", "rotate", *option).strip()
    second = create(data)
    lines = printed("key", "list", *option).splitlines()
    assert [line.split()[0] for line in lines] == [key.kid for key in list_keys(data)]
    assert [line.endswith("signs") for line in lines] == [False, True]
    listed = printed_json("key", "list", *option)["keys"]
    old, new = (jwt.get_unverified_header(token)["kid"] for token in (first, second))
    assert [(each["kid"], each["signs"]) for each in listed] == [(old, False), (rotated, True)]
    assert new == rotated
    assert printed("key", "revoke", *option, old) == ""
    assert len(printed("key", "list", *option).splitlines()) == 1
    rotated_again = printed_json("key", "rotate", *option)
    assert printed_json("key", "revoke", *option, rotated_again["kid"]) == rotated_again
    verifier = create_verifier(Config(repository=data, data=data))
    assert verifier.verify(second, time.time()).subject == "alice"


def test_unknown_key_is_refused(data: Path) -> None:
    create(data)
    before = sorted(data.rglob("*"))
    for kid in ("nope", "../ledger", "20260101T000000000000Z-00000000", "", "%2e", "x" * 5000):
        assert len(refused("key", "revoke", "--data", data, kid)) < 500, kid
    assert sorted(data.rglob("*")) == before
