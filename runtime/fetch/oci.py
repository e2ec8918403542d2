"""Artifacts of OCI registries: ModelPack artifacts, files pushed with ORAS, and images with a model in them.

OCI Distribution Specification 1.1 and OCI Image Specification 1.1. A registry answers 401 with a challenge;
the token of a bearer challenge comes from the address that it names (distribution.github.io, "Token
Authentication"). Credentials are those of `docker login`.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlencode

import msgspec
from msgspec import Meta, Struct

from runtime.fetch.messages import Order, RemoteFile, Resolved
from runtime.fetch.origin import Download, SourceDenied, SourceInvalid
from runtime.fetch.sources import InvalidSource, SourceName, parse_allowed
from runtime.fetch.web import Web
from runtime.onnxfile import MODEL_FILE, list_model_folders

DOCKER_HUB, DOCKER_HUB_REGISTRY, DOCKER_HUB_LOGIN = "docker.io", "registry-1.docker.io", "index.docker.io"
"""The name of Docker Hub in names of images, its registry, and its name in the file of `docker login`."""
OTHER_HOSTS: Mapping[str, Sequence[str]] = {
    DOCKER_HUB: (
        DOCKER_HUB_REGISTRY,
        "auth.docker.io",
        "production.cloudflare.docker.com",
        "production.cloudfront.docker.com",
        "docker-images-prod.6aa30f8b08e16409b46e0173d6de2f56.r2.cloudflarestorage.com",
    ),
    "ghcr.io": ("pkg-containers.githubusercontent.com",),
    "quay.io": ("*.quay.io",),
}
"""Public hosts to which well-known registries lead for tokens and blobs."""
ACCEPT = (
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json,"
    " application/vnd.docker.distribution.manifest.v2+json,"
    " application/vnd.docker.distribution.manifest.list.v2+json"
)
LEFT_OUT = re.compile(r"\.(?:docs?|dataset|code)\.v1\.|^application/vnd\.oci\.empty\.v1")
"""Media types of ModelPack's documents, training data and code, and of an artifact's empty layer."""
ARCHIVE = re.compile(r"\.tar(?:[+.](?:gzip|zstd))?$")
FILE_PATH, TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
"""Annotations of layers: a file's path in ModelPack and in ORAS, and `true` for a folder, packed by ORAS."""
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # the names that Go has for them

_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._/-]*)(?::(\w[\w.-]*))?(?:@(sha256:[0-9a-f]{64}))?", re.ASCII)
_PARAMETER = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


class Platform(Struct, frozen=True):
    """For which machine a manifest of an index is."""

    os: str = ""
    architecture: str = ""


class Descriptor(Struct, frozen=True, rename="camel"):
    """The entry of a blob in a manifest, or of a manifest in an index; digests are of SHA-256."""

    media_type: str
    digest: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
    size: int
    annotations: dict[str, str] = {}
    platform: Platform = Platform()


class OciManifest(Struct, frozen=True):
    """A manifest, which has layers, or an index, which has manifests."""

    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] = ()


class RegistryToken(Struct, frozen=True):
    """The answer of a registry's token endpoint; one of the two has the token."""

    token: str = ""
    access_token: str = ""


class DockerConfig(Struct, frozen=True):
    """Docker's `config.json`: by registry `auth`, base64 of name and password, or `identitytoken`."""

    auths: dict[str, dict[str, str]] = {}


class Oci:
    """The artifact that a source names: `oci://registry/repository`, with `:tag` or `@sha256:...` or both.

    Raises:
        InvalidSource: `invalid_source`, for a name that is no reference.
        SourceProblem: of `runtime.fetch.web.Web`.
    """

    def __init__(self, source: SourceName, order: Order) -> None:
        match = _REFERENCE.fullmatch(source.path)
        if match is None:
            raise InvalidSource(
                f"{source.name!a} is no source: write oci://registry/repository:tag, or @sha256:..."
            )
        repository, tag, digest = match.groups()
        is_hub = source.host == DOCKER_HUB
        self._repository = f"library/{repository}" if is_hub and "/" not in repository else repository
        self._reference = digest or tag or "latest"
        self._url = f"https://{DOCKER_HUB_REGISTRY if is_hub else source.host}/v2/{self._repository}"
        self._source, self._digest = source, order.digest
        self._credentials, self._hint = find_credentials(source.host, order.environment)
        hosts = parse_allowed(order.allowed).list_hosts(source, OTHER_HOSTS.get(source.host, ()))
        self.client = Web(hosts, order.environment.get("SSL_CERT_FILE"), credential=self._hint)
        self._files: tuple[RemoteFile, ...] = ()
        self._challenges: Mapping[str, Mapping[str, str]] = {}
        self._authorization: str | None = None

    async def resolve(self) -> Resolved:
        """Return the digest that the name means now, and the files of its layers."""
        digest, manifest = await self._get_manifest(self._reference)
        digests = [digest]
        if manifest.manifests:
            digest, manifest = await self._get_manifest(choose_manifest(manifest.manifests).digest)
            digests.append(digest)
        if self._digest is not None and f"sha256:{self._digest}" not in digests:
            raise SourceInvalid(
                f"the manifest of {self._source.name} has the digest {digests[0]}, and not"
                f" sha256:{self._digest}"
            )
        self._files = list_files(manifest.layers)
        return Resolved(f"oci://{self._source.host}/{self._repository}@{digest}", self._files)

    @asynccontextmanager
    async def open(self, index: int, offset: int) -> AsyncIterator[Download]:
        """Read a blob from an offset on, with a token of its own: tokens live for a few minutes only."""
        if self._challenges:
            await self._authenticate()
        url = f"{self._url}/blobs/sha256:{self._files[index].sha256}"
        async with self.client.download(
            url, authorization=self._authorization, offset=offset, is_pinned=True
        ) as download:
            yield download

    async def _get_manifest(self, reference: str) -> tuple[str, OciManifest]:
        """Return a manifest by tag or digest, and its digest; answer the registry's challenge first."""
        get = partial(self.client.get, f"{self._url}/manifests/{reference}", headers={"Accept": ACCEPT})
        answer = await get(
            authorization=self._authorization, statuses=(HTTPStatus.OK, HTTPStatus.UNAUTHORIZED)
        )
        if answer.status == HTTPStatus.UNAUTHORIZED:
            self._challenges = parse_challenges(answer.headers)
            await self._authenticate()
            answer = await get(authorization=self._authorization)
        digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        if reference.startswith("sha256:") and reference != digest:
            raise SourceInvalid(f"{self._source.host} sent other bytes than those of {reference}")
        try:
            return digest, msgspec.json.decode(answer.body, type=OciManifest)
        except msgspec.MsgspecError as error:
            raise SourceInvalid(f"the manifest of {self._source.name} cannot be read: {error}") from None

    async def _authenticate(self) -> None:
        """Answer the registry's challenge, with a token or with the credentials themselves."""
        basic = f"Basic {self._credentials}" if self._credentials else None
        bearer = self._challenges.get("bearer")
        if bearer is None:
            if basic is None or "basic" not in self._challenges:
                raise SourceDenied(f"{self._source.host} asks for credentials: {self._hint}")
            self._authorization = basic
            return
        query = {"scope": f"repository:{self._repository}:pull", **bearer}
        address = query.pop("realm", "")  # the client refuses hosts that are not allowed
        answer = await self.client.get(f"{address}?{urlencode(query)}", authorization=basic)
        try:
            token = msgspec.json.decode(answer.body, type=RegistryToken)
        except msgspec.MsgspecError as error:
            raise SourceInvalid(f"the token of {self._source.host} cannot be read: {error}") from None
        self._authorization = f"Bearer {token.token or token.access_token}"


