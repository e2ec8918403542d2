"""`loadledger prepared list | clear`: the optimised models of a data directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from loadledger.cli.options import data_option, json_option, require_data
from loadledger.cli.output import (
    count_of,
    format_size,
    format_table,
    format_timestamp,
    print_result,
    report_problems,
    to_printable,
)

SHOWN_DIGITS = 12
"""Shown digits of a hash: enough to tell files apart; --json has all."""
HEAD = ("model", "version", "size", "took", "made", "last used", "sha256")


@click.group()
def prepared() -> None:
    """List or clear the prepared models.

    The server may be running.
    """


@prepared.command("list")
@data_option
@json_option
def list_prepared(data: Path, *, as_json: bool) -> None:
    """List the prepared models, last used first.

    `bare` marks a model that loads from its own files; the reason follows.
    """
    with report_problems():
        entries = [_members(entry) for entry in _store(data).entries()]
    members = {"bytes": sum(entry["bytes"] for entry in entries), "prepared": entries}
    print_result(members, _table(entries), as_json=as_json)


@prepared.command()
@data_option
@click.option("--model", "model_id", metavar="ID", help="Only entries of this model.")
@json_option
def clear(data: Path, model_id: str | None, *, as_json: bool) -> None:
    """Remove prepared models; loaded ones are not affected.

    Models are prepared again after their next load. --json prints the removed `entries` and `bytes`.
    """
    with report_problems():
        entries, size = _store(data).clear(model_id)
    text = f"cleared: {count_of(entries, 'entry')}, {size} bytes"
    print_result({"entries": entries, "bytes": size}, [text], as_json=as_json)


def _store(data: Path) -> Any:
    from runtime.optimised.store import OptimisedStore
    from runtime.store.folder import STORE

    require_data(data)
    return OptimisedStore(data / STORE, limit_bytes=0)  # the limit applies to what is added


def _members(entry: Any) -> dict[str, Any]:
    return {
        "model_id": entry.model_id,
        "version": entry.version,
        "sha256": entry.sha256,
        "bytes": entry.bytes,
        "made_at": entry.made_at,
        "last_used_at": entry.used_at,
        "took_ms": entry.took_ms,
        "figures": dict(entry.figures),
        "reason": entry.reason,
        "key": entry.key,
    }


def _table(entries: list[dict[str, Any]]) -> Iterator[str]:
    if not entries:
        yield "nothing is prepared"
        return
    head, *lines = format_table(HEAD, [_row(entry) for entry in entries])
    yield head
    for entry, line in zip(entries, lines, strict=True):
        yield line
        if entry["reason"] is not None:
            yield f"  {to_printable(entry['reason'])}"
    yield f"{count_of(len(entries), 'entry')}, {format_size(sum(entry['bytes'] for entry in entries))}"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["model_id"],
        str(entry["version"]),
        format_size(entry["bytes"]) if entry["reason"] is None else "bare",
        f"{entry['took_ms'] / 1000:.1f} s",
        format_timestamp(entry["made_at"]),
        format_timestamp(entry["last_used_at"]),
        (entry["sha256"] or "")[:SHOWN_DIGITS],
    )
