"""Names of sources, and which of them the operator allows. Pure.

    https://host/path/model.onnx           one file; its SHA-256 must be given
    hf://org/repo@revision[/file.onnx]     a repository of Hugging Face; without a revision, `main`
    oci://registry/repository:tag          an artifact of an OCI registry, or `@sha256:...`
    s3://bucket/path  gs://...  az://...   an object, or with a slash at the end the objects beneath it

The operator's list has entries separated by commas or white space: `all`, `none`, a scheme, or a scheme with
one host (`oci://ghcr.io`, `https://*.example.com`), organisation (`hf://org`) or bucket (`s3://models`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from runtime.errors import RuntimeProblem

SCHEMES = ("https", "hf", "oci", "s3", "gs", "az")
HOST_SCHEMES = ("https", "oci")
"""Schemes with a host in their names; the others have an organisation or a bucket there."""
ALL, NONE, CLOUD_METADATA = "all", "none", "cloud-metadata"
"""Entries of the operator's list; the last allows to ask a cloud's metadata service for credentials."""
VARIABLE_PREFIXES = {"hf": "HF_", "oci": "DOCKER_CONFIG", "s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""How the variables of a scheme begin: credentials, and addresses of sources."""
MAX_CHARACTERS = 2048
"""Of a name: more than any object store or proxy takes."""
HTTPS_PORT = 443

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_ENTRY = re.compile(rf"({'|'.join(SCHEMES)})(?:://(.+))?")


class InvalidSource(RuntimeProblem):
    """The text names no source."""

    code = "invalid_source"


class SourceNotAllowed(RuntimeProblem):
    """The operator does not allow the source, or a host to which it leads."""

    code = "source_not_allowed"


@dataclass(frozen=True, slots=True)
class SourceName:
    """A source that was named: host with port if it has one, or organisation, or bucket; raw path."""

    name: str
    scheme: str
    host: str
    path: str


def parse_source(name: str) -> SourceName:
    """Return the source that a text names, or raise `InvalidSource` with what to write instead."""
    shown = f"{name[:200]!a} is no source"
    if len(name) > MAX_CHARACTERS or not name.isascii() or not name.isprintable() or " " in name:
        raise InvalidSource(f"{shown}: it takes up to {MAX_CHARACTERS} ASCII characters, no space")
    try:
        scheme, host, path, _, _ = urlsplit(name)
    except ValueError:
        raise InvalidSource(f"{shown}: its host has brackets without an IPv6 address") from None
    if scheme not in SCHEMES:
        raise InvalidSource(f"{shown}: begin it with {', '.join(f'{each}://' for each in SCHEMES)}")
    if "?" in name or "#" in name:
        raise InvalidSource(
            "a source has no query and no fragment: the ledger keeps it, and would keep a signature in it;"
            " give the server credentials instead"
        )
    if "@" in host:
        raise InvalidSource("a source has no user name and no password: give the server credentials instead")
    path = path.removeprefix("/")
    if not _HOST.fullmatch(host) or host.startswith("*") or not path:
        raise InvalidSource(f"{shown}: it takes a host and a path, as {scheme}://host/path")
    if ".." in unquote(path).split("/") or "\\" in unquote(path):
        raise InvalidSource(f"{shown}: its path leads upwards")
    return SourceName(name, scheme, host.lower() if scheme in HOST_SCHEMES else host, path)


