"""Somebody who can write the ledger's folder, and cannot read the ledger's key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.servers import events, refused_start, serving

from events.audit.backup import back_up
from events.audit.kepthead import KEPT_HEAD
from events.audit.signing import HeadSigner, as_signed_head
from events.sqlite.datalock import LEDGER
from events.types import RollbackAccepted
from server.auth.keys import LEDGER_KEY, ensure_data_dir
from server.config import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "repository").mkdir()
    return Config(repository=tmp_path / "repository", data=tmp_path / "data")


async def serve_once(config: Config, *arguments: str) -> None:
    async with serving(config, *arguments) as server:
        assert await server.stop() == 0


def forge(data: Path) -> None:
    kept = as_signed_head(json.loads((data / KEPT_HEAD).read_text()))
    forged = HeadSigner(Ed25519PrivateKey.generate())(kept.statement)
    (data / KEPT_HEAD).write_text(json.dumps(forged.members()))


def remove(data: Path) -> None:
    (data / KEPT_HEAD).unlink()


@pytest.mark.parametrize(("change", "words"), [(forge, "signed by another key"), (remove, "is missing")])
async def test_ledger_without_its_own_head_is_served_once_accepted(
    config: Config, change: Callable[[Path], None], words: str
) -> None:
    await serve_once(config)
    change(config.data)
    assert words in await refused_start(config)
    await serve_once(config, "--accept-rollback")
    assert [event.type for event in await events(config)].count(RollbackAccepted.TYPE) == 1
    await serve_once(config)


async def test_server_killed_before_its_first_event_starts(config: Config) -> None:
    ensure_data_dir(config.data)
    kept = as_signed_head(json.loads((config.data / KEPT_HEAD).read_text()))
    assert (kept.statement.position, kept.holds()) == (0, True)
    await serve_once(config)


async def test_lost_key_is_no_rollback(config: Config) -> None:
    await serve_once(config)
    (config.data / LEDGER_KEY).unlink()
    await serve_once(config)
    assert RollbackAccepted.TYPE not in [event.type for event in await events(config)]


async def test_copy_with_the_keys_of_before_is_served(config: Config, tmp_path: Path) -> None:
    """The head that was kept beside the keys is older than the copy, which contains it."""
    await serve_once(config)
    restored = Config(repository=config.repository, data=tmp_path / "restored")
    shutil.copytree(config.data, restored.data)
    await serve_once(config)
    back_up(config.data / LEDGER, restored.data / LEDGER)
    await serve_once(restored)
