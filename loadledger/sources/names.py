"""Names of sources. Pure.

https://host/path/model.onnx           one file
hf://org/repo@revision[/file.onnx]     a repository of Hugging Face; without a revision, `main`
oci://registry/repository:tag          an artifact of an OCI registry, or `@sha256:...`
s3://bucket/path  gs://...  az://...   an object, or with a slash at the end the objects beneath it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from loadledger.errors import SourceProblem

SCHEMES = ("https", "hf", "oci", "s3", "gs", "az")
HOST_SCHEMES = ("https", "oci")
"""Schemes with a host in their names; the others have an organisation or a bucket there."""
MAX_CHARACTERS = 2048
"""Length of a name: more than any object store or proxy accepts."""
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class SourceName:
    """The parts of a source's name: host with port, organisation or bucket, and raw path."""

    name: str
    scheme: str
    host: str
    path: str


def parse_source(name: str) -> SourceName:
    """Return the source that a text names.

    Raises:
        SourceProblem: `invalid_source`, with a correct form.
    """
    shown = f"{name[:200]!a} is no source"
    if len(name) > MAX_CHARACTERS or not name.isascii() or not name.isprintable() or " " in name:
        raise invalid(f"{shown}: it takes up to {MAX_CHARACTERS} ASCII characters, no space")
    try:
        scheme, host, path, _, _ = urlsplit(name)
    except ValueError:
        raise invalid(f"{shown}: its host has brackets without an IPv6 address") from None
    if scheme not in SCHEMES:
        raise invalid(f"{shown}: begin it with {', '.join(f'{each}://' for each in SCHEMES)}")
    if "?" in name or "#" in name or "@" in host:
        raise invalid(
            "a source has no user, no password, no query and no fragment: the ledger keeps its name, and"
            " would keep a secret in it; credentials come from variables and files of yours"
        )
    path = path.removeprefix("/")
    if not _HOST.fullmatch(host) or not path:
        raise invalid(f"{shown}: it takes a host and a path, as {scheme}://host/path")
    if ".." in unquote(path).split("/") or "\\" in unquote(path):
        raise invalid(f"{shown}: its path leads upwards")
    return SourceName(name, scheme, host.lower() if scheme in HOST_SCHEMES else host, path)


def parse_digest(digest: str | None) -> str | None:
    """Return the hexadecimal digits of `sha256:...`.

    Raises:
        SourceProblem: `invalid_source`.
    """
    match = _DIGEST.fullmatch(digest or "")
    if digest is not None and match is None:
        raise invalid(f"{digest[:100]!a} is no digest: it takes sha256: and 64 hexadecimal digits")
    return match[1] if match else None


def invalid(message: str) -> SourceProblem:
    return SourceProblem("invalid_source", message)