def check_pinned(source: SourceName, digest: str | None) -> None:
    """Refuse a file of the web whose bytes nobody names: raise `InvalidSource`."""
    if source.scheme == "https" and digest is None:
        raise InvalidSource(
            "a file of the web may be another one tomorrow: give the SHA-256 that it must have as its digest,"
            " sha256:<64 hexadecimal digits>"
        )


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The hosts to which a fetch may connect.

    Attributes:
        any_public: whether others are allowed at public addresses.
        public: host patterns, allowed at public addresses.
        named: host patterns that the operator named: allowed at any address.
    """

    any_public: bool = False
    public: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()

    def may_be_private(self, host: str, port: int) -> bool:
        """Whether the host may have a loopback, link-local or private address."""
        return _matches(self.named, host, port)

    def check(self, host: str, port: int) -> None:
        """Refuse a host: raise `SourceNotAllowed`, with the entry to add."""
        if self.any_public or self.may_be_private(host, port) or _matches(self.public, host, port):
            return
        where = join_host(host, port)
        raise SourceNotAllowed(
            f"the source leads to {where}, which the operator's list of sources does not have: add"
            f" https://{where} to --sources"
        )


@dataclass(frozen=True, slots=True)
class AllowList:
    """The operator's list: schemes that are allowed, and `(scheme, host)` that are."""

    schemes: frozenset[str] = frozenset()
    hosts: frozenset[tuple[str, str]] = frozenset()
    has_metadata: bool = False

    def check(self, source: SourceName) -> None:
        """Refuse a source: raise `SourceNotAllowed`, with the entry to add."""
        if source.scheme in self.schemes or self._names(source):
            return
        raise SourceNotAllowed(
            f"this server does not fetch from {source.scheme}://{source.host}: its operator allows sources"
            f" with --sources, here {source.scheme}://{source.host}"
        )

    def list_hosts(
        self, source: SourceName, public: Iterable[str] = (), named: Iterable[str] = ()
    ) -> AllowedHosts:
        """Return the hosts for a source: its own, those of https entries, and those that its scheme has."""
        web = {host for scheme, host in self.hosts if scheme == "https"}
        own = {source.host} if source.scheme in HOST_SCHEMES else set[str]()
        own_named = own if self._names(source) else set[str]()
        return AllowedHosts(
            source.scheme in self.schemes,
            frozenset({*public, *own} - own_named),
            frozenset({*web, *named, *own_named}),
        )

    def _names(self, source: SourceName) -> bool:
        patterns = {host for scheme, host in self.hosts if scheme == source.scheme}
        if source.scheme in HOST_SCHEMES:
            return _matches(patterns, *split_host(source.host))
        return source.host in patterns


def parse_allowed(text: str) -> AllowList:
    """Return the operator's list, or raise `ValueError` that names an invalid entry."""
    schemes, hosts, has_metadata = set[str](), set[tuple[str, str]](), False
    for entry in re.split(r"[\s,]+", text.strip()):
        match = _ENTRY.fullmatch(entry.rstrip("/"))
        if entry == ALL:
            schemes.update(SCHEMES)
        elif entry == CLOUD_METADATA:
            has_metadata = True
        elif match is not None and match[2] is None:
            schemes.add(match[1])
        elif match is not None and _HOST.fullmatch(match[2]):
            hosts.add((match[1], match[2].lower() if match[1] in HOST_SCHEMES else match[2]))
        elif entry != NONE:
            raise ValueError(
                f"{entry!r} allows nothing: write {ALL}, {NONE}, {CLOUD_METADATA}, a scheme"
                f" ({', '.join(SCHEMES)}), or a scheme with one host, organisation or bucket, as oci://ghcr.io."
            )
    return AllowList(frozenset(schemes), frozenset(hosts), has_metadata)


def split_host(host: str) -> tuple[str, int]:
    """Return the name and the port of `host` or `host:port`; an IPv6 address loses its brackets."""
    name, colon, port = host.rpartition(":")
    if colon and port.isdecimal() and (name.startswith("[") or ":" not in name):
        return name.strip("[]"), int(port)
    return host.strip("[]"), HTTPS_PORT


def join_host(host: str, port: int) -> str:
    return host if port == HTTPS_PORT else f"{host}:{port}"


def _matches(patterns: Iterable[str], host: str, port: int) -> bool:
    for name, pattern_port in map(split_host, patterns):
        is_same = host.lower() == name or (name.startswith("*.") and host.lower().endswith(name[1:]))
        if is_same and port == pattern_port:
            return True
    return False
