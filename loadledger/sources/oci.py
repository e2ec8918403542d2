"""Artifacts of OCI registries: ModelPack artifacts, files pushed with ORAS, and images with a model in them.

OCI Distribution Specification 1.1 and OCI Image Specification 1.1. A registry answers 401 with a challenge;
the token of a bearer challenge comes from the challenge's address (distribution.github.io, "Token
Authentication"). Credentials are those of `docker login`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from msgspec import Meta, Struct

from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Download, Downloads, OpenFile
from loadledger.sources.names import SourceName, invalid
from loadledger.sources.origin import RemoteFile, Resolved
from loadledger.sources.web import OK, Web
from runtime.onnxfile import MODEL_FILE, list_model_folders

DOCKER_HUB, DOCKER_HUB_REGISTRY, DOCKER_HUB_LOGIN = "docker.io", "registry-1.docker.io", "index.docker.io"
"""Docker Hub's name in names of images, its registry, and its name in the file of `docker login`."""
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
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # Go's names
HELPER_S = 60.0
"""Time for a credential helper, which may ask a person, or a cloud."""
UNAUTHORIZED = 401

_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._/-]*)(?::(\w[\w.-]*))?(?:@(sha256:[0-9a-f]{64}))?", re.ASCII)
_SCHEME_OR_PARAMETER = re.compile(
    r'(?:^|,)\s*([\w-]+)(?=\s+\w|\s*(?:,|$))|(?<!\w)(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))'
)
"""A value is quoted, or a token (RFC 9110, 11.2); some registries send a whole URL without quotes."""
SHOWN_CHARACTERS = 200
"""Of a challenge in a message."""
T = TypeVar("T")


class Platform(Struct, frozen=True):
    """The machine of a manifest in an index."""

    os: str = ""
    architecture: str = ""


class Descriptor(Struct, frozen=True, rename="camel"):
    """The entry of a blob in a manifest, or of a manifest in an index, with a SHA-256 digest."""

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
    """The answer of a registry's token endpoint; one of the members has the token."""

    token: str = ""
    access_token: str = ""


class DockerConfig(Struct, frozen=True, rename="camel"):
    """Docker's `config.json`: logins by registry, and the credential helpers."""

    auths: dict[str, dict[str, Any]] = {}
    creds_store: str | None = None
    cred_helpers: dict[str, str] = {}


class Login(Struct, frozen=True, rename="pascal"):
    """The answer of a credential helper."""

    username: str
    secret: str


