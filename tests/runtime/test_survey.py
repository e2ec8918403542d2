"""What a repository's files show of what is wrong with them: found in place, and nothing of it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import models
from support.models import save, save_bytes

from runtime.repository import Repository
from runtime.survey import Finding, Severity, names_in, survey_model, survey_version


def survey(root: Path) -> list[Finding]:
    repository = Repository(root)
    found = [finding for name in names_in(root) for finding in survey_model(repository, name)]
    for model_id in repository.models():
        for version in repository.versions(model_id):
            found += survey_version(repository, repository.resolve(model_id, version))
    return found


def no_file(root: Path) -> None:
    (root / "m" / "1").mkdir(parents=True)


def other_file(root: Path) -> None:
    no_file(root)
    (root / "m" / "1" / "net.onnx").touch()


def dead_link(root: Path) -> None:
    no_file(root)
    (root / "m" / "1" / "model.onnx").symlink_to("nowhere")


def link_out(root: Path) -> None:
    no_file(root)
    (root / "m" / "1" / "model.onnx").symlink_to("/etc/hostname")


def folder_for_a_file(root: Path) -> None:
    (root / "m" / "1" / "model.onnx").mkdir(parents=True)


def version_out(root: Path) -> None:
    save(models.add(), root / ".outside", "m")
    (root / "m").mkdir()
    (root / "m" / "1").symlink_to("/usr")


def model_out(root: Path) -> None:
    (root / "m").symlink_to("/usr")


def hidden_model(root: Path) -> None:
    (root / "m").symlink_to("x" * 300)  # which no call can look at, whoever asks


def hidden_version(root: Path) -> None:
    (root / "m").mkdir()
    (root / "m" / "7").symlink_to("x" * 300)


def hidden_file(root: Path) -> None:
    no_file(root)
    (root / "m" / "1" / "model.onnx").symlink_to("model.onnx")


def fifo_beside(root: Path) -> None:
    import os  # noqa: PLC0415 - only here

    os.mkfifo(save(models.add(), root, "m") / "pipe")


def external_missing(root: Path) -> None:
    save(models.external("w.bin"), root, "m")


def empty_file(root: Path) -> None:
    save_bytes(b"", root, "m")


@pytest.mark.parametrize(
    ("make", "place", "code", "words"),
    [
        (no_file, "m/1", "no_model_file", "add it, or remove the folder"),
        (other_file, "m/1", "no_model_file", "rename net.onnx"),
        (dead_link, "m/1", "no_model_file", "leads nowhere"),
        (link_out, "m/1", "unsafe_file", "leads out of the repository"),
        (folder_for_a_file, "m/1", "unsafe_file", "not a regular file"),
        (version_out, "m/1", "unsafe_file", "leads out of the repository"),
        (model_out, "m", "unsafe_file", "leads out of the repository"),
        (hidden_model, "m", "unreadable", "cannot be looked at: File name too long"),
        (hidden_version, "m/7", "unreadable", "cannot be looked at: File name too long"),
        (hidden_file, "m/1", "unreadable", "model.onnx cannot be looked at: Too many levels"),
        (fifo_beside, "m/1", "unsafe_file", "'pipe' is not a regular file"),
        (external_missing, "m/1", "unsafe_file", "'w.bin' is not a regular file"),
        (empty_file, "m/1/model.onnx", "no_onnx", "copied completely"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_is_wrong_is_found_where_it_is(
    tmp_path: Path, make: Callable[[Path], None], place: str, code: str, words: str
) -> None:
    make(tmp_path)
    (finding,) = survey(tmp_path)
    assert (finding.place, finding.code, finding.severity) == (place, code, Severity.PROBLEM)
    assert words in finding.text


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("m/01/model.onnx", "invalid_version"),
        ("m/latest/model.onnx", "invalid_version"),
        ("m/99999999999/other", "invalid_version"),
        ("my model/1/model.onnx", "invalid_model_id"),
        ("loose.onnx", "misplaced_file"),
    ],
)
def test_what_may_be_meant_so_is_a_note(tmp_path: Path, name: str, code: str) -> None:
    save(models.add(), tmp_path, "m")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (finding,) = survey(tmp_path)
    assert (finding.code, finding.severity) == (code, Severity.NOTE)


def test_what_is_none_of_our_business_is_passed_over(tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    for name in (".git/config", "m/assets/labels.txt", "m/config.pbtxt", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert survey(tmp_path) == []
