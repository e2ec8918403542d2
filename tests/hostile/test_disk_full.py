"""A disk that is full again and again, of the ledger and the private copies of models."""

import asyncio
from dataclasses import replace
from pathlib import Path

from support.campaign import attacked
from support.disks import SmallDisk, small_disk
from support.fleet import Fleet, new_dice, of_both
from support.servers import MODULE, clean_environment
from support.traffic import traffic

from server.config import Config

DISK_BYTES = 96 * 2**20
"""Room for the models here, and for what traffic adds to the ledger."""
ROUNDS = of_both(short=2, long=40)
FREE_BYTES = (0, 0, 4096, 65536, 2**20, 6 * 2**20)
"""Free space on the disk: too little for an event, for a group of events, or for a model."""
FULL_S = 0.7
ERRORS = ("the ledger cannot be written",)


async def test_full_disk_refuses_loads_and_fails_no_inference(config: Config, tmp_path: Path) -> None:
    dice, fleet = new_dice(), Fleet(config.repository, 3)
    with small_disk(tmp_path / "data", DISK_BYTES) as disk:
        config = replace(config, data=disk.folder)
        await _check_start(config, disk)
        command = (*disk.prefix, *MODULE)
        async with (
            attacked(config, command=command, expected_errors=ERRORS, see_data=disk.copy_ledger) as attack,
            traffic(attack, fleet, dice),
        ):
            for _ in range(ROUNDS):
                disk.fill(dice.choice(FREE_BYTES))
                await asyncio.sleep(dice.uniform(0, FULL_S))  # a random moment
                disk.drain()
                await attack.work_again()
                attack.counts["disk full"] += 1


async def _check_start(config: Config, disk: SmallDisk) -> None:
    """Check that a server which has no room for its keys says so, and leaves none half-written."""
    disk.fill()
    process = await asyncio.create_subprocess_exec(
        *(*disk.prefix, *MODULE, "serve", "--port=0"),
        *(f"--repository={config.repository}", f"--data={config.data}"),
        env=clean_environment(),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    disk.drain()
    assert process.returncode == 2
    assert b"No space left on device" in stderr
    assert list((config.data / "keys").iterdir()) == []