def parse_challenges(headers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the parameters of each scheme in WWW-Authenticate headers, one challenge in each."""
    found = {}
    for name, value in headers.items():
        if name.lower() == "www-authenticate":
            scheme, _, parameters = value.partition(" ")
            found[scheme.lower()] = {key.lower(): text for key, text in _PARAMETER.findall(parameters)}
    return found


def find_credentials(registry: str, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """Return a registry's credentials in docker's file, in base64, and what a refusal says of them."""
    folder = environment.get("DOCKER_CONFIG") or f"{environment.get('HOME', '/nonexistent')}/.docker"
    advice = (
        f"run `docker login {registry}` as the server's user, or name in DOCKER_CONFIG a folder whose"
        " config.json has the password itself: credential helpers and identity tokens are not used"
    )
    try:
        config = msgspec.json.decode(Path(folder, "config.json").read_bytes(), type=DockerConfig)
    except (OSError, msgspec.MsgspecError) as error:
        return None, f"docker's config.json cannot be read ({type(error).__name__}): {advice}"
    name = DOCKER_HUB_LOGIN if registry == DOCKER_HUB else registry
    logins = {re.sub("^https?://", "", key).partition("/")[0]: login for key, login in config.auths.items()}
    login = logins.get(name, {})
    if login.get("auth") and not login.get("identitytoken"):
        return login["auth"], f"it was sent the login that docker's config.json has for {registry}"
    return None, f"docker's config.json has no password for {registry}: {advice}"


def choose_manifest(manifests: Iterable[Descriptor]) -> Descriptor:
    """Return an index's only manifest, or the one for this machine; attestations do not count."""
    candidates = [each for each in manifests if each.platform.os != "unknown"]
    here = Platform("linux", MACHINES.get(platform.machine(), platform.machine()))
    chosen = [each for each in candidates if each.platform == here] or candidates
    if len(chosen) != 1:
        raise SourceInvalid(
            f"the name stands for {len(candidates)} manifests, and not one for {here.os}/{here.architecture}:"
            f" write @ and the digest of one of them: {', '.join(each.digest for each in candidates[:10])}"
        )
    return chosen[0]


def list_files(layers: Iterable[Descriptor]) -> tuple[RemoteFile, ...]:
    """Return the files of layers; if none is an archive, those in the model's folder, relative to it."""
    kept = [each for each in layers if not LEFT_OUT.search(each.media_type)]
    if not kept:
        raise SourceInvalid("the artifact has no files of a model")
    files = [_describe_layer(layer, is_only=len(kept) == 1) for layer in kept]
    folders = list_model_folders(PurePosixPath(file.path) for file in files)
    if len(folders) != 1 or any(file.is_archive for file in files):
        return tuple(files)
    return tuple(
        msgspec.structs.replace(file, path=str(PurePosixPath(file.path).relative_to(folders[0])))
        for file in files
        if folders[0] in PurePosixPath(file.path).parents
    )


def _describe_layer(layer: Descriptor, *, is_only: bool) -> RemoteFile:
    notes = layer.annotations
    path = notes.get(FILE_PATH) or notes.get(TITLE)
    is_file = TITLE in notes and FILE_PATH not in notes  # ORAS gives any file the media type of an archive
    is_packed = ARCHIVE.search(layer.media_type) is not None and not is_file
    is_archive = is_packed or notes.get(UNPACK) == "true"
    if path is None and not is_archive and not is_only:
        raise SourceInvalid(f"the layer {layer.digest} has no path: annotate it with {TITLE}")
    name = path or (layer.digest if is_archive else MODEL_FILE)
    return RemoteFile(name, layer.size, layer.digest.removeprefix("sha256:"), is_archive=is_archive)
