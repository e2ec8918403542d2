"""Signing keys in the data directory, and the tokens that they sign."""

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest

from server.auth import keys


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    keys.ensure_data_dir(folder)
    return folder


def contents(data: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}


def kids(data: Path) -> list[str]:
    return [key.kid for key in keys.list_keys(data)]


def test_data_directory_is_private_and_kept(data: Path) -> None:
    (key,) = (data / "keys").iterdir()
    files = [data / "ledger.head", data / "ledger.key"]
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (data, data / "keys", key, *files)]
    assert modes == [0o700, 0o700, 0o600, 0o600, 0o600]
    before = contents(data)
    assert before.keys() == {key, *files}
    for name in ("notes.txt", "x.pem", "99999999T999999999999Z-00000000.pem", ".hidden.pem"):
        (data / "keys" / name).write_text("?")
    keys.ensure_data_dir(data)
    assert {path: content for path, content in contents(data).items() if path in before} == before
    assert kids(data) == [key.stem]


def test_newest_key_signs_and_others_stay(data: Path) -> None:
    (first,) = kids(data)
    kid = keys.create_key(data)
    assert [(key.kid, key.signs) for key in keys.list_keys(data)] == [(first, False), (kid, True)]
    token = keys.sign_token(data, "alice", ["admin", "audit"], expires_s=60, audience="here", issuer="us")
    assert jwt.get_unverified_header(token) == {"alg": "EdDSA", "kid": kid, "typ": "JWT"}
    key = keys.load_private_key(data / "keys" / f"{kid}.pem").public_key()
    claims = jwt.decode(token, key, ["EdDSA"], audience="here", issuer="us")
    assert claims["exp"] - claims["iat"] == 60
    assert (claims["sub"], claims["roles"]) == ("alice", ["admin", "audit"])
    ledger = keys.load_private_key(data / "ledger.key").public_key()
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, ledger, ["EdDSA"], audience="here")


def test_new_key_is_the_newest_when_the_clock_is_set_back(data: Path) -> None:
    kid = keys.create_key(data, datetime.now(UTC) - timedelta(days=400))
    assert kids(data)[-1] == kid


def test_revoked_key_is_gone_until_another_is_made(data: Path) -> None:
    (first,) = kids(data)
    kid = keys.create_key(data)
    keys.revoke(data, first)
    assert kids(data) == [kid]
    with pytest.raises(keys.KeyProblem, match="no key"):
        keys.revoke(data, first)
    keys.revoke(data, kid)
    with pytest.raises(keys.KeyProblem, match="key rotate"):
        keys.sign_token(data, "alice", ["admin"], expires_s=60, audience="loadledger")
    keys.ensure_data_dir(data)
    assert len(kids(data)) == 1


@pytest.mark.parametrize(
    "kid", ["", "..", "../ledger", "../../etc/passwd", "a/b", "a\0b", "*", "x" * 5000, "ledger"]
)
def test_hostile_kid_revokes_nothing(data: Path, kid: str) -> None:
    before = contents(data)
    with pytest.raises(keys.KeyProblem):
        keys.revoke(data, kid)
    assert contents(data) == before


@pytest.mark.parametrize(
    ("subject", "roles", "expires_s"),
    [("", ["admin"], 60), ("system", ["admin"], 60), ("a", [], 60), ("a", ["root"], 60), ("a", ["admin"], 0)],
)
def test_unusable_token_is_not_signed(data: Path, subject: str, roles: list[str], expires_s: float) -> None:
    with pytest.raises(keys.KeyProblem):
        keys.sign_token(data, subject, roles, expires_s=expires_s, audience="loadledger")


def test_files_that_root_creates_belong_to_the_directory_s_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    data = tmp_path / "owned"
    data.mkdir(mode=0o700)
    os.chown(data, 12345, 12346)
    keys.create_key(data)
    keys.create_key(data)
    created = sorted(data.rglob("*"))
    assert [path.name for path in created if path.suffix != ".pem"] == ["keys"]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in created} == {(12345, 12346)}