class Oci:
    """The artifact that a source names: `oci://registry/repository`, with `:tag` or `@sha256:...` or both."""

    def __init__(self, source: SourceName, digest: str | None) -> None:
        match = _REFERENCE.fullmatch(source.path)
        if match is None:
            raise invalid(f"{source.name!a} is no source: write oci://registry/repository:tag or @sha256:...")
        repository, tag, own_digest = match.groups()
        is_hub = source.host == DOCKER_HUB
        self._repository = f"library/{repository}" if is_hub and "/" not in repository else repository
        self._reference = own_digest or tag or "latest"
        self._registry = DOCKER_HUB_REGISTRY if is_hub else source.host
        self._url = f"https://{self._registry}/v2/{self._repository}"
        self._source, self._digest = source, digest
        self._credentials, self._hint = find_credentials(DOCKER_HUB_LOGIN if is_hub else source.host)
        self._web = Web(self._hint)
        self._challenge_text = ""
        self._challenges: Mapping[str, Mapping[str, str]] = {}
        self._authorization: str | None = None

    def resolve(self) -> Resolved:
        """Return the present digest of the name, and the files of its layers."""
        digest, manifest = self._get_manifest(self._reference)
        digests = [digest]
        if manifest.manifests:
            digest, manifest = self._get_manifest(choose_manifest(manifest.manifests).digest)
            digests.append(digest)
        if self._digest is not None and f"sha256:{self._digest}" not in digests:
            raise SourceProblem(
                "digest_mismatch",
                f"the manifest of {self._source.name} has the digest {digests[0]}, and not"
                f" sha256:{self._digest}",
            )
        files = list_files(manifest.layers)
        return Resolved(f"oci://{self._source.host}/{self._repository}@{digest}", files)

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        """Fetch a blob, with a token of its own, because tokens live only for minutes."""
        url = f"{self._url}/blobs/sha256:{file.sha256}"

        def open_at(offset: int) -> OpenFile:
            if self._challenges:
                self._authenticate()
            return self._web.file_opener(url, authorization=self._authorization)(offset)

        return downloads.receive(f"sha256:{file.sha256}", open_at, size=file.bytes, sha256=file.sha256)

    def _get_manifest(self, reference: str) -> tuple[str, OciManifest]:
        """Return a manifest by tag or digest, and its digest, after answering the registry's challenge."""
        url, headers = f"{self._url}/manifests/{reference}", {"Accept": ACCEPT}
        answer = self._web.get(
            url, headers=headers, authorization=self._authorization, statuses=(OK, UNAUTHORIZED)
        )
        if answer.status == UNAUTHORIZED:
            self._challenge_text = ", ".join(answer.challenges)
            self._challenges = parse_challenges(answer.challenges)
            self._authenticate()
            answer = self._web.get(url, headers=headers, authorization=self._authorization)
        digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        if reference.startswith("sha256:") and reference != digest:
            raise SourceProblem(
                "digest_mismatch", f"{self._source.host} sent other bytes than those of {reference}"
            )
        return digest, _decode(answer.body, OciManifest, f"the manifest of {self._source.name}")

    def _authenticate(self) -> None:
        """Answer the registry's challenge, with a token or with the credentials themselves."""
        basic = f"Basic {self._credentials}" if self._credentials else None
        bearer = self._challenges.get("bearer")
        if bearer is None:
            if "basic" not in self._challenges:
                raise self._refuse_challenge("has neither Bearer nor Basic")
            if basic is None:
                raise SourceProblem(
                    "source_denied", f"{self._source.host} asks for credentials: {self._hint}"
                )
            self._authorization = basic
            return
        query = {"scope": f"repository:{self._repository}:pull", **bearer}
        realm = query.pop("realm", "")
        if not realm.startswith(("https://", "http://")):  # of http, the client says that it is refused
            raise self._refuse_challenge("names no address that issues a token")
        if basic is not None and not may_have_password(self._registry, realm):
            raise SourceProblem(
                "source_denied",
                f"{self._source.host} wants the password sent to {realm[:200]!a}, another host: it is not"
                f" sent; run `docker logout {self._source.host}` to ask there without",
            )
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        answer = self._web.get(url, authorization=basic)
        token = _decode(answer.body, RegistryToken, f"the token of {self._source.host}")
        self._authorization = f"Bearer {token.token or token.access_token}"

    def _refuse_challenge(self, defect: str) -> SourceProblem:
        shown = ascii(self._challenge_text[:SHOWN_CHARACTERS])
        return SourceProblem(
            "source_denied",
            f"{self._source.host} asks for credentials, and its header WWW-Authenticate {defect}: {shown};"
            " download the files with another tool, and add them by their path",
        )


