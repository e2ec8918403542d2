"""The command line: tokens, keys, settings, and errors that say what to do."""

import json
import re
import socket
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner, Result

from loadledger.cli.main import main
from server.auth.gate import create_verifier
from server.auth.keys import list_keys
from server.config import Config, settings


def run(*arguments: str, **environment: str) -> Result:
    """Run the command with this environment and nothing of ours beside it."""
    ours = {setting.variable: None for setting in settings()}
    return CliRunner().invoke(main, arguments, env={**ours, **environment})


def refused(*arguments: str, **environment: str) -> str:
    """Run the command, which must end with 2 and words on stderr alone; return them."""
    result = run(*arguments, **environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr
    return result.stderr


def token(data: Path, *arguments: str, **environment: str) -> str:
    """Make a token; nothing else may be printed."""
    result = run(
        "token", "--data", str(data), "--subject", "alice", "--role", "admin", *arguments, **environment
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", result.stdout)
    return result.stdout.strip()


def claims(made: str) -> dict[str, Any]:
    return jwt.decode(made, options={"verify_signature": False})


# Help


@pytest.mark.parametrize(
    "command",
    [
        *("", "serve", "token", "key", "key list", "key rotate", "key revoke", "key ledger", "demo"),
        *("events", "replay", "verify", "export", "archive", "backup"),
        *("prepared", "prepared list", "prepared clear"),
        *("load", "unload", "models", "infer", "resources", "top", "jobs", "job", "cancel"),
        *("check", "login", "completion"),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(command: str, flag: str) -> None:
    result = run(*command.split(), flag)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == ""


def test_the_version_is_told() -> None:
    assert re.search(r"\d+\.\d+\.\d+", run("--version").stdout)


def test_the_help_of_serve_has_each_setting_with_its_variable_and_default() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for setting in settings():
        assert setting.flag in text
        default = "no default" if setting.default is None else f"default: {setting.default}"
        assert f"[{setting.variable}; {'required' if setting.required else default}]" in text


@pytest.mark.parametrize("arguments", [["nope"], ["serve", "--nope"], ["key", "nope"], ["token", "--nope"]])
def test_what_is_no_command_or_option_is_refused(arguments: list[str]) -> None:
    assert "nope" in refused(*arguments)


# Tokens


def test_the_first_token_makes_the_data_directory_and_the_server_takes_it(tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    made = token(data, "--role", "audit")
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert {path.name for path in data.iterdir()} == {"keys", "ledger.key"}
    principal = create_verifier(Config(repository=tmp_path, data=data)).verify(made, time.time())
    assert principal.subject == "alice"
    assert principal.roles == {"admin", "audit"}


@pytest.mark.parametrize(
    ("expires", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1s", 1)]
)
def test_a_token_lives_as_long_as_it_is_said_to(tmp_path: Path, expires: str, seconds: int) -> None:
    made = claims(token(tmp_path, "--expires", expires))
    assert made["exp"] - made["iat"] == seconds


def test_a_token_lives_for_12_hours_if_nothing_is_said(tmp_path: Path) -> None:
    made = claims(token(tmp_path))
    assert made["exp"] - made["iat"] == 12 * 3600


@pytest.mark.parametrize(
    "expires",
    ["", "0s", "-1h", "1", "h", "1.5h", "1w", "1h30m", " 1h", "1h ", "\u0661h", "9999999999s", "999999999d"],
)
def test_a_time_that_is_none_is_refused(tmp_path: Path, expires: str) -> None:
    arguments = ("--subject", "a", "--role", "admin", f"--expires={expires}")
    assert refused("token", "--data", str(tmp_path), *arguments)


@pytest.mark.parametrize("subject", ["", "system", "SYSTEM ", "a\nb", "x" * 129])
def test_a_subject_that_no_server_would_take_is_refused(tmp_path: Path, subject: str) -> None:
    assert "subject" in refused("token", "--data", str(tmp_path), "--role", "admin", f"--subject={subject}")


def test_a_role_that_there_is_not_is_refused(tmp_path: Path) -> None:
    text = refused("token", "--data", str(tmp_path), "--subject", "a", "--role", "root")
    assert "admin, audit, predict" in text
    assert "root" in text
    assert "--role" in refused("token", "--data", str(tmp_path), "--subject", "a")
    assert "--subject" in refused("token", "--data", str(tmp_path), "--role", "admin")


def test_a_token_names_the_audience_and_issuer_that_the_server_asks_for(tmp_path: Path) -> None:
    made = claims(token(tmp_path, LOADLEDGER_JWT_AUDIENCE="there", LOADLEDGER_JWT_ISSUER="me"))
    assert (made["aud"], made["iss"]) == ("there", "me")
    made = claims(token(tmp_path))
    assert (made["aud"], "iss" in made) == ("loadledger", False)


def test_a_token_in_json_has_beside_it_what_stands_in_it(tmp_path: Path) -> None:
    roles = ("--role=predict", "--role=audit")
    result = run("token", f"--data={tmp_path}", "--subject=alice", *roles, "--expires=1h", "--json")
    told = json.loads(result.stdout)
    made = claims(told["token"])
    assert told == {
        "token": told["token"],
        "subject": "alice",
        "roles": ["audit", "predict"],
        "expires_at": f"{datetime.fromtimestamp(made['exp'], UTC):%Y-%m-%dT%H:%M:%SZ}",
        "kid": list_keys(tmp_path)[-1].kid,
    }


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    result = run("token", "--subject", "a", "--role", "admin", LOADLEDGER_DATA=str(tmp_path / "data"))
    assert result.exit_code == 0
    assert (tmp_path / "data" / "keys").is_dir()
    assert "--data" in refused("token", "--subject", "a", "--role", "admin")


def test_a_setting_that_is_wrong_is_told_to_whoever_wants_a_token(tmp_path: Path) -> None:
    arguments = ("token", "--data", str(tmp_path), "--subject", "a", "--role", "admin")
    assert "LOADLEDGER_JWT_AUDIENCE" in refused(*arguments, LOADLEDGER_JWT_AUDIENCE=" ")


@pytest.mark.parametrize(
    "command",
    [
        ("token", "--subject", "a", "--role", "admin"),
        ("key", "list"),
        ("key", "rotate"),
        ("key", "revoke", "x"),
    ],
)
def test_a_data_directory_that_is_none_is_told(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "keys").write_text("")
    assert "file" in refused(*command, "--data", str(tmp_path / "file"))
    assert refused(*command, "--data", str(tmp_path / "data"))
    assert refused(*command, "--data", str(tmp_path / "file" / "beneath"))
    assert refused(*command, "--data", str(tmp_path / ("x" * 300)))


# Keys


def test_keys_are_listed_rotated_and_revoked(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path))
    first = token(tmp_path)
    rotated = run("key", "rotate", *data).stdout.strip()
    second = token(tmp_path)
    lines = run("key", "list", *data).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [key.kid for key in list_keys(tmp_path)]
    assert [line.endswith("signs") for line in lines] == [False, True]
    assert lines[1].startswith(rotated)
    told = json.loads(run("key", "list", *data, "--json").stdout)["keys"]
    assert [(each["kid"], each["signs"]) for each in told] == [(lines[0].split()[0], False), (rotated, True)]
    old, new = (jwt.get_unverified_header(made)["kid"] for made in (first, second))
    assert (old, new) == (lines[0].split()[0], rotated)
    revoked = run("key", "revoke", *data, old)
    assert (revoked.exit_code, revoked.output) == (0, "")
    assert len(run("key", "list", *data).stdout.splitlines()) == 1
    rotated_again = json.loads(run("key", "rotate", *data, "--json").stdout)
    assert json.loads(run("key", "revoke", *data, rotated_again["kid"], "--json").stdout) == rotated_again
    verifier = create_verifier(Config(repository=tmp_path, data=tmp_path))
    assert verifier.verify(second, time.time()).subject == "alice"


@pytest.mark.parametrize(
    "kid", ["nope", "../ledger", "20260101T000000000000Z-00000000", "", "%2e", "x" * 5000]
)
def test_a_key_that_there_is_not_is_told(tmp_path: Path, kid: str) -> None:
    token(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(refused("key", "revoke", "--data", str(tmp_path), kid)) < 500
    assert sorted(tmp_path.rglob("*")) == before


# Settings of serve


def test_a_configuration_file_that_cannot_be_read_is_told_in_one_line() -> None:
    text = refused("serve", f"--config={'x' * 300}", "--repository=a\nb", "--data=/x")
    lines = text.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("loadledger: --config: ")
    assert "File name too long" in lines[0]
    assert "Errno" not in text


def test_an_address_that_cannot_be_listened_on_is_told(tmp_path: Path) -> None:
    places = (f"--repository={tmp_path}", f"--data={tmp_path / 'data'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "loadledger", "serve", *places, f"--port={taken.getsockname()[1]}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
