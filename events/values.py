"""Values that facts of several subjects have. Like facts, they are hashed for ever."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct


class FileHash(Struct, frozen=True, gc=False):
    """A file of a version and its SHA-256 in hexadecimal; `path` is relative to the version's folder."""

    path: str
    sha256: str


class Confinement(Struct, frozen=True, gc=False):
    """Confinement of the workers, as a throw-away worker found it at the start of the server.

    Attributes:
        mode: `auto`, `require`, `require-cpu` or `off`, as set.
        landlock_abi: the version of Landlock that restricts files; 0 if nothing does.
        seccomp: whether a filter restricts system calls.
        not_prevented: the forbidden things that a worker could do: `read_files`, `write_files`,
            `use_network`, `start_processes`, `read_memory` (of the fork server), `run_code` (that it has
            made), `call_drivers` (of devices), `manage_server` (over its control socket).
    """

    mode: str
    landlock_abi: int
    seccomp: bool
    not_prevented: tuple[str, ...]


class Credential(Struct, frozen=True, gc=False):
    """The token with which a person asked or answered; empty of a local user, who needs none.

    Attributes:
        issuer: its `iss`; None if it has none.
        jti: its id; None if it has none.
        issued_by: who issued it, who issued the token that did so, and so on, as far as the ledger knows.
    """

    issuer: str | None = None
    jti: str | None = None
    issued_by: tuple[str, ...] = ()


class NodeSignature(Struct, frozen=True, gc=False):
    """The signature of a fact by the key of a node, which its join names.

    Attributes:
        node_id: the node.
        signature: of the fact's statement (`events.approvals`), in base64.
    """

    node_id: str
    signature: str


Sign = Callable[[bytes], NodeSignature]
"""Signs a statement with the key of this node."""
