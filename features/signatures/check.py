"""Whether a version's files have the signature that its model's rules require. Pure."""

from __future__ import annotations

import hashlib
from functools import cache

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from events.jobs import Job
from features.beforeload import CheckedLoad, CheckInput, NotLoadable
from features.signatures.bundles import MAX_BYTES
from features.signatures.facts import LoadSignature
from features.signatures.rules import TrustMode
from features.signatures.verification import SignatureRefused, check_signature, find_bundle


def check(given: CheckInput, _: Job | None, passed: CheckedLoad) -> CheckedLoad:
    """Check the signature, if there are rules; see `features.beforeload.Check`."""
    if not given.rules.trust:
        return passed
    signature, bundle = check_signatures(given)
    return passed.add(signature=signature, bundle=bundle)


def check_signatures(given: CheckInput) -> tuple[LoadSignature, str | UnsetType]:
    """Return the signature under all rules, and the bundle unless the ledger has it.

    Raises:
        NotLoadable: a code that begins with `signature_`.
    """
    rules, read = given.rules, cache(given.read)
    distrusted = tuple({key for rule in rules.trust for key in rule.distrusted})
    before = None if given.admitted is None else given.admitted.evidence.signature or None
    found, problem, is_enforced, was_verified = None, None, False, False
    path = ""
    for rule in rules.trust:
        try:
            path = find_bundle(given.contents)
            by_all = replace(rule, distrusted=distrusted)  # distrusted by one rule: by all
            found = check_signature(read(path, MAX_BYTES + 1), path, given.contents, by_all, given.now)
            is_enforced = is_enforced or rule.mode is TrustMode.ENFORCE
        except SignatureRefused as refused:
            if rule.mode is TrustMode.WARN:
                problem = problem or refused.code
            elif (
                given.is_reload
                and before is not None
                and before.is_enforced
                and not (refused.is_distrusted or before.signer in distrusted)
            ):  # for example, after a change of keys
                was_verified = True
            else:
                raise NotLoadable(refused.code, str(refused)) from None
    if found is None and before is not None and was_verified:
        return replace(before, policy=rules.digest, problem=problem, was_verified=True), UNSET
    if found is None:
        return LoadSignature(rules.digest, problem=problem), UNSET
    content = read(path, MAX_BYTES + 1)
    bundle = hashlib.sha256(content).hexdigest()
    signature = LoadSignature(
        rules.digest, found.method, found.signer, bundle, is_enforced or was_verified, problem, was_verified
    )
    is_known = bundle in (given.model.known_evidence or ())
    return signature, UNSET if is_known else content.decode()
