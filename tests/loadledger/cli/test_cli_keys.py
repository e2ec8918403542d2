"""`loadledger token` and `key`: what they create, print and refuse."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from support.clients import Shell, printed, printed_json, refused
from support.http import LocalApi

from server.auth.keys import ensure_data_dir, list_keys
from server.auth.tokens import TOKENS

ALICE = ("--subject=alice", "--role=admin")


@pytest.fixture
def data(server: LocalApi) -> Path:
    """The data directory of a running server."""
    return server.config.data


def create(data: Path, *arguments: str, **environment: Any) -> str:
    """Return a new token of alice, an administrator; nothing else may be printed."""
    token = printed("token", f"--data={data}", *ALICE, *arguments, **environment)
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", token)
    return token.strip()


def claims(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


@pytest.mark.parametrize(
    "command", ["token --subject=a --role=admin", "token list", "token revoke x", "console"]
)
def test_token_without_a_server_is_refused(tmp_path: Path, command: str) -> None:
    data = tmp_path / "data"
    words = (*command.split(), f"--data={data}")
    assert "start the server first" in refused(*words)
    data.mkdir()
    assert f"no server runs there; start it with `loadledger serve --data {data}`" in refused(*words)
    assert list(data.iterdir()) == []


def test_token_has_the_given_lifetime_or_twelve_hours(data: Path) -> None:
    for options, seconds in ((("--expires", "7d"), 604_800), ((), 12 * 3600)):
        made = claims(create(data, *options))
        assert (made["exp"] - made["iat"], made["aud"], "iss" in made) == (seconds, "loadledger", False)


def test_token_in_json_repeats_its_claims(data: Path) -> None:
    roles = ("--role=infer", "--role=audit")
    found = printed_json("token", f"--data={data}", "--subject=alice", *roles, "--expires=1h")
    assert found == {
        "token": found["token"],
        "jti": claims(found["token"])["jti"],
        "subject": "alice",
        "roles": ["audit", "infer"],
        "expires_at": f"{datetime.fromtimestamp(claims(found['token'])['exp'], UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kid": list_keys(data)[-1].kid,
    }


def test_token_refuses_options(data: Path) -> None:
    there = f"--data={data}"
    for option, value, words in (
        ("expires", "9" * 9 + "d", "expires"),
        ("subject", "al\u00adice", "the subject must be printable"),
        ("role", "", "is not one of 'admin', 'infer', 'audit'"),
    ):
        assert words in refused("token", there, *ALICE, f"--{option}={value}"), value
    assert "--subject" in refused("token", there, "--role=admin")
    assert "--data" in refused("token", *ALICE, HOME="")


def test_tokens_are_listed_and_revoked_with_and_without_a_token(data: Path, server: LocalApi) -> None:
    option, alice = f"--data={data}", Shell(server, "admin")
    tokens = [create(data) for _ in range(3)]
    first, second, third = (claims(token)["jti"] for token in tokens)
    assert alice.prints("models", LOADLEDGER_TOKEN=tokens[2])
    assert alice.prints(f"token revoke {third}") == ""
    assert "the token was revoked" in alice.refused(2, "models", LOADLEDGER_TOKEN=tokens[2])
    assert printed("token", "revoke", option, first) == ""
    again = printed_json("token", "revoke", option, first)
    assert again["revoked_by"].startswith("local:")
    head, *rows = printed("token", "list", LOADLEDGER_DATA=str(data)).splitlines()
    assert head.split()[:3] == ["ID", "SUBJECT", "ROLES"]
    told = [(row.split()[0], row.split()[-1]) for row in rows[:3]]
    assert told == [(third, "revoked"), (second, "valid"), (first, "revoked")]
    assert again.pop("issued") == []
    assert (
        printed_json("token", "list", option)["tokens"][2] == again == alice.json("token list")["tokens"][2]
    )
    assert "unknown_token" in refused("token", "revoke", option, "nope")
    assert printed_json("token", "revoke", option, "idp", "--expires=1h")["subject"] is None
    assert "the server does not listen yet" in refused("console", option)
    server.app[TOKENS].server_url = server.url  # as `serve` does
    for link in (printed("console", "--print", option), printed("console", option), alice.prints("console")):
        assert re.fullmatch(rf"{re.escape(server.url)}/#sign-in=[\w-]{{43}}\n", link)


@pytest.mark.parametrize(
    "command", ["token --subject=a --role=admin", "key list", "key rotate", "key revoke x"]
)
def test_unusable_data_directory_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys").write_text("")
    for name in ("file", "data", "file/beneath", "x" * 300):
        assert refused(*command.split(), f"--data={tmp_path / name}")


def test_keys_are_listed_rotated_and_revoked(tmp_path: Path) -> None:
    option = ("--data", str(tmp_path))
    ensure_data_dir(tmp_path)
    (first,) = list_keys(tmp_path)
    rotated = printed("key", "rotate", *option).strip()
    lines = printed("key", "list", *option).splitlines()
    assert [line.split()[0] for line in lines] == [key.kid for key in list_keys(tmp_path)]
    assert [line.endswith("signs") for line in lines] == [False, True]
    listed = printed_json("key", "list", *option)["keys"]
    assert [(each["kid"], each["signs"]) for each in listed] == [(first.kid, False), (rotated, True)]
    assert printed("key", "revoke", *option, first.kid) == ""
    assert len(printed("key", "list", *option).splitlines()) == 1
    rotated_again = printed_json("key", "rotate", *option)
    assert printed_json("key", "revoke", *option, rotated_again["kid"]) == rotated_again
