"""Which files make up a version, given a file or a folder; and the bytes that are sent of them."""

import base64
import hashlib
import os
from pathlib import Path

import pytest
from support import models

from loadledger.uploads import FileBody, find_version_files, hash_files, make_key

MODEL = models.add(1).SerializeToString()
EXTERNAL = models.external("data/w.bin").SerializeToString()
HUB_DATA = models.external("model.onnx_data").SerializeToString()
FILES = {
    "one/net.onnx": MODEL,
    "version/model.onnx": MODEL, "version/labels.txt": b"a", "version/assets/b.txt": b"b",
    "version/other.onnx": MODEL, "version/.git/config": b"c", "version/.DS_Store": b"d",
    "external/net.onnx": EXTERNAL, "external/data/w.bin": models.external_bytes(), "external/more.txt": b"e",
    "hub/onnx/model.onnx": HUB_DATA, "hub/onnx/model.onnx_data": models.external_bytes(),
    "hub/onnx/model_q4.onnx": b"f", "hub/onnx/model_q4.onnx_data": b"g", "hub/onnx/config.json": b"h",
    "hub/tokenizer.json": b"i",
    "missing/net.onnx": EXTERNAL,
    "outside/net.onnx": models.external("../w.bin").SerializeToString(),
    "two/a.onnx": MODEL, "two/b.onnx": MODEL,
    "model/1/model.onnx": MODEL, "model/12/model.onnx": MODEL,
    "page/model.onnx": b"<!doctype html>",
    "nothing/readme.md": b"j",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "fifo").mkdir()
    os.mkfifo(root / "fifo" / "model.onnx")
    (root / "linked").mkdir()  # as the cache of Hugging Face has it
    (root / "linked" / "model.onnx").symlink_to(root / "one" / "net.onnx")
    return root


@pytest.mark.parametrize(
    ("given", "paths", "left_out"),
    [
        ("one/net.onnx", ["model.onnx"], []),
        ("one", ["net.onnx"], []),
        ("linked", ["model.onnx"], []),
        ("version", ["model.onnx", "assets/b.txt", "labels.txt"], ["other.onnx"]),
        ("version/model.onnx", ["model.onnx"], []),
        ("external/net.onnx", ["model.onnx", "data/w.bin"], []),
        ("external", ["net.onnx", "data/w.bin", "more.txt"], []),
        (
            "hub",
            ["model.onnx", "config.json", "model.onnx_data"],
            ["model_q4.onnx", "model_q4.onnx_data"],
        ),
        ("hub/onnx/model.onnx", ["model.onnx", "model.onnx_data"], []),
        ("two/b.onnx", ["model.onnx"], []),
    ],
)
def test_version_has_these_files(folder: Path, given: str, paths: list[str], left_out: list[str]) -> None:
    found = find_version_files(folder / given)
    assert [file.path for file in found.files] == paths
    assert list(found.left_out) == left_out
    assert found.bytes == sum(file.source.stat().st_size for file in found.files)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("missing/net.onnx", "keeps weights in 'data/w.bin', which is not there"),
        ("outside", r"names '\.\./w\.bin', which is not in its folder"),
        ("two", r"has several models, a\.onnx, b\.onnx: give the file itself"),
        ("model", r"is a model's folder: give one of its versions, as .*/12$"),
        ("page", "is an HTML page"),
        ("nothing", r"has no \.onnx file"),
        ("fifo", "is not a regular file"),
    ],
)
def test_what_is_no_version_is_refused_with_advice(folder: Path, given: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_version_files(folder / given)


def test_signature_goes_along_and_a_version_takes_one(folder: Path, tmp_path: Path) -> None:
    for given, path in (("a.sig", "a.sig"), ("bundle.json", "model.sig")):
        (tmp_path / given).write_bytes(b"{}")
        found = find_version_files(folder / "external", tmp_path / given)
        assert [file.path for file in found.files] == ["net.onnx", "data/w.bin", "more.txt", path]
        assert found.files[-1].source == tmp_path / given
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.sig").touch()  # beneath the model: not the version's signature
    (tmp_path / "net.onnx").write_bytes(MODEL)
    with pytest.raises(
        ValueError, match=r"/a\.sig signs the version already: move it, or leave out .*/data/b\.sig"
    ):
        find_version_files(tmp_path, tmp_path / "data" / "b.sig")
    (tmp_path / "a.sig").unlink()
    assert find_version_files(tmp_path, tmp_path / "data" / "b.sig").files[-1].path == "b.sig"
    with pytest.raises(ValueError, match="is not a regular file"):
        find_version_files(folder / "one", folder / "fifo" / "model.onnx")


def test_body_is_the_file_with_its_digest(folder: Path) -> None:
    source = find_version_files(folder / "external")
    digests = hash_files(source)
    assert digests == {
        file.path: hashlib.sha256(file.source.read_bytes()).hexdigest() for file in source.files
    }
    for file in source.files:
        seen = list[int]()
        body = FileBody(file, digests[file.path], seen.append)
        sent = b"".join(body.chunks())
        digest = base64.b64encode(hashlib.sha256(sent).digest()).decode()
        assert body.headers == {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(sent)),
            "Repr-Digest": f"sha-256=:{digest}:",
        }
        assert seen == [len(sent)]
    assert make_key(digests) != make_key({**digests, "net.onnx": "0" * 64})


def test_file_that_changes_while_it_is_sent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(MODEL)
    source = find_version_files(tmp_path)
    (tmp_path / "net.onnx").write_bytes(MODEL + b"\0")
    with pytest.raises(ValueError, match="changed while it was read"):
        hash_files(source)
