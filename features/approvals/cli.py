"""`loadledger approve`: give the approval of a version's bytes, and withdraw it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from features.signatures.cli import describe_signature, name_adders, verified_facts
from loadledger.cli import options, output


@click.command()
@options.model_argument(needs_version=True)
@click.option("--reason", metavar="TEXT", help="Why, for the ledger; asked for if it is not given.")
@click.option("--withdraw", is_flag=True, help="Withdraw the approval of all persons instead.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@options.json_option
@options.server_options
def approve(
    model: str,
    *,
    version: int,
    reason: str | None,
    withdraw: bool,
    yes: bool,
    as_json: bool,
    where: options.ServerChoice,
) -> None:
    """Show a version, and approve its bytes for all loads.

    The server hashes them. You see which differ from those that the model serves, their signature, and who
    added them. The approval holds for exactly these bytes. Your token needs the role approve, and it must not
    be you who added them.

    What is loaded serves on when its approval is withdrawn; the next load of it is refused.
    """
    if not sys.stdin.isatty() and (reason is None or not yes):
        raise click.UsageError("there is no terminal to ask at: give --reason TEXT and --yes")
    verb = "Withdraw its approval?" if withdraw else "Approve it?"
    with options.open_chosen_client(where) as client:
        found = None if withdraw else client.verify_model(model, version)
        if found is not None:
            click.echo("\n".join(_describe(found, client.model(model))), err=as_json)
        if not yes:
            click.confirm(verb, abort=True, err=True)
        given = click.prompt("Reason", err=True) if reason is None else reason
        if found is None:
            answer = client.withdraw_approval(model, version, given)
        else:
            answer = client.approve(model, version, found.digest, given)
    output.print_result(answer, [_describe_answer(answer, withdraw=withdraw)], as_json=as_json)


def _describe(found: Any, model: Any) -> Iterator[str]:
    """Yield the facts for a person's decision on an approval."""
    now = f"serves version {model.version} now" if model.files else "serves nothing now"
    name = f"{output.to_printable(found.model_id)} version {found.version}"
    yield f"{name}: the model {now}"
    yield from output.format_facts(verified_facts(found))
    new, old = ({file.path: file.sha256 for file in each} for each in (found.files, model.files))
    for path in sorted({path for path, _ in new.items() ^ old.items()}):
        change = "added" if path not in old else "changed" if path in new else "removed"
        yield f"  {change}: {output.format_cell(path, most=output.MAX_FACT_CHARACTERS)}"
    if new == old:
        yield "  no file differs from those that it serves"


def _describe_answer(answer: Any, *, withdraw: bool) -> str:
    name = f"{output.to_printable(answer.model_id)} version {answer.version}"
    if withdraw:
        return f"{name}: approval withdrawn"
    left = answer.missing
    return f"{name}: approved" + (f"; {output.count_of(left, 'approval')} left" if left else "")


def model_facts(model: Any) -> dict[str, object]:
    """Return a model's rules, its serving version's checks, and approved and waiting versions, as facts."""
    rules, passed = model.policy, model.approval
    given = [f"version {each.version} by {each.by} ({each.reason})" for each in model.approvals]
    wanted = [f"version {each.version}{', refused' if each.is_refused else ''}" for each in model.unapproved]
    return {
        "policy": rules
        and f"signature {rules.trust or 'off'}, {output.count_of(rules.approvals, 'approval')}",
        "signature": model.signature and describe_signature(model.signature),
        "added by": name_adders(model) if model.files else None,
        "approval": passed and output.with_names(passed.result, passed.by),
        "approved": ", ".join(given) or None,
        "unapproved": ", ".join(wanted) or None,
    }
