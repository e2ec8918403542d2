"""`loadledger migrate` and `discard`, and `--ledger` of `verify` and `archive`: a ledger in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loadledger.cli.output import exit_with_error, print_result, report_problems
from loadledger.cli.server import json_option

INSTALL = "pip install 'loadledger[postgres]'"


def require_driver() -> None:
    """Exit with an error unless the driver is installed."""
    from importlib.util import find_spec  # noqa: PLC0415 - keeps `loadledger --help` quick

    if find_spec("asyncpg") is None:
        exit_with_error(f"asyncpg is not installed: {INSTALL}")


_ledger_option = click.option(
    "--ledger",
    "address",
    metavar="URL",
    envvar="LOADLEDGER_LEDGER",
    required=True,
    help="Database, as the role that owns the ledger: postgresql://OWNER@HOST/DATABASE. [LOADLEDGER_LEDGER]",
)


@click.command()
@_ledger_option
@click.option(
    "--server-role",
    metavar="ROLE",
    help="Role of the servers: may read, and append through a function, nothing else.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Data directory whose ledger is copied into the database; it is the server's replica from then on.",
)
@json_option
def migrate(address: str, server_role: str | None, data: Path | None, *, as_json: bool) -> None:
    """Create or update the schema of a ledger in PostgreSQL.

    Run it as the role that owns the ledger, never with a server's credentials: with its first run, with each
    release that changes the schema, and to let a role in. With --data, the ledger of a stopped server is
    verified, copied into the empty database with its positions and hashes, and verified there.
    """
    require_driver()
    import asyncio  # noqa: PLC0415 - as above

    from loadledger.cli.local.localdatabase import migrate_database  # noqa: PLC0415 - needs the driver

    with report_problems():
        done = asyncio.run(migrate_database(address, server_role, data))
    lines = [f"schema: {done['migrations']} migrations applied"]
    if server_role is not None:
        lines.append(f"role {server_role}: may read and append")
    if data is not None:
        lines.append(f"copied and verified: {done['events']} events, head {done['position']}:{done['hash']}")
    print_result(done, lines, as_json=as_json)


@click.command()
@_ledger_option
@json_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def discard(address: str, file: Path, *, as_json: bool) -> None:
    """Remove the end of a ledger in PostgreSQL that no node can read.

    For nodes that say that an event cannot be folded, because somebody with their role appended it. Run it as
    the role that owns the ledger, with the latest release that any node has, when that role has another
    password. All events from that one on, which no node has, go to FILE, and `EventsDiscarded` takes their
    place.
    """
    require_driver()
    from loadledger.cli.local.localdatabase import discard_unreadable  # noqa: PLC0415 - as above

    with report_problems():
        done = discard_unreadable(address, file)
    members = {"first_position": done.first_position, "last_position": done.last_position, "hash": done.hash}
    line = f"discarded: positions {done.first_position} to {done.last_position}, kept in {file}"
    print_result(members, [line], as_json=as_json)


def verify_database(address: str, expected: Any, archives: Sequence[Path], key: str | None) -> Any:
    """Verify the ledger of a database; `expected` is an expected head or None, `key` a key id or None."""
    require_driver()
    import asyncio  # noqa: PLC0415 - as above

    from loadledger.cli.local.localdatabase import verify_address  # noqa: PLC0415 - as above

    return asyncio.run(verify_address(address, expected, archives, key))


def archive_in_database(address: str, *arguments: Any) -> Any:
    """Archive the ledger of a database, with the other arguments of `archive_database`."""
    require_driver()
    from loadledger.cli.local.localdatabase import archive_database  # noqa: PLC0415 - as above

    return archive_database(address, *arguments)
