"""A model's loadledger.toml, as it is and as it may be meant to do harm."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support import models

from runtime.defaults import DEFAULTS_FILE, MAX_DEFAULTS_BYTES, InvalidDefaults, read_defaults
from runtime.errors import InvalidModelId
from runtime.repository import Repository


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a repository with the model `m`, and a file outside of it."""
    models.save(models.add(), tmp_path / "models", "m")
    (tmp_path / "outside.toml").write_text("instances = 2")
    return tmp_path / "models"


def written(root: Path, content: bytes) -> Path:
    path = root / "m" / DEFAULTS_FILE
    path.write_bytes(content)
    return path


def refusal(root: Path) -> str:
    with pytest.raises(InvalidDefaults) as refused:
        read_defaults(Repository(root), "m")
    assert str(refused.value).startswith("m/loadledger.toml ")
    assert str(root) not in str(refused.value)
    return str(refused.value)


def test_a_model_without_the_file_has_no_defaults(root: Path) -> None:
    assert read_defaults(Repository(root), "m") == {}


def test_what_the_file_says_is_given_as_it_is(root: Path) -> None:
    written(root, b"# why\ntimeout_s = 5\ninstances = 2\nnonsense = [1, 'x']\n")
    assert read_defaults(Repository(root), "m") == {"timeout_s": 5, "instances": 2, "nonsense": [1, "x"]}


def test_the_file_is_looked_at_each_time(root: Path) -> None:
    for number in (1, 2):
        written(root, b"instances = %d" % number)
        assert read_defaults(Repository(root), "m") == {"instances": number}


def test_the_file_is_no_version_and_no_file_of_one(root: Path) -> None:
    written(root, b"instances = 2")
    found = Repository(root).resolve("m")
    assert [file.path for file in found.files] == ["model.onnx"]
    assert Repository(root).versions("m") == [1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"instances 2", "is no TOML"),
        (b"a = 1\na = 2", "is no TOML"),
        (b"\xff = 1", "is not UTF-8"),
        (b"a = " + b"9" * 5_000, "is no TOML"),
        (b"a = " + b"[" * 30_000, "is nested too deeply"),
        (b"#" * (MAX_DEFAULTS_BYTES + 1), f"has more than {MAX_DEFAULTS_BYTES} bytes"),
    ],
    ids=["no TOML", "twice", "no UTF-8", "a long number", "deep", "large"],
)
def test_a_file_that_says_nothing_is_refused(root: Path, content: bytes, words: str) -> None:
    written(root, content)
    assert words in refusal(root)


def test_a_file_of_the_largest_size_is_read(root: Path) -> None:
    written(root, b"instances = 2\n".ljust(MAX_DEFAULTS_BYTES, b"#"))
    assert read_defaults(Repository(root), "m") == {"instances": 2}


def test_a_link_within_the_repository_is_followed(root: Path) -> None:
    (root / "shared.toml").write_text("instances = 3")
    (root / "m" / DEFAULTS_FILE).symlink_to("../shared.toml")
    assert read_defaults(Repository(root), "m") == {"instances": 3}


def bound_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # for the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


UNSAFE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a link out of the repository", lambda path: path.symlink_to("../../outside.toml"), "leads out"),
    ("a link to a device", lambda path: path.symlink_to("/dev/zero"), "leads out"),
    ("a link to nowhere", lambda path: path.symlink_to("nowhere"), "No such file"),
    ("a link to itself", lambda path: path.symlink_to(DEFAULTS_FILE), "cannot be looked at"),
    ("a FIFO", os.mkfifo, "is not a regular file"),
    ("a socket", bound_socket, "is not a regular file"),
    ("a folder", Path.mkdir, "is not a regular file"),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in UNSAFE], ids=[row[0] for row in UNSAFE])
def test_what_is_no_file_of_the_repository_is_not_read(
    root: Path, make: Callable[[Path], object], words: str
) -> None:
    make(root / "m" / DEFAULTS_FILE)
    assert words in refusal(root)


def test_a_model_id_cannot_lead_out_of_the_repository(root: Path) -> None:
    with pytest.raises(InvalidModelId):
        read_defaults(Repository(root), "..")
