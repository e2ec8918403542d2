"""Approval of loads: who may answer, the answer as a command, and what nodes sign. Pure.

A load that needs approval waits for it without holding anything (`events.jobs.ApprovalState`). An answer
names the digest of the files, so that it holds for the bytes that the person has seen. Two subjects are one
person if they differ only in case or in forms of the same letters, whatever the issuers of their tokens.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from events.commands import Accepted, Decision, DecisionInput, Existing, Refused, RegisterCommand
from events.jobs import ApprovalAnswer, ApprovalState, Job
from events.models import AdmittedBytes, Model
from events.state import State
from events.tokens import list_issuers
from events.types import (
    Credential,
    Draft,
    Justification,
    LoadApproved,
    LoadRejected,
    Sign,
    contents_of,
    digest_of,
)

MAX_WAITING = 64
"""Loads that wait for approval: more than anybody reads in a day."""

MAX_WAITING_OF_SUBJECT = 8
"""Of one subject, so that nobody takes all places."""


@dataclass(frozen=True, slots=True)
class AnswerApproval(RegisterCommand):
    """Approve or reject a load that waits for approval.

    Attributes:
        digest: of the files that the person has seen.
        credential: of the person; who issued its token is added.
        sign: signs for this node; None for a server alone.
    """

    job_id: str
    actor: str
    digest: str
    reason: str
    credential: Credential
    approves: bool
    sign: Sign | None = None

    def decide(self, at: DecisionInput) -> Decision:
        job = at.state.unended_job(self.job_id)
        asked = None if job is None else job.approval
        if job is not None and asked is not None and self.approves and self._is_repeated(asked):
            return Existing(job.id)
        if job is None or asked is None or not job.waits_for_approval:
            advice = "GET /api/v1/jobs/{id} shows how it is"
            return Refused("not_waiting", f"job {self.job_id} does not wait for approval: {advice}")
        if is_void(asked, at.state.models.get(job.model_id)):
            return Refused("not_waiting", f"job {job.id} would replace others than those when it was asked")
        if self.digest != asked.digest:
            what = f"job {job.id} waits for approval of {asked.digest}, not of {self.digest[:64]!r}"
            return Refused("digest_differs", f"{what}: look at its files again")
        if any(is_same_person(self.actor, each) for each in list_requesters(job)):
            what = f"{self.actor!r} asked for this load, and another person has to answer"
            return Refused("same_person", f"{what}; who asked can cancel it")
        issued_by = list_issuers(at.state.registers.tokens, self.credential.jti)
        credential = replace(self.credential, issued_by=issued_by)
        data: LoadApproved | LoadRejected = LoadRejected(asked.digest, self.reason, credential)
        if self.approves:
            data = LoadApproved(asked.digest, asked.rule, self.reason, credential)
            if self.sign is not None:
                said = ApprovalAnswer(self.actor, self.reason, credential.jti, credential.issuer)
                statement = answer_statement(job, asked.digest, asked.rule, said)
                data = replace(data, node_signature=self.sign(statement))
        draft = Draft(at.new_id(), data, self.actor, job.id, job.model_id, job.version)
        return Accepted((draft,), job.id)

    def _is_repeated(self, asked: ApprovalState) -> bool:
        return self.digest == asked.digest and any(is_same_person(self.actor, by) for by in asked.approved_by)


def is_void(asked: ApprovalState, model: Model | None) -> bool:
    """Whether a model serves other bytes than when approval was asked: the person has seen another change."""
    servings = () if model is None else model.servings
    digests = [digest_of(contents_of(each.files)) for each in servings]
    return bool(digests) and asked.served_digest not in digests


def is_same_person(subject: str, other: str) -> bool:
    return _fold_subject(subject) == _fold_subject(other)


def _fold_subject(subject: str) -> str:
    folded = unicodedata.normalize("NFKC", subject).casefold()
    return unicodedata.normalize("NFKC", folded).strip()  # folding may decompose a letter anew


def list_requesters(job: Job) -> tuple[str, ...]:
    """Return all who asked for a load: none of them may approve it."""
    return (job.requested_by, *(() if job.policy is UNSET else job.policy.joined_by))


def find_waiting_refusal(state: State, job: Job) -> str | None:
    """Return why a load cannot wait for approval as well; None if it can."""
    waiting = [each for each in state.unended() if each.waits_for_approval]
    own = [each for each in waiting if is_same_person(each.requested_by, job.requested_by)]
    if len(waiting) >= MAX_WAITING:
        return f"{MAX_WAITING} loads wait for approval: approve, reject or cancel some first"
    if len(own) >= MAX_WAITING_OF_SUBJECT:
        return f"{MAX_WAITING_OF_SUBJECT} loads of {job.requested_by!r} wait for approval: cancel some first"
    return None


def answer_statement(job: Job, digest: str, rule: str, answer: ApprovalAnswer) -> bytes:
    """Return the bytes that a node signs for an approval or a bypass: a JSON array of text, in UTF-8.

    The job's id is used once, so a signature in the log is good for nothing else.
    """
    what = "loadledger-approval-v1", job.id, job.model_id, job.version, digest, rule
    return msgspec.json.encode((*what, answer.by, answer.reason, answer.jti, answer.issuer))


def emergency_statement(
    job_id: str, model_id: str, version: int | None, actor: str, said: Justification
) -> bytes:
    """Return the bytes that a node signs for a request that must not wait, like `answer_statement`."""
    what = "loadledger-emergency-v1", job_id, model_id, version, actor
    return msgspec.json.encode((*what, said.emergency or "", said.digest or None))


def load_statement(model_id: str, admitted: AdmittedBytes) -> bytes:
    """Return the bytes that a node signs for a load under rules, like `answer_statement`."""
    what = "loadledger-load-v1", admitted.job_id, model_id, admitted.version, admitted.digest
    parts = (None if part is UNSET else part for part in (admitted.signature, admitted.approval))
    return msgspec.json.encode((*what, *parts))
