"""The commands of docs/how-to/add-a-model-by-name.md add a version from each kind of source; one loads it.

Real servers, the real command; only the names of hosts are other ones.
"""

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from support.clouds import running_fake_cloud, running_s3
from support.http import ONE, LocalApi
from support.origins import COMMIT, Hub, RangedFile, serving_site
from support.pages import ROOT
from support.registries import TITLE, running_registry
from support.servers import MODULE, clean_environment
from support.sources import environment_of
from support.uploads import FILES, MODEL, staged

from events.types import VersionAdded

RAW, PATH = "application/vnd.cncf.model.weight.v1.raw", "org.cncf.model.filepath"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


PAGE = (ROOT / "docs/how-to/add-a-model-by-name.md").read_text(encoding="utf-8")
PRINTED = {
    words[3].partition("://")[0]: words
    for words in map(str.split, re.findall(r"\| `(loadledger add \S+ \S+)` \|", PAGE))
}
"""The words of the page's commands, by the scheme of their source."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A source with a model: its host, the variables that the command needs, and what its name means."""

    host: str
    environment: Mapping[str, str]
    resolved: str


def image_layer() -> bytes:
    """Return the layer of an image that has its model in a folder, as KServe's modelcars do."""
    layer = BytesIO()
    with tarfile.open(fileobj=layer, mode="w:gz") as archive:
        for path, content in FILES.items():
            member = tarfile.TarInfo(f"models/{path}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return layer.getvalue()


@asynccontextmanager
async def offered(kind: str, folder: Path) -> AsyncIterator[Offer]:
    """Run a server of this kind that has a model."""
    async with AsyncExitStack() as running:
        if kind == "https":
            site = await running.enter_async_context(serving_site(RangedFile(MODEL)))
            resolved = f"https://{site.host}/digits.onnx#sha256={sha256(MODEL).hexdigest()}"
            yield Offer(site.host, environment_of(site, folder), resolved)
        elif kind == "hf":
            hub = Hub(FILES, large=frozenset({"data/w.bin"}), token="hf_secret")
            site = await running.enter_async_context(serving_site(hub))
            variables = environment_of(site, folder) | {"HF_TOKEN": "hf_secret"}
            yield Offer("", variables, f"hf://org/repo@{COMMIT}")
        elif kind.startswith("oci"):
            registry = await running.enter_async_context(running_registry(folder, "token"))
            if kind == "oci image":
                layers = [await registry.push_blob("team/digits", image_layer(), LAYER)]
            else:
                layers = [
                    await registry.push_blob("team/digits", content, RAW, **{PATH: path, TITLE: path})
                    for path, content in FILES.items()
                ]
            digest = await registry.push("team/digits", "v1", layers)
            resolved = f"oci://{registry.host}/team/digits@{digest}"
            yield Offer(registry.host, registry.environment(), resolved)
        elif kind == "s3":
            s3 = running.enter_context(running_s3())
            await asyncio.to_thread(s3.create_bucket, "models", versioned=True)
            for path, content in FILES.items():
                await asyncio.to_thread(s3.put, f"models/digits/{path}", content)
            variables = {**KEYS, "AWS_ENDPOINT_URL": s3.url, "AWS_ALLOW_HTTP": "true"}
            yield Offer("", variables, "s3://models/digits/net.onnx#versionId=")
        else:
            fake = await running.enter_async_context(running_fake_cloud())
            fake.objects = {f"digits/{path}": content for path, content in FILES.items()}
            variables = {"GOOGLE_BASE_URL": fake.url, "GOOGLE_ALLOW_HTTP": "true"}
            if kind == "az":
                variables = {"AZURE_STORAGE_ENDPOINT": fake.url, "AZURE_ALLOW_HTTP": "true"}
                variables["AZURE_STORAGE_ACCOUNT_NAME"] = "account"
            yield Offer("", variables, f"{kind}://models/digits/net.onnx#")


async def run(*arguments: str, environment: Mapping[str, str]) -> str:
    """Run a command of the client; return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *MODULE,
        *arguments,
        env=clean_environment() | dict(environment),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return printed.decode()


@pytest.mark.parametrize("kind", ["https", "hf", "oci", "oci image", "s3", "gs", "az"])
async def test_one_line_adds_and_one_loads(kind: str, shared: LocalApi, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    async with offered(kind, folder) as offer:
        me = {"LOADLEDGER_URL": shared.url, "LOADLEDGER_TOKEN": shared.token("admin")}
        me |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), **offer.environment}
        _, *command, named, source = PRINTED[kind.partition(" ")[0]]
        name = f"{named}-{kind.replace(' ', '-')}"
        source = re.sub(r"\w+\.example\.com", offer.host, source)
        added = await run(*command, name, source, environment=me)
        assert f"{name} version 1: added" in added
        assert offer.resolved in added
        assert staged(shared.config.repository) == []
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
        if kind == "https":
            await run("load", name, "--wait", environment=me)
            assert (await shared.infer(name, ONE)).json["outputs"][0]["data"] == [2]
        else:
            await shared.load(name)
        [origin] = (await shared.model(name))["sources"]
        assert (origin["source"], origin["added_by"]) == (source, "alice")
        assert origin["resolved"].startswith(offer.resolved)
    assert (await shared.types(name)).count(VersionAdded.TYPE) == 1
