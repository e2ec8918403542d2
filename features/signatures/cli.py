"""`loadledger verify-model`: check a version as a load would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from loadledger.cli import options, output


@click.command("verify-model")
@options.model_argument()
@options.json_option
@options.server_options
def verify_model(model: str, *, version: int | None, as_json: bool, where: options.ServerChoice) -> None:
    """Hash a version and check it by the policy; nothing is loaded.

    It says what the policy would do to a load of it now. VERSION is by default the highest. Your token needs
    one of the roles admin, audit and approve.

    Exit code: 0 if the policy lets it load, 1 if not, 2 if it cannot be checked.
    """
    with options.open_chosen_client(where) as client:
        found = client.verify_model(model, version)
    output.print_result(found, _verified_lines(found), as_json=as_json)
    sys.exit(0 if found.problem is None else output.NEGATIVE_RESULT)


def _verified_lines(found: Any) -> Iterator[str]:
    yield f"{output.to_printable(found.model_id)} version {found.version}:"
    yield from output.format_facts(verified_facts(found))
    for file in found.files:
        yield f"  {output.format_cell(file.path)}: sha256 {output.format_cell(file.sha256)}"


def verified_facts(found: Any) -> dict[str, object]:
    """Return the checks that a load of a version would pass, as facts."""
    return {
        "digest": found.digest,
        "added by": name_adders(found),
        "signature": found.signature and describe_signature(found.signature),
        "problem": found.problem and f"{found.problem.code}: {found.problem.message}",
    }


def name_adders(shown: Any) -> str:
    return ", ".join(shown.added_by) if shown.added_by else "nobody that the ledger has"


def describe_signature(signature: Any) -> str:
    """Return the result of checking a signature."""
    problem = f" ({signature.problem})" if signature.problem else ""
    if signature.method is None:
        return f"not verified{problem}"
    mode = "" if signature.is_enforced else ", not enforced"
    before = "; today's rules refuse it, and it was verified before" if signature.was_verified else ""
    return f"verified, by {signature.method} {signature.signer}{mode}{problem}{before}"
