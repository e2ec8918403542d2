"""A disk with errors or full, a clock that jumps, and no more descriptors, processes or threads.

Traffic goes on all the time; a fault may refuse loads, and fails no inference of a loaded model.
"""

import asyncio
import errno
import os
import random
import resource
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from support.campaign import Attack, attacked
from support.disks import SmallDisk, small_disk
from support.fleet import Fleet, new_dice, of_both
from support.servers import MODULE, address, limited, refused_start
from support.shims import Shim, build_shim, environment_of
from support.traffic import traffic
from support.workers import LIMIT_S, until

from server.config import Config

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUNDS = of_both(short=2, long=40)
FAULT_S = 0.7
"""Limit of a fault; one of the disk lasts at least until a call has failed."""
ERRORS = ("the ledger cannot be written", "the ledger cannot be read")
FAILURES = 5
"""Refused credentials a second."""


@dataclass(frozen=True, slots=True)
class Faulty:
    """A server under attack whose disk and clock can be made to fail, where there is a C compiler."""

    attack: Attack
    fleet: Fleet
    shims: dict[str, Shim]

    def shim(self, name: str) -> Shim:
        """Return a shim; the test is skipped where there is none."""
        if name not in self.shims:
            pytest.skip("there is no C compiler")
        return self.shims[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def faulty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Faulty]:
    """The server of this module; its aftermath is checked when all faults are over."""
    folder = tmp_path_factory.mktemp("faulty")
    config = Config(repository=folder / "repository", data=folder / "data")
    here, shims = Path(__file__).parent, dict[str, Shim]()
    if shutil.which("cc") is not None:
        under = {"FAULTS_UNDER": str(config.data)}
        shims["disk"] = build_shim(here / "ioerrors.c", folder, "4I", "FAULTS", under)
        shims["clock"] = build_shim(here / "clock.c", folder, "l", "WRONG_BY")
    command = limited(limit_auth_failures=f"{FAILURES}/second")
    environment = environment_of(shims.values())
    fleet = Fleet(config.repository, 3)
    async with attacked(config, command=command, environment=environment, expected_errors=ERRORS) as attack:
        yield Faulty(attack, fleet, shims)


# I/O errors.

RATES = ((50, 200, 200), (1000, 1000, 1000), (0, 300, 0), (0, 0, 500), (200, 0, 0))
"""Of a thousand reads, writes and syncs, so many fail."""


async def test_io_errors_fail_no_inference(faulty: Faulty) -> None:
    disk, dice, attack = faulty.shim("disk"), new_dice(), faulty.attack
    async with traffic(attack, faulty.fleet, dice):
        for number in range(ROUNDS):
            disk.set(*RATES[number % len(RATES)], 0)  # and no call has failed yet
            await asyncio.sleep(dice.uniform(0, FAULT_S))  # a random moment
            await until(lambda: disk.numbers[-1] > 0)
            attack.counts["failed calls"] += disk.numbers[-1]
            disk.set(0, 0, 0)
            await attack.work_again()


# A full disk, of the ledger and the private copies of models.

DISK_BYTES = 96 * 2**20
"""Room for the models here, and for what traffic adds to the ledger."""
FREE_BYTES = (0, 0, 4096, 65536, 2**20, 6 * 2**20)
"""Free space on the disk: too little for an event, for a group of events, or for a model."""


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
                await asyncio.sleep(dice.uniform(0, FAULT_S))  # a random moment
                disk.drain()
                await attack.work_again()
                attack.counts["disk full"] += 1


async def _check_start(config: Config, disk: SmallDisk) -> None:
    """Check that a server which has no room for its keys says so, and leaves none half-written."""
    disk.fill()
    said = await refused_start(config, command=(*disk.prefix, *MODULE))
    disk.drain()
    assert "No space left on device" in said
    assert list((config.data / "keys").iterdir()) == []


# Jumps of the wall clock.

FORWARD_S = 3000
"""The tokens of the tests hold for an hour."""
BACK_S = (60, 86_400, 20 * 365 * 86_400)
BAD = {"Authorization": "Bearer none.of.ours"}


