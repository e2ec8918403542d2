"""How a client speaks to its server: limits that both transports keep."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from loadledger.address import Address
from loadledger.problems import BadAnswer

CONNECT_S = 10.0
SILENCE_S = 45.0
"""After so long without a sign of life, of which a stream has one every 15 s, it is taken for dead."""
CHUNK_BYTES = 2**16
MAX_ANSWER_BYTES = 64 * 2**20
"""Of one answer, which is held in memory: a page of a list has some megabytes at most."""
MAX_IDLE = 8
"""Connections that are kept for the next request: as many threads need no new one."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a client was made with.

    Attributes:
        timeout_s: for an answer that is not asked to wait.
        ca_file: certificates to trust, in PEM, instead of the system's.
        max_answer_bytes: what is longer is not taken.
    """

    address: Address
    timeout_s: float
    ca_file: Path | str | None = None
    max_answer_bytes: int = MAX_ANSWER_BYTES

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError("timeout_s is more than 0")

    @property
    def connect_s(self) -> float:
        """For a connection to be made."""
        return min(CONNECT_S, self.timeout_s)

    def tls(self) -> ssl.SSLContext:
        """Return what says whom to trust.

        Raises:
            ValueError: the file has no certificates.
        """
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise ValueError(f"ca_file {self.ca_file} has no certificates in PEM: {error}") from error

    def check(self, length: int) -> None:
        """Refuse an answer that is too long.

        Raises:
            BadAnswer: it is.
        """
        if length > self.max_answer_bytes:
            raise BadAnswer(
                f"{self.address.url} answers more than {self.max_answer_bytes} bytes;"
                " a larger max_answer_bytes would take it"
            )
