"""Values that facts of several subjects have. Like facts, they are hashed for ever."""

from __future__ import annotations

from msgspec import Struct

from events.clock import Timestamp


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
            made), `call_drivers` (of hardware), `manage_server` (over its control socket).
    """

    mode: str
    landlock_abi: int
    seccomp: bool
    not_prevented: tuple[str, ...]


class PlannedMemory(Struct, frozen=True, gc=False):
    """The parts of a server's memory, from its start.

    Attributes:
        limit_bytes: of its container or machine.
        budget_bytes: for models, by which loads are admitted.
        growth_bytes: for what models take beside the budget after their loads.
        bodies_bytes: for bodies of requests and answers.
        shared_bytes: for tensors that the server and workers share.
        server_bytes: for the server's own processes.
        excess_bytes: how much more than the limit that is together; None if it fits.
        kills_together: whether the kernel kills all processes of the container when one passes the limit.
    """

    limit_bytes: int
    budget_bytes: int
    growth_bytes: int
    bodies_bytes: int
    shared_bytes: int
    server_bytes: int
    excess_bytes: int | None
    kills_together: bool


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


class ProcessEnd(Struct, frozen=True, gc=False):
    """What the start or end of a server says of the processes that it ends.

    Attributes:
        servers: whose processes end, a server alone being None; None if all do.
        since: since when no server was there; jobs are not charged for the time.
        is_death: whether they died.
    """

    servers: tuple[str | None, ...] | None = None
    since: Timestamp | None = None
    is_death: bool = False

    def is_at(self, server: str | None) -> bool:
        return self.servers is None or server in self.servers