async def test_clock_jumps_fail_no_inference_and_move_no_limit(faulty: Faulty) -> None:
    clock, dice, attack = faulty.shim("clock"), new_dice(), faulty.attack
    async with traffic(attack, faulty.fleet, dice):
        for _ in range(ROUNDS):
            assert 429 in await asyncio.gather(*(_refused(attack) for _ in range(2 * FAILURES)))
            clock.set(_jump(dice))
            await asyncio.sleep(1)  # the limit's window
            assert await _refused(attack) == 401
            await attack.check_load()
            attack.counts["clock jumps"] += 1
        clock.set(0)


async def _refused(attack: Attack) -> int:
    return (await attack.server.api.get("/api/v1/jobs", roles=(), headers=BAD)).status


def _jump(dice: random.Random) -> int:
    """Return by how many seconds the clock is wrong next."""
    return dice.choice((dice.randint(0, FORWARD_S), -dice.randint(0, dice.choice(BACK_S))))


# No more descriptors, processes or threads.

CLIENTS = 20
"""Connections that are opened meanwhile."""
PIDS = Path("/sys/fs/cgroup/pids")
"""Where version 1 of the kernel's control groups counts processes and threads."""


async def test_lack_of_descriptors_fails_no_inference(faulty: Faulty) -> None:
    dice, attack = new_dice(), faulty.attack
    async with traffic(attack, faulty.fleet, dice, may_close=True):
        for number in range(ROUNDS):
            pid = (attack.server.pid, attack.fork_server)[number % 2]
            with no_more_descriptors(pid), ExitStack() as held:
                await _connect(attack, held)
                await asyncio.sleep(dice.uniform(0, FAULT_S))  # a random moment
            await attack.work_again()
            attack.counts["without descriptors"] += 1


async def test_lack_of_processes_fails_no_inference(faulty: Faulty) -> None:
    if not (os.geteuid() or os.access(PIDS / "cgroup.procs", os.W_OK)):
        pytest.skip("no control group can be made here, and a limit of processes does not bind root")
    dice, attack = new_dice(), faulty.attack
    async with traffic(attack, faulty.fleet, dice):
        for number in range(ROUNDS):
            with no_more_tasks((attack.server.pid, attack.fork_server)[number % 2]):
                await asyncio.sleep(dice.uniform(0, FAULT_S))  # a random moment
            await attack.work_again()
            attack.counts["without processes"] += 1


@contextmanager
def no_more_descriptors(pid: int) -> Iterator[None]:
    """Let a process open no descriptor beyond those that it has."""
    highest = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
    with _limit(pid, resource.RLIMIT_NOFILE, highest + 1):
        yield


@contextmanager
def _limit(pid: int, kind: int, number: int) -> Iterator[None]:
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (number, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


@contextmanager
def no_more_tasks(pid: int) -> Iterator[None]:
    """Let a process start no other process and no thread."""
    with _no_more_tasks_of_group(pid) if os.geteuid() == 0 else _limit(pid, resource.RLIMIT_NPROC, 1):
        yield


@contextmanager
def _no_more_tasks_of_group(pid: int) -> Iterator[None]:
    group = PIDS / f"loadledger-test-{pid}"
    home = PIDS / _group_of(pid)
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        _empty(group, home)


def _empty(group: Path, home: Path) -> None:
    """Move all processes out of a group, and remove it; one that has ended is there until it is reaped."""
    until_s = time.monotonic() + LIMIT_S
    while True:
        for each in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (home / "cgroup.procs").write_text(each)
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until_s:
                raise
            time.sleep(0.01)
        else:
            return


def _group_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (path,) = [line.rpartition(":")[2] for line in lines if line.split(":")[1] == "pids"]
    return path.lstrip("/")


async def _connect(attack: Attack, held: ExitStack) -> None:
    host, _, port = address(attack.server).rpartition(":")
    for _ in range(CLIENTS):
        client = held.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex((host, int(port)))
