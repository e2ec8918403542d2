"""The check of a ledger's database before a start; nothing is written to it."""

from __future__ import annotations

import asyncio

from events.errors import LedgerProblem, LogUnavailable
from events.storage import StorageError
from nodes.thisnode import INSTALL
from server.check import CheckFinding, CheckResult, Severity
from server.config import Config


def check_ledger(config: Config, result: CheckResult) -> None:
    """Check the database of a ledger, and add findings to the result; nothing is written to it."""
    if config.ledger is None:
        return
    try:
        result.add(asyncio.run(_examine_database(config.ledger)))
    except ImportError as error:
        text = f"{error.name} is not installed: {INSTALL}"
        result.add([CheckFinding("--ledger", "invalid_setting", text)])


async def _examine_database(address: str) -> list[CheckFinding]:
    from nodes.postgres.connection import close, connect, measure_clock, translated_errors  # noqa: PLC0415
    from nodes.postgres.schema import check_role, check_schema, describe_durability  # noqa: PLC0415

    try:
        connection = await connect(address)
        try:
            await check_schema(connection)
            await check_role(connection)
            durability = await describe_durability(connection)
            with translated_errors("cannot be read"):
                offset_s = (await measure_clock(connection)).total_seconds()
        finally:
            await close(connection)
    except StorageError as error:
        return [CheckFinding("--ledger", LogUnavailable.code, str(error))]
    except LedgerProblem as error:
        return [CheckFinding("--ledger", error.code, str(error))]
    side = "ahead of" if offset_s >= 0 else "behind"
    clock = f"the database's clock is {abs(offset_s):.3f} s {side} this machine's; the ledger has its time"
    return [
        CheckFinding("--ledger", "durability", durability, Severity.NOTE),
        CheckFinding("--ledger", "clock_offset", clock, Severity.NOTE),
    ]
