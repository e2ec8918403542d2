"""A version in a repository's folder, for servers that only read it."""

import os
import stat
from pathlib import Path

import pytest
from support.uploads import FILES, MODEL, files_in

from loadledger.sources.folder import write_version
from loadledger.uploads import VersionFile, VersionSource, find_version_files


@pytest.fixture
def source(tmp_path: Path) -> VersionSource:
    for path, content in FILES.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(content)
    (tmp_path / "repository").mkdir()
    return find_version_files(tmp_path / "source")


def test_version_is_written_whole_for_another_user(source: VersionSource, tmp_path: Path) -> None:
    repository, before = tmp_path / "repository", os.umask(0o077)
    try:
        numbers = [write_version(source, repository, "m", version).version for version in (None, 7, None)]
    finally:
        os.umask(before)
    assert numbers == [1, 7, 8]
    assert files_in(repository) == {
        f"m/{number}/{path}": content for number in numbers for path, content in FILES.items()
    }
    for path in repository.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize(
    ("model", "file", "said"),
    [
        ("../m", "model.onnx", "is no name for a model"),
        (".m", "model.onnx", "is no name for a model"),
        ("there", "model.onnx", "a version is never overwritten"),
        ("m", "a.txt", "there is no model"),
        ("m", "../model.onnx", "leads out of the folder"),
    ],
)
def test_what_no_server_takes_leaves_nothing(tmp_path: Path, model: str, file: str, said: str) -> None:
    repository, content = tmp_path / "repository", tmp_path / "content"
    (repository / "there/1").mkdir(parents=True)
    content.write_bytes(MODEL)
    version = VersionSource((VersionFile(file, content, len(MODEL)),))
    with pytest.raises(ValueError, match=said):
        write_version(version, repository, model, 1)
    assert [path.name for path in repository.rglob("*")] == ["there", "1"]
