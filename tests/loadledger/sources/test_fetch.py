"""Names of sources; and the files that a version needs, which its model and its signatures name."""

import base64
import json
from pathlib import Path

import pytest
from support import models
from support.uploads import FILES, MODEL

from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Download, Downloads
from loadledger.sources.fetch import NamedVersion, fetch_version, list_signed_files
from loadledger.sources.names import SourceName, parse_digest, parse_source
from loadledger.sources.origin import RemoteFile, Resolved

# Names


@pytest.mark.parametrize(
    ("name", "scheme", "host", "path"),
    [
        ("https://Models.example.com:8443/a/model.onnx", "https", "models.example.com:8443", "a/model.onnx"),
        ("https://[::1]:8443/model.onnx", "https", "[::1]:8443", "model.onnx"),
        ("hf://Org/repo@v1.0/onnx/model.onnx", "hf", "Org", "repo@v1.0/onnx/model.onnx"),
        ("oci://ghcr.io/org/model@sha256:ab", "oci", "ghcr.io", "org/model@sha256:ab"),
        ("s3://Bucket/a%20b/", "s3", "Bucket", "a%20b/"),
    ],
)
def test_name_is_parsed(name: str, scheme: str, host: str, path: str) -> None:
    assert parse_source(name) == SourceName(name, scheme, host, path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.onnx", "begin it with https://"),
        ("http://host/model.onnx", "begin it with https://"),
        ("file:///etc/passwd", "begin it with"),
        ("https://user:hunter2@host/m", "no user, no password"),
        ("s3://bucket/key?X-Amz-Signature=hunter2", "no query"),
        ("https://host/m#sha256=ab", "no fragment"),
        ("https:///m", "a host and a path"),
        ("https://host/", "a host and a path"),
        ("hf://org", "a host and a path"),
        ("https://[::1/m", "without an IPv6 address"),
        ("s3://bucket/a/../b", "leads upwards"),
        ("s3://bucket/%2e%2e/b", "leads upwards"),
        ("s3://bucket/a%5Cb", "leads upwards"),
        ("https://host/a b", "no space"),
        ("https://host/\x1b[2J", "ASCII"),
        ("https://höst/m", "ASCII"),
        ("https://host/" + "a" * 2048, "2048"),
    ],
)
def test_other_texts_are_refused(name: str, said: str) -> None:
    with pytest.raises(SourceProblem, match=r"\(invalid_source\)$") as refused:
        parse_source(name)
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_digest_is_sha256_in_lower_case() -> None:
    assert parse_digest(f"sha256:{'0a' * 32}") == "0a" * 32
    assert parse_digest(None) is None
    for text in ("", "0a" * 32, f"sha256:{'0A' * 32}", "sha256:12", f"sha512:{'0a' * 32}"):
        with pytest.raises(SourceProblem, match="it takes sha256: and 64"):
            parse_digest(text)


# Files


class Shelf:
    """An origin whose files are in a folder."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.files = folder, files
        folder.mkdir()

    def resolve(self) -> Resolved:
        found = [
            RemoteFile(path, len(content), is_needed=path.endswith((".onnx", ".sig")))
            for path, content in self.files.items()
        ]
        return Resolved("s3://b/m#etag=1", tuple(found))

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        place = self.folder / str(len([*self.folder.iterdir()]))
        place.write_bytes(self.files[file.path])
        downloads.on_bytes(place.stat().st_size)
        return Download(place, "0" * 64)

    def fetched(self) -> tuple[list[str], list[tuple[int, int | None]]]:
        """Return the paths of the version, and what was told of its bytes."""
        resolved, told = self.resolve(), list[tuple[int, int | None]]()
        named = NamedVersion(parse_source("s3://b/m"), resolved.name, resolved.files, self)
        with Downloads(self.folder / "downloads") as downloads:
            found = fetch_version(named, downloads, lambda *counts: told.append(counts))
        assert found.provenance == {"source": "s3://b/m", "resolved": "s3://b/m#etag=1"}
        return [file.path for file in found.files.files], told


def sign(*names: object) -> bytes:
    """Return a signature that lists these files."""
    statement = {"predicate": {"resources": [{"name": name} for name in names]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps({"dsseEnvelope": {"payload": payload}}).encode()


def test_model_and_signatures_name_files(tmp_path: Path) -> None:
    signature = sign("labels.txt", "net.onnx")
    beside = {"labels.txt": b"a", "README": b"b", "a.sig": signature}
    paths, told = Shelf(tmp_path / "a", {**FILES, **beside}).fetched()
    assert paths == ["net.onnx", "a.sig", "data/w.bin", "labels.txt"]
    first = len(FILES["net.onnx"]) + len(signature)
    assert told[1] == (first, first)
    assert told[-1] == (first + len(FILES["data/w.bin"]) + 1,) * 2


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        (sign("a", "./b/../c"), ["a", "c"]),
        (sign("a", None, "b"), ["a"]),
        *((each, []) for each in (sign(), b"", b"\xff", b"[" * 200_000, b'{"dsseEnvelope": {"payload": 1}}')),
        (b'{"dsseEnvelope": {"payload": "W10="}}', []),
    ],
)
def test_signature_lists_its_files_or_none(signature: bytes, names: list[str]) -> None:
    assert list(list_signed_files(signature)) == names


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"a.onnx": MODEL, "b.onnx": MODEL},
            "has no model.onnx, and not one .onnx file: its files are 'a.onnx'",
        ),
        ({"model.sig": b""}, "its files are 'model.sig'"),
        ({"model.onnx": b"<html>"}, "'model.onnx' of s3://b/m is an HTML page"),
        ({"net.onnx": FILES["net.onnx"]}, "keeps weights in 'data/w.bin', which the source has not"),
        ({"../model.onnx": MODEL}, "leads out of the folder"),
        ({"/etc/model.onnx": MODEL}, "is an absolute path"),
        ({"a\x1b[2J.onnx": MODEL}, "cannot be printed"),
        ({"a" * 300 + ".onnx": MODEL}, "too long"),
    ],
)
def test_files_that_no_server_takes_are_refused_before_they_are_sent(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    with pytest.raises(SourceProblem, match=r"\(source_invalid\)$") as refused:
        Shelf(tmp_path / "a", files).fetched()
    assert said in str(refused.value)


def test_weights_above_the_models_folder_are_not_looked_for(tmp_path: Path) -> None:
    model = models.external("../../w.bin").SerializeToString()
    with pytest.raises(SourceProblem, match=r"keeps weights in '\.\./\.\./w\.bin', which the source has not"):
        Shelf(tmp_path / "a", {"model.onnx": model, "w.bin": b""}).fetched()
