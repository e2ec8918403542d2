"""The command line: tokens, keys, settings, and errors that say what to do."""

import json
import os
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
from server.settings import Setting


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

WRONG: dict[str, str] = {
    "repository": "/nope", "data": "/dev/null", "host": " ", "port": "65536",
    "tls_cert": "/nope", "tls_key": "/nope", "trusted_proxies": "0.0.0.0/0", "forwarded_header": "via",
    "loads_at_once": "-1",
    "threads": "0", "drain_timeout_s": "nan", "inference_timeout_s": "0",
    "inference_grace_s": "-1", "inference_queue": "0", "timeout_s": "3601",
    "memory_budget": "0%", "max_loaded": "-1", "evict": "all", "min_residency_s": "nan",
    "keep_alive_s": "-2", "strategy": "in-place", "on_demand": "true", "warm_up": "",
    "prepare": "yes", "prepared_size": "0", "huge_pages": "on", "restore": "some",
    "streams_per_subject": "0", "max_connections": "0", "max_connections_per_address": "-1",
    "head_timeout_s": "0", "idle_timeout_s": "inf",
    "log_format": "xml", "log_level": "trace", "log_inferences": "2", "otel": "maybe",
    "trace_inferences": "nan", "metrics": "none",
    "jwt_audience": " ", "jwt_issuer": "", "jwt_keys": "/nope", "jwt_roles_claim": " ",
    "limit_management": "often", "limit_inference": "0/minute", "limit_reads": "",
    "limit_auth_failures": "1/eon",
}  # fmt: skip


def test_there_is_a_wrong_value_for_each_setting() -> None:
    assert list(WRONG) == [setting.name for setting in settings()]


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_each_setting_is_taken_from_its_option_before_its_variable_and_told_when_it_is_wrong(
    tmp_path: Path, setting: Setting
) -> None:
    places = {"LOADLEDGER_REPOSITORY": str(tmp_path), "LOADLEDGER_DATA": str(tmp_path / "data")}
    wrong = WRONG[setting.name]
    # The option is wrong whatever the variable says, and the variable where the option says nothing.
    assert setting.flag in refused("serve", f"{setting.flag}={wrong}", **places)
    text = refused("serve", **places | {setting.variable: wrong})
    assert setting.flag in text or setting.variable in text
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["port", "loads_at_once", "threads", "drain_timeout_s", "timeout_s"])
@pytest.mark.parametrize("value", ["x", "", "1,5", "0x10"])
def test_a_setting_that_is_no_number_is_told(tmp_path: Path, name: str, value: str) -> None:
    places = {"LOADLEDGER_REPOSITORY": str(tmp_path), "LOADLEDGER_DATA": str(tmp_path / "data")}
    variable = f"LOADLEDGER_{name.upper()}"
    assert variable in refused("serve", **places, **{variable: value})
    flag = f"--{name.replace('_', '-')}"
    assert flag in refused("serve", f"{flag}={value}", **places)


@pytest.mark.parametrize("missing", ["repository", "data"])
def test_serve_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    given = {"repository": str(tmp_path), "data": str(tmp_path)}
    del given[missing]
    text = refused("serve", *(f"--{name}={value}" for name, value in given.items()))
    assert f"--{missing}" in text
    assert f"LOADLEDGER_{missing.upper()}" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 300, "cannot be looked at: File name too long; name a shorter one"),
        ("/x" * 5000, "cannot be looked at: File name too long; name a shorter one"),
        ("a\0b", "has a character that no path has"),
        ("a\ud800", "has a character that no path has"),
        ("a\udcff", "is not UTF-8"),
    ],
    ids=["long name", "long path", "NUL", "surrogate", "byte"],
)
def test_a_repository_that_no_path_leads_to_is_told_in_one_line(
    tmp_path: Path, path: str, words: str
) -> None:
    text = refused("serve", f"--repository={path}", f"--data={tmp_path / 'data'}")
    assert text.startswith("loadledger: --repository: ")
    assert words in text
    assert text.count("\n") == 1
    assert len(text) < 250
    assert not (tmp_path / "data").exists()


def test_a_name_that_is_not_utf_8_or_leads_nowhere_is_told_where_it_is_there_too(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(odd).mkdir()
    (tmp_path / "link").symlink_to(odd)
    for path in (odd, tmp_path / "link"):
        assert "is not UTF-8" in refused("serve", f"--repository={path}", f"--data={tmp_path / 'data'}")
    (tmp_path / "loop").symlink_to("loop")
    text = refused("serve", f"--repository={tmp_path}", f"--data={tmp_path / 'loop'}")
    assert re.fullmatch(r"loadledger: --data: \S+ cannot be looked at: Too many .*; .* name another\n", text)


def test_a_configuration_file_that_no_path_leads_to_is_told_in_one_line() -> None:
    text = refused("serve", f"--config={'x' * 300}")
    assert text.startswith("loadledger: --config: ")
    assert "Errno" not in text
    assert text.count("\n") == 1


def test_an_address_that_cannot_be_listened_on_is_told(tmp_path: Path) -> None:
    places = (f"--repository={tmp_path}", f"--data={tmp_path / 'data'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "loadledger", "serve", *places, f"--port={taken.getsockname()[1]}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
