"""The variables that a fetch process gets, and the files that a model or a signature names."""

import base64
import json
from pathlib import Path

import pytest
from support.uploads import FILES

from runtime.fetch.adds import find_named_files, list_signed_files, select_variables

VARIABLES = {
    "HF_TOKEN": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AZURE_STORAGE_ACCOUNT_KEY": "c",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "d",
    "DOCKER_CONFIG": "/e",
    "HOME": "/f",
    "HOMEBREW_TOKEN": "g",
    "SSL_CERT_FILE": "/h",
    "LOADLEDGER_TOKEN": "i",
    "HTTPS_PROXY": "j",
}


@pytest.mark.parametrize(
    ("source", "own"),
    [
        ("https://host/m.onnx", set()),
        ("hf://org/repo", {"HF_TOKEN"}),
        ("oci://ghcr.io/m", {"DOCKER_CONFIG"}),
        ("s3://bucket/m", {"AWS_SECRET_ACCESS_KEY"}),
        ("gs://bucket/m", {"GOOGLE_SERVICE_ACCOUNT_KEY"}),
        ("az://bucket/m", {"AZURE_STORAGE_ACCOUNT_KEY"}),
    ],
)
def test_fetch_process_gets_the_credentials_of_its_source_only(source: str, own: set[str]) -> None:
    assert select_variables(source, VARIABLES).keys() == {"HOME", "SSL_CERT_FILE"} | own


def sign(*names: object) -> bytes:
    """Return a signature that lists these files."""
    statement = {"predicate": {"resources": [{"name": name} for name in names]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps({"dsseEnvelope": {"payload": payload}}).encode()


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        (sign("a", "./b/../c"), ["a", "c"]),
        (sign("a", None, "b"), ["a"]),
        (sign(), []),
        (b"", []),
        (b"\xff", []),
        (b"[" * 200_000, []),
        (b'{"dsseEnvelope": {"payload": 1}}', []),
        (b'{"dsseEnvelope": {"payload": "W10="}}', []),
        (b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}', []),
    ],
)
def test_signature_lists_its_files_or_none(signature: bytes, names: list[str]) -> None:
    assert list(list_signed_files(signature)) == names


def test_model_and_signatures_name_files(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(FILES["net.onnx"])
    (tmp_path / "net.onnx.sig").write_bytes(sign("labels.txt"))
    assert find_named_files(tmp_path, ["net.onnx", "net.onnx.sig"]) == {"data/w.bin", "labels.txt"}
    assert find_named_files(tmp_path, ["net.onnx"]) == {"data/w.bin"}
    (tmp_path / "net.onnx").write_bytes(b"no model")
    assert find_named_files(tmp_path, ["net.onnx"]) == set()
    assert find_named_files(tmp_path, []) == set()
