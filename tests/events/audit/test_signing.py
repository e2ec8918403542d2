"""A signed head, byte for byte, so that anybody can check it without loadledger."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from shutil import which

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN, at
from support.ledgers import OTHER_SIGN, SIGN

from events.audit.signing import Statement, as_signed_head, key_id

HASHES = st.binary(min_size=32, max_size=32)
STATEMENTS = st.builds(
    Statement,
    st.integers(0, 2**63 - 1),
    HASHES,
    st.just("") | st.integers(0, 10**9).map(at),
)
VECTOR = Statement(7, bytes(range(32)), "2026-01-01T00:00:07.000000Z")
MESSAGE = (
    b"loadledger-head-v1\n"
    b"7\n"
    b"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n"
    b"2026-01-01T00:00:07.000000Z\n"
)


def test_message_and_signature_have_known_bytes() -> None:
    assert VECTOR.message() == MESSAGE
    assert Statement(0, bytes(32), "").message().split(b"\n")[3] == b""
    assert SIGN(VECTOR).signature == Ed25519PrivateKey.from_private_bytes(bytes(range(32))).sign(MESSAGE)
    assert len(key_id(SIGN.public_key)) == 32
    assert SIGN(VECTOR).members()["key_id"] == key_id(SIGN.public_key)


@PLAIN
@given(STATEMENTS, STATEMENTS, st.integers(0, 63), st.integers(1, 255))
def test_only_the_signed_statement_holds(
    statement: Statement, other: Statement, index: int, bits: int
) -> None:
    signed = SIGN(statement)
    assert signed.holds()
    assert as_signed_head(json.loads(json.dumps(signed.members()))) == signed
    assert replace(signed, statement=other).holds() == (statement == other)
    broken = bytearray(signed.signature)
    broken[index] ^= bits
    assert not replace(signed, signature=bytes(broken)).holds()
    for key in (OTHER_SIGN.public_key, b"", b"no key", bytes(44)):
        assert not replace(signed, public_key=key).holds()


@pytest.mark.parametrize(
    "members",
    [
        None,
        [],
        {},
        {**SIGN(VECTOR).members(), "position": None},
        {**SIGN(VECTOR).members(), "hash": "xyz"},
        {**SIGN(VECTOR).members(), "signature": "not base64!"},
        {**SIGN(VECTOR).members(), "recorded_at": "\u0661"},
    ],
)
def test_malformed_signed_head_is_refused(members: object) -> None:
    with pytest.raises(ValueError, match="not a signed head"):
        as_signed_head(members)


@pytest.mark.skipif(which("openssl") is None, reason="openssl is not installed here")
def test_openssl_verifies_the_signature(tmp_path: Path) -> None:
    signed = SIGN(VECTOR)
    command = "openssl pkeyutl -verify -pubin -keyform DER -inkey key -rawin -in message -sigfile sig"
    (tmp_path / "key").write_bytes(signed.public_key)
    (tmp_path / "sig").write_bytes(signed.signature)
    for message in (MESSAGE, MESSAGE.replace(b"\n7\n", b"\n8\n")):
        (tmp_path / "message").write_bytes(message)
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode == 0) == (message == MESSAGE)
