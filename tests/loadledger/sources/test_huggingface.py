"""Repositories of Hugging Face, in a process: its library reads variables when it is imported."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.origins import COMMIT, Asked, Hub, Reply, Site, answer
from support.sources import environment_of, standing_site
from support.uploads import FILES, MODEL

TOKEN = "hf_secret"
DIGEST = sha256(MODEL).hexdigest()
SCRIPT = """
import json, sys
from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import fetch_version, resolve_source
for asked in sys.argv[2:]:
    try:
        named = resolve_source(*asked.split(" "))
        found = {file.path: file.is_needed for file in named.files}
        if sys.argv[1] == "fetch":
            told = []
            with Downloads() as downloads:
                fetched = fetch_version(named, downloads, lambda *counts: told.append(counts))
            found = {file.path: file.source.read_bytes().hex() for file in fetched.files.files}, told[-1]
        print(json.dumps([named.resolved, found]))
    except SourceProblem as problem:
        print(json.dumps([problem.code, str(problem)]))
"""


def ask(site: Site, folder: Path, what: str, *asked: str, **environment: str) -> list[Any]:
    """Return what a process says of sources whose hub is a site."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, *asked],
        env={**os.environ, **environment_of(site, folder), "HOME": str(folder), **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


FOLDERS: dict[str, tuple[list[str], str, dict[str, bool]]] = {
    "root": (["model.onnx", "other.onnx"], "", {"model.onnx": True, "other.onnx": False}),
    "onnx-folder": (
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_fp16.onnx", "config.json"],
        "",
        {"model.onnx": True, "model.onnx_data": False, "model_fp16.onnx": False},
    ),
    "named": (["a/b c.onnx", "a/d.onnx"], "@main/a/b%20c.onnx", {"b c.onnx": True, "d.onnx": False}),
    "beside": (
        ["model.onnx", "model.onnx.sig", "sub/x.sig", ".hidden/x", "sub/.x"],
        f"@{COMMIT}",
        {"model.onnx": True, "model.onnx.sig": True, "sub/x.sig": False},
    ),
}
ONE = {"model.onnx": MODEL}
PROBLEMS: dict[str, tuple[Reply, str, str, str]] = {
    "several": (
        Hub(dict.fromkeys((f"{each}.onnx" for each in "abcdef"), MODEL)),
        *("", "source_invalid", "6 models, 'a.onnx', 'b.onnx', 'c.onnx', 'd.onnx': name one, as hf://"),
    ),
    "none": (Hub({"a/m.onnx": MODEL}), "", "source_invalid", "no .onnx file"),
    "no-such-file": (Hub(ONE), "@main/m.onnx", "source_not_found", "no file 'm.onnx'"),
    "no-such-revision": (Hub(ONE), "@v9", "source_not_found", "Revision Not Found"),
    "no-token": (Hub(ONE, token=TOKEN), "", "source_not_found", "set HF_TOKEN, or run `hf auth login`"),
    "no-commit": (lambda _: answer(200, b'{"id": "o/r", "sha": "main"}'), "", "source_invalid", "no commit"),
    "no-JSON": (lambda _: answer(200, b"<html>"), "", "source_invalid", "this is no hub"),
    "not-for-all": (
        lambda _: answer(403, b"{}", x_error_code="GatedRepo"), "", "source_denied", "ask for access"
    ),
    "out-of-order": (lambda _: answer(503), "", "source_unreachable", "503"),
}  # fmt: skip
"""The hub's answer about a repository, the rest of the source, the code of the problem, and words of it."""
HUBS: dict[str, Reply] = {name: Hub(dict.fromkeys(paths, MODEL)) for name, (paths, *_) in FOLDERS.items()}
HUBS |= {name: reply for name, (reply, *_) in PROBLEMS.items()}


def reply(asked: Asked) -> bytes:
    """Answer as the hub of the repository that is asked for."""
    [name] = [name for name in HUBS if f"/org/{name}/" in f"{asked.path}/"]
    path = asked.path.replace(f"/org/{name}", "/org/repo")
    return HUBS[name](Asked(path, asked.headers, asked.method))


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answer about each repository, from one process."""
    rests = {name: rest for name, (_, rest, *_) in [*FOLDERS.items(), *PROBLEMS.items()]}
    with standing_site(reply) as site:
        sources = [f"hf://org/{name}{rest}" for name, rest in rests.items()]
        told = ask(site, tmp_path_factory.mktemp("hub"), "resolve", *sources)
    return dict(zip(rests, told, strict=True))


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_those_of_the_models_folder(resolved: dict[str, Any], name: str) -> None:
    _, rest, expected = FOLDERS[name]
    file = rest.partition("/")[1] + rest.partition("/")[2]
    assert resolved[name] == [f"hf://org/{name}@{COMMIT}{file}", expected]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_says_what_to_do(resolved: dict[str, Any], name: str) -> None:
    *_, code, said = PROBLEMS[name]
    found, text = resolved[name]
    assert (found, said in text) == (code, True), text


def test_files_come_with_the_token_and_stay_in_the_librarys_cache(tmp_path: Path) -> None:
    hub = Hub(FILES, large=frozenset({"data/w.bin"}), token=TOKEN)
    size, files = sum(map(len, FILES.values())), {path: each.hex() for path, each in FILES.items()}
    with standing_site(hub) as site:
        sources = ["hf://org/repo@main"] * 2
        for resolved, found in ask(site, tmp_path, "fetch", *sources, HF_TOKEN=TOKEN):
            assert (resolved, found) == (f"hf://org/repo@{COMMIT}", [files, [size, size]])
        sent = [each for each in site.asked if each.path.startswith("/cdn/")]
    assert len(sent) == len(FILES)
    assert not any("authorization" in each.headers for each in sent)


def test_file_has_the_digest_that_the_hub_or_the_caller_names(tmp_path: Path) -> None:
    with standing_site(Hub(ONE, large=frozenset(ONE))) as site:
        given = [f"hf://org/repo sha256:{digest}" for digest in (DIGEST, "0" * 64)]
        [[_, [found, _]], [code, said]] = ask(site, tmp_path, "fetch", *given)
        assert found == {"model.onnx": MODEL.hex()}
        assert (code, DIGEST in said) == ("digest_mismatch", True)
        [blob] = [*(tmp_path / "hub/hub/models--org--repo/blobs").glob("*")]
        blob.write_bytes(MODEL[:-1] + b"x")
        [[code, said]] = ask(site, tmp_path, "fetch", "hf://org/repo")
        assert (code, f"delete {blob}" in said) == ("digest_mismatch", True)
