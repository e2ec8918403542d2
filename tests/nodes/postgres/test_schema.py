"""What a ledger's database says of itself."""

import pytest
from support.postgres import Database

from nodes.postgres.connection import close, connect
from nodes.postgres.schema import count_standbys, describe_durability


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("", 0),
        ("standby", 1),
        ("a, b", 1),
        ("*", 1),
        ("2 (a, b, c)", 2),
        ("FIRST 2 (a, b, c)", 2),
        ("any 3(*)", 3),
    ],
)
def test_standbys_that_a_commit_waits_for_are_counted(names: str, count: int) -> None:
    assert count_standbys(names) == count


async def test_durability_is_said_in_words(database: Database) -> None:
    connection = await connect(database.server_url)
    assert await describe_durability(connection) == (
        "commits wait for no disk: fsync is off, so a crash of the database's machine loses some"
    )
    await close(connection)
