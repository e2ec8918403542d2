"""Repositories of Hugging Face, in a process: its library reads variables when it is imported."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.origins import COMMIT, Hub, Reply, Site, answer, serving_site
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


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """Return what a process says of sources whose hub is a site."""

    async def run(site: Site, what: str, *asked: str, **environment: str) -> list[Any]:
        own = {"HF_ENDPOINT": site.url(""), "HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SCRIPT, what, *asked),
            env={**os.environ, **own, **environment},
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0
        return [json.loads(line) for line in said.splitlines()]

    return run


FOLDERS: Mapping[str, tuple[list[str], str, dict[str, bool]]] = {
    "root": (["model.onnx", "other.onnx"], "", {"model.onnx": True, "other.onnx": False}),
    "onnx folder": (
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


@pytest.mark.parametrize(("paths", "rest", "expected"), FOLDERS.values(), ids=FOLDERS)
async def test_files_are_those_of_the_models_folder(
    ask: Any, paths: list[str], rest: str, expected: dict[str, bool]
) -> None:
    file = rest.partition("/")[1] + rest.partition("/")[2]
    async with serving_site(Hub(dict.fromkeys(paths, MODEL))) as site:
        assert await ask(site, "resolve", f"hf://org/repo{rest}") == [
            [f"hf://org/repo@{COMMIT}{file}", expected]
        ]


async def test_files_come_with_the_token_and_stay_in_the_librarys_cache(ask: Any) -> None:
    hub = Hub(FILES, large=frozenset({"data/w.bin"}), token=TOKEN)
    size, files = sum(map(len, FILES.values())), {path: each.hex() for path, each in FILES.items()}
    async with serving_site(hub) as site:
        told = None
        for _ in range(2):
            [[resolved, [found, told]]] = await ask(site, "fetch", "hf://org/repo@main", HF_TOKEN=TOKEN)
            assert (resolved, found) == (f"hf://org/repo@{COMMIT}", files)
        assert told == [size, size]
        sent = [each for each in site.asked if each.path.startswith("/cdn/")]
        assert len(sent) == len(FILES)
        assert not any("authorization" in each.headers for each in sent)
        [[code, said]] = await ask(site, "resolve", "hf://org/repo")
        assert (code, "set HF_TOKEN, or run `hf auth login`" in said) == ("source_not_found", True)


async def test_file_has_the_digest_that_the_hub_or_the_caller_names(ask: Any, tmp_path: Path) -> None:
    hub = Hub({"model.onnx": MODEL}, large=frozenset({"model.onnx"}))
    async with serving_site(hub) as site:
        given = [f"hf://org/repo sha256:{digest}" for digest in (DIGEST, "0" * 64)]
        [[_, [found, _]], [code, said]] = await ask(site, "fetch", *given)
        assert found == {"model.onnx": MODEL.hex()}
        assert (code, DIGEST in said) == ("digest_mismatch", True)
        [blob] = [*(tmp_path / "hub/hub/models--org--repo/blobs").glob("*")]
        blob.write_bytes(MODEL[:-1] + b"x")
        [[code, said]] = await ask(site, "fetch", "hf://org/repo")
        assert (code, f"delete {blob}" in said) == ("digest_mismatch", True)


ONE = {"model.onnx": MODEL}
PROBLEMS: Mapping[str, tuple[Reply, str, str, str]] = {
    "several": (
        Hub(dict.fromkeys((f"{each}.onnx" for each in "abcdef"), MODEL)),
        *("", "source_invalid", "6 models, 'a.onnx', 'b.onnx', 'c.onnx', 'd.onnx': name one, as hf://"),
    ),
    "none": (Hub({"a/m.onnx": MODEL}), "", "source_invalid", "no .onnx file"),
    "no such file": (Hub(ONE), "@main/m.onnx", "source_not_found", "no file 'm.onnx'"),
    "no such revision": (Hub(ONE), "@v9", "source_not_found", "Revision Not Found"),
    "no commit": (lambda _: answer(200, b'{"id": "o/r", "sha": "main"}'), "", "source_invalid", "no commit"),
    "no JSON": (lambda _: answer(200, b"<html>"), "", "source_invalid", "this is no hub"),
    "not for all": (
        lambda _: answer(403, b"{}", x_error_code="GatedRepo"), "", "source_denied", "ask for access"
    ),
    "out of order": (lambda _: answer(503), "", "source_unreachable", "503"),
}  # fmt: skip


@pytest.mark.parametrize(("reply", "rest", "code", "said"), PROBLEMS.values(), ids=PROBLEMS)
async def test_problem_says_what_to_do(ask: Any, reply: Reply, rest: str, code: str, said: str) -> None:
    async with serving_site(reply) as site:
        [[found, text]] = await ask(site, "resolve", f"hf://org/repo{rest}")
    assert (found, said in text) == (code, True), text