def _decode(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise SourceProblem("source_invalid", f"{what} cannot be read: {error}") from None


def may_have_password(registry: str, realm: str) -> bool:
    """Whether a registry's address for tokens may get the registry's password.

    It may if it has the registry's own host, at any port, or the same last two labels, such as
    registry-1.docker.io and auth.docker.io.
    """
    with suppress(ValueError):
        own, other = urlsplit(f"https://{registry}").hostname or "", urlsplit(realm).hostname or ""
        if urlsplit(realm).scheme == "https" and own and other:
            with suppress(ValueError):
                return ip_address(own) == ip_address(other)
            labels = own.split("."), other.split(".")
            return own == other or (min(map(len, labels)) > 1 and labels[0][-2:] == labels[1][-2:])
    return False


def parse_challenges(fields: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the parameters of each scheme in WWW-Authenticate fields, which may have several challenges."""
    found: dict[str, dict[str, str]] = {}
    for field in fields:
        parameters: dict[str, str] = {}
        for scheme, name, quoted, token in _SCHEME_OR_PARAMETER.findall(field):
            if scheme:
                parameters = found[scheme.lower()] = {}
            else:
                parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) or token
    return found


def find_credentials(name: str) -> tuple[str | None, str]:
    """Return docker's credentials for a registry, in base64, and their description for a refusal."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser()
    advice = f"run `docker login {name}`; identity tokens are not used"
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=DockerConfig)
    except (OSError, msgspec.MsgspecError) as error:
        return None, f"docker's config.json cannot be read ({type(error).__name__}): {advice}"
    helper = _of_host(config.cred_helpers, name) or config.creds_store
    found = _ask_helper(helper, name) if helper else None
    login = _of_host(config.auths, name) or {}
    if found is None and login.get("auth") and not login.get("identitytoken"):
        found = str(login["auth"])
    if found is not None:
        return found, f"it was sent the login that docker has for {name}"
    asked = f" (docker-credential-{helper} gave none)" if helper else ""
    return None, f"docker has no password for {name}{asked}: {advice}"


def _of_host(entries: Mapping[str, T], name: str) -> T | None:
    """Return a registry's entry, whose name in docker's file may be a URL."""
    hosts = {re.sub("^https?://", "", key).partition("/")[0]: entry for key, entry in entries.items()}
    return hosts.get(name)


def _ask_helper(helper: str, name: str) -> str | None:
    """Return the credentials that docker's credential helper has for a registry."""
    asked = f"https://{name}/v1/" if name == DOCKER_HUB_LOGIN else name
    with suppress(OSError, subprocess.SubprocessError, msgspec.MsgspecError):
        done = subprocess.run(  # noqa: S603 - a program that the person's own file names
            [f"docker-credential-{helper}", "get"],
            input=asked.encode(),
            capture_output=True,
            timeout=HELPER_S,
            check=True,
        )
        login = msgspec.json.decode(done.stdout, type=Login)
        if login.username != "<token>":  # otherwise the secret is an identity token
            return base64.b64encode(f"{login.username}:{login.secret}".encode()).decode()
    return None


def choose_manifest(manifests: Iterable[Descriptor]) -> Descriptor:
    """Return an index's only manifest, or the one for this machine, without attestations."""
    candidates = [each for each in manifests if each.platform.os != "unknown"]
    here = Platform("linux", MACHINES.get(platform.machine(), platform.machine()))
    chosen = [each for each in candidates if each.platform == here] or candidates
    if len(chosen) != 1:
        raise SourceProblem(
            "source_invalid",
            f"the name stands for {len(candidates)} manifests, and not one for {here.os}/{here.architecture}:"
            f" write @ and the digest of one of them: {', '.join(each.digest for each in candidates[:10])}",
        )
    return chosen[0]


def list_files(layers: Iterable[Descriptor]) -> tuple[RemoteFile, ...]:
    """Return the files of layers; without an archive, those in the model's folder, relative to it."""
    kept = [each for each in layers if not LEFT_OUT.search(each.media_type)]
    if not kept:
        raise SourceProblem("source_invalid", "the artifact has no files of a model")
    files = list(_describe_layers(kept))
    folders = list_model_folders(PurePosixPath(file.path) for file in files)
    if len(folders) != 1 or any(file.is_archive for file in files):
        return tuple(files)
    return tuple(
        RemoteFile(str(PurePosixPath(file.path).relative_to(folders[0])), file.bytes, file.sha256)
        for file in files
        if folders[0] in PurePosixPath(file.path).parents
    )


def _describe_layers(layers: list[Descriptor]) -> Iterator[RemoteFile]:
    for layer in layers:
        notes = layer.annotations
        path = notes.get(FILE_PATH) or notes.get(TITLE)
        is_file = TITLE in notes and FILE_PATH not in notes  # ORAS gives every file an archive's media type
        is_packed = ARCHIVE.search(layer.media_type) is not None and not is_file
        is_archive = is_packed or notes.get(UNPACK) == "true"
        if path is None and not is_archive and len(layers) > 1:
            raise SourceProblem(
                "source_invalid", f"the layer {layer.digest} has no path: annotate it with {TITLE}"
            )
        name = path or (layer.digest if is_archive else MODEL_FILE)
        yield RemoteFile(name, layer.size, layer.digest.removeprefix("sha256:"), is_archive=is_archive)
