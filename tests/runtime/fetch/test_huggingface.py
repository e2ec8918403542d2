"""Repositories of Hugging Face: which files of which commit, tokens, pages, and errors."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from support.origins import COMMIT, Hub, Reply, Site, answer, serving_site, write_authority

from runtime.errors import RuntimeProblem
from runtime.fetch.huggingface import HuggingFace
from runtime.fetch.messages import Order, RemoteFile, Resolved
from runtime.fetch.sources import parse_source

TOKEN = "hf_a-secret"
MODEL = b"\x08\x08a model"
DIGEST = sha256(MODEL).hexdigest()
ONE = {"model.onnx": MODEL, "README.md": b"read"}


@dataclass(frozen=True)
class Hubs:
    """Starts a hub, and makes origins that ask it."""

    stack: AsyncExitStack
    folder: Path

    async def start(self, reply: Reply) -> Site:
        return await self.stack.enter_async_context(serving_site(reply))

    async def origin(
        self,
        site: Site,
        name: str = "hf://org/repo",
        digest: str | None = None,
        allowed: str = "hf",
        **environment: str,
    ) -> HuggingFace:
        own = {"HF_ENDPOINT": site.url("/"), "SSL_CERT_FILE": write_authority(self.folder)}
        order = Order(name, digest, allowed, {**own, "HOME": str(self.folder), **environment})
        origin = HuggingFace(parse_source(name), order)
        await self.stack.enter_async_context(origin.client)
        return origin


@pytest.fixture
async def hubs(tmp_path: Path) -> AsyncIterator[Hubs]:
    async with AsyncExitStack() as stack:
        yield Hubs(stack, tmp_path)


async def failure(origin: HuggingFace) -> RuntimeProblem:
    with pytest.raises(RuntimeProblem) as caught:
        await origin.resolve()
    assert TOKEN not in str(caught.value)
    return caught.value


FOLDERS: Mapping[str, tuple[list[str], str, dict[str, bool]]] = {
    "root": (["model.onnx", "other.onnx"], "", {"model.onnx": True, "other.onnx": False}),
    "only one": (["m.onnx", "sub/n.onnx"], "", {"m.onnx": True, "sub/n.onnx": False}),
    "onnx folder": (
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_fp16.onnx", "config.json", ".gitattributes"],
        "",
        {"model.onnx": True, "model.onnx_data": False, "model_fp16.onnx": False},
    ),
    "named": (["a/b c.onnx", "a/d.onnx"], "/a/b%20c.onnx", {"b c.onnx": True, "d.onnx": False}),
    "revision": (["model.onnx"], "@refs%2Fpr%2F1", {"model.onnx": True}),
    "both": (["a.onnx", "b.onnx"], "@v1.0/b.onnx", {"a.onnx": False, "b.onnx": True}),
    "beside": (
        ["model.onnx", "model.onnx.sig", "sub/x.sig", ".hidden/x", "sub/.x"],
        "",
        {"model.onnx": True, "model.onnx.sig": True, "sub/x.sig": False},
    ),
}


@pytest.mark.parametrize(("paths", "rest", "expected"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("page_files", [1, 1000])
async def test_files_are_those_of_the_model_folder(
    hubs: Hubs, paths: list[str], rest: str, expected: dict[str, bool], page_files: int
) -> None:
    revision, slash, file = rest.partition("/")
    hub = Hub(dict.fromkeys(paths, MODEL), page_files=page_files, revision=revision[1:] or "main")
    origin = await hubs.origin(await hubs.start(hub), f"hf://org/repo{rest}")
    resolved = await origin.resolve()
    assert resolved.name == f"hf://org/repo@{COMMIT}{slash}{file}"
    assert {each.path: each.is_needed for each in resolved.files} == expected


@pytest.mark.parametrize(
    ("large", "digest", "expected"),
    [
        ({"model.onnx"}, None, DIGEST),
        ({"model.onnx"}, DIGEST, DIGEST),
        ((), None, None),
        ((), DIGEST, DIGEST),
    ],
)
async def test_sha256_comes_from_lfs_or_the_order(
    hubs: Hubs, large: set[str], digest: str | None, expected: str | None
) -> None:
    site = await hubs.start(Hub({"model.onnx": MODEL}, frozenset(large)))
    resolved = await (await hubs.origin(site, digest=digest)).resolve()
    file = RemoteFile("model.onnx", len(MODEL), expected)
    assert resolved == Resolved(f"hf://org/repo@{COMMIT}", (file,))


async def test_file_is_read_from_another_host_without_the_token(hubs: Hubs) -> None:
    cdn = await hubs.start(Hub({"onnx/a b.onnx": MODEL}))
    site = await hubs.start(Hub({"onnx/a b.onnx": MODEL}, token=TOKEN, cdn=cdn.url("")))
    origin = await hubs.origin(site, allowed=f"hf https://{cdn.host}", HF_TOKEN=TOKEN)
    await origin.resolve()
    async with origin.open(0, 0) as download:
        assert b"".join([piece async for piece in download.pieces]) == MODEL
    assert all(asked.headers["authorization"] == f"Bearer {TOKEN}" for asked in site.asked)
    assert [asked.headers.get("authorization") for asked in cdn.asked] == [None]


TOKENS: Mapping[str, tuple[dict[str, str], str]] = {
    "variable": ({"HF_TOKEN": TOKEN}, ""),
    "path": ({"HF_TOKEN_PATH": "{folder}/secret"}, "secret"),
    "home of the Hub": ({"HF_HOME": "{folder}/hub"}, "hub/token"),
    "home": ({}, ".cache/huggingface/token"),
}


@pytest.mark.parametrize(("environment", "file"), TOKENS.values(), ids=TOKENS)
async def test_token_is_found_as_the_hub_client_finds_it(
    hubs: Hubs, tmp_path: Path, environment: dict[str, str], file: str
) -> None:
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{TOKEN}\n")
    named = {name: value.format(folder=tmp_path) for name, value in environment.items()}
    origin = await hubs.origin(await hubs.start(Hub(ONE, token=TOKEN)), **named)
    assert (await origin.resolve()).files


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "no token was sent"),
        ("hf_other", "token of HF_TOKEN may read"),
        ("two\nlines", "no token was sent"),
    ],
)
async def test_refused_token_is_named(hubs: Hubs, token: str, words: str) -> None:
    problem = await failure(await hubs.origin(await hubs.start(Hub(ONE, token=TOKEN)), HF_TOKEN=token))
    assert problem.code == "source_denied"
    assert words in str(problem)
    assert "Invalid username" not in str(problem)


PROBLEMS: Mapping[str, tuple[Reply, str, str, str]] = {
    "several": (
        Hub(dict.fromkeys((f"{each}.onnx" for each in "abcdef"), MODEL)),
        *("", "source_invalid", "6 models, 'a.onnx', 'b.onnx', 'c.onnx', 'd.onnx': name one, as hf://"),
    ),
    "none": (Hub({"a/m.onnx": MODEL}), "", "source_invalid", "no .onnx file"),
    "no such file": (Hub(ONE), "/m.onnx", "source_not_found", "no file 'm.onnx'"),
    "no such revision": (Hub(ONE), "@v9", "source_not_found", "404"),
    "other digest": (Hub(ONE, frozenset(ONE)), "", "source_changed", f"{DIGEST}, and 000"),
    "no JSON": (lambda _: answer(200, b"<html>"), "", "source_invalid", "not what the Hub sends"),
    "no commit": (lambda _: answer(200, b'{"sha": "main"}'), "", "source_invalid", "no commit"),
    "endless pages": (
        lambda asked: (
            Hub(ONE)(asked)
            if "/revision/" in asked.path
            else answer(200, b"[]", link=f'<https://{asked.headers["host"]}/api/x>; rel="next"')
        ),
        *("", "source_invalid", "pages"),
    ),
    "pages elsewhere": (
        lambda asked: (
            Hub(ONE)(asked)
            if "/revision/" in asked.path
            else answer(200, b"[]", link='<https://localhost.example/api/x>; rel="next"')
        ),
        *("", "source_invalid", "another address"),
    ),
}


@pytest.mark.parametrize(("reply", "rest", "code", "words"), PROBLEMS.values(), ids=PROBLEMS)
async def test_unusable_repository_gives_code_and_what_to_do(
    hubs: Hubs, reply: Reply, rest: str, code: str, words: str
) -> None:
    origin = await hubs.origin(await hubs.start(reply), f"hf://org/repo{rest}", "0" * 64, HF_TOKEN=TOKEN)
    problem = await failure(origin)
    assert (problem.code, words in str(problem)) == (code, True), str(problem)


@pytest.mark.parametrize("name", ["hf://org/repo/", "hf://org/@main", "hf://org/repo@", "hf://org/re%20po"])
def test_name_of_no_repository_is_refused(name: str) -> None:
    with pytest.raises(RuntimeProblem, match="write hf://org/repo"):
        HuggingFace(parse_source(name), Order(name, None, "hf", {}))
