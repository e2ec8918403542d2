"""The answer of `runtime.rows.walk` on the rows of a batch, as messages and events have it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Verdict = Literal["independent", "unknown", "dependent"]
"""Whether a row's answer is the same whatever the other rows of its batch are."""
MAX_REASON_CHARACTERS = 1000
"""A sentence with names of the model's file, which may be long; it goes into an event and into notices."""


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A verdict on the rows of a batch of a model.

    Attributes:
        verdict: the verdict.
        reason: part of a sentence that names the operator, the output and the axis; empty if independent.
    """

    verdict: Verdict
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARACTERS)] = ""
