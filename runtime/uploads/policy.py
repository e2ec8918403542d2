"""Whether this server changes its repository, and how large a version it takes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.uploads.problems import RepositoryNotShared, RepositoryReadOnly

Writable = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class UploadPolicy:
    """What this server takes.

    Attributes:
        writable: whether it changes the repository; `auto` does if the folder belongs to the server's user.
        is_immutable: whether nobody may ever change a file there (`--store-size=off`).
        is_of_node: whether other nodes load from it, too: then only `on` says that it is one for all.
        max_bytes: of one version.
    """

    writable: Writable = "auto"
    is_immutable: bool = False
    is_of_node: bool = False
    max_bytes: int = 2**63


def check_writable(root: Path, policy: UploadPolicy) -> None:
    """Refuse changes of a repository that this server only reads.

    Raises:
        RepositoryReadOnly: `repository_read_only`, with what to do.
        RepositoryNotShared: `repository_not_shared`, likewise.
    """
    advice = "put versions into its folder yourself"
    if policy.writable == "off":
        raise RepositoryReadOnly(
            f"this server does not change its repository (--repository-writable): {advice}"
        )
    if policy.is_immutable:
        raise RepositoryReadOnly(
            f"nobody may change a file of this repository (--store-size=off): {advice}, under a new number"
        )
    if policy.is_of_node and policy.writable == "auto":
        raise RepositoryNotShared(
            "a version has to be there for all nodes: if the repository is one folder that all of them share,"
            " start them with --repository-writable=on; else put the version into the folder of each"
        )
    try:
        seen = root.stat()
    except OSError as error:
        raise RepositoryReadOnly(f"the repository's folder cannot be used: {error.strerror}") from None
    is_writable = os.access(root, os.W_OK | os.X_OK)
    if not is_writable or (policy.writable == "auto" and seen.st_uid != os.geteuid()):
        whose = "belongs to another user" if is_writable else "cannot be written by the server's user"
        raise RepositoryReadOnly(
            f"the repository's folder {whose}: {advice}, or give it to the server's user"
            + (", or start the server with --repository-writable=on" if is_writable else "")
        )
