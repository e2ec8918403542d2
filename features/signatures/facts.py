"""The facts of signatures."""

from __future__ import annotations

from msgspec import Struct

STORED_NAMES = {"known_evidence": "bundles"}
"""The name in JSON of a model's evidence that the ledger has already."""


class LoadSignature(Struct, frozen=True, gc=False):
    """The signature of a version's files, as it was checked before its load.

    Attributes:
        policy: digest of the model's rules (`features.rules.ModelRules`).
        method: `key` or `certificate`; None if none was accepted, like the next two.
        signer: SHA-256 of the key's PEM in hexadecimal, or the certificate's subject.
        bundle: SHA-256 of the bundle in hexadecimal.
        is_enforced: whether a rule with the mode `enforce` accepted it.
        problem: code of what the mode `warn` let pass; None without one.
        was_verified: whether today's rules refuse the signature, and a reload goes on, since the same bytes
            were verified for this model before.
    """

    policy: str
    method: str | None = None
    signer: str | None = None
    bundle: str | None = None
    is_enforced: bool = False
    problem: str | None = None
    was_verified: bool = False


MAX_BUNDLES = 16
"""Bundles of a model that are remembered: more than one goes back to. Older ones are recorded once more."""


def remember_bundle(known: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the names of a model's bundles with the one of its latest load."""
    return (*(each for each in known if each != name), name)[-MAX_BUNDLES:]
