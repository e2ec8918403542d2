"""The confinement of workers: what taken over ones can do, the layers one by one, and the filter."""

import errno
import json
import os
import platform
import re
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.models import save
from support.patching import patch_runtime
from support.workers import LAYERS, answer, floats, fork_server_of, load, order_of, running_pool

from features.devices.wire import ProviderLibrary, TargetDevice
from runtime.errors import LoadRefused, WorkerDied
from runtime.process.confinement import ALL_ACTS
from runtime.process.pool import WorkerPool
from runtime.wire import ForbiddenAct, Layer, Load, Probe
from runtime.worker import landlock, seccomp
from runtime.worker.seccomp import Grants

MB = 10**6
NO_FILES = (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)
MARK = "FACTS "
PATCH = """

import json as _json
import takeover as _takeover


def {name}(order, *_):
    data = Path(order.folder, "model.onnx").read_bytes()
    facts = _json.JSONDecoder().raw_decode(data.decode("utf-8", "replace").partition("FACTS ")[2])[0]
    succeeded = _takeover.try_all({{**facts, "own": order.folder}})
    raise LoadRefused("invalid_model", "SUCCEEDED " + _json.dumps(succeeded))
"""
"""In place of the function that reads a model's bytes: try everything, and report what succeeded."""


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def prepared_world(pool: WorkerPool, folder: Path, port: int) -> Path:
    """Make a repository with a model that carries the facts, and a data directory; returns the repository."""
    root, data = folder / "models", folder / "data"
    others = save(models.add(), root, "others") / "model.onnx"
    (data / "keys").mkdir(parents=True)
    for name in ("ledger.key", "ledger.db", "control.key", "keys/key.pem"):
        (data / name).write_bytes(b"secret")
    sibling = await pool.start("sibling")
    facts = {
        "server": os.getpid(), "fork_server": fork_server_of(pool).pid, "sibling": sibling.pid,
        "data": str(data), "others": str(others), "port": port,
    }  # fmt: skip
    model = models.add()
    model.doc_string = MARK + json.dumps(facts)
    save(model, root, "m")
    return root


async def succeeded(pool: WorkerPool, order: Load) -> set[str]:
    """Return which attempts of a taken over worker succeeded."""
    worker = await pool.start("w")
    with pytest.raises((LoadRefused, WorkerDied)) as refused:
        await worker.load(order, lambda _: None)
    assert "SUCCEEDED" in str(refused.value), "\n".join(worker.stderr_tail())
    return set(json.loads(str(refused.value).partition("SUCCEEDED ")[2]))


ANYWHERE = {
    "read control key", "unix socket",
    "read ledger key", "write ledger", "create in data directory", "write own model",
    "create beside own model", "tcp connect", "tcp listen", "udp", "fork", "start a program", "signal server",
    "memory with code", "limits of server", "outlive the fork server", "memory beyond the limit",
    "memory file", "memory beyond the limit, of a page of the stack",
    "memory beyond the limit, to read only", "flags of a channel", "send a message",
}  # fmt: skip
"""What succeeds without confinement on every machine, so that no attempt fails for another reason."""


BEYOND: dict[str, set[str]] = {
    "": set(),
    "openvino": {*("memory made code", "memory beyond the limit, to read only", "raise limit of addresses")},
    "cuda": {
        *("memory made code", "memory beyond the limit, to read only", "raise limit of addresses"),
        *("memory beyond the limit, shared", "memory beyond the limit, as a stack"),
        *("memory beyond the limit, of a page of the stack", "list connections", "list mounts"),
        "memory with code",  # which is shared
        *(f"cores of {name}" for name in ("server", "fork_server", "sibling") if os.geteuid()),
    },
}
"""Attempts that may succeed in a worker on a device: the driver of CUDA needs more than a library. A worker
of root has no capabilities, and so no say over other processes of root."""


async def test_taken_over_worker_succeeds_at_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int, subtests: pytest.Subtests
) -> None:
    if LAYERS != ("landlock", "seccomp"):
        pytest.skip("this kernel has no Landlock; its files are then open to workers")
    patch_runtime(tmp_path, monkeypatch, {"loading": PATCH.format(name="_create_session")})
    async with running_pool() as pool:
        root = await prepared_world(pool, tmp_path, port)
        order = order_of(root, ceiling_bytes=500 * MB)
        order = replace(order, root=order.folder)  # as in the store
        assert await succeeded(pool, replace(order, layers=(), ceiling_bytes=None)) >= ANYWHERE
        for provider, beyond in BEYOND.items():
            library = ProviderLibrary(provider, str(tmp_path / "library" / "plugin.so"), "Plugin")
            target = TargetDevice(f"{provider}:0", library) if provider else None
            found = await succeeded(pool, replace(order, target=target))
            with subtests.test(provider):
                assert beyond & {"memory made code"} <= found <= beyond


MEMORY = {"read_memory"} if os.geteuid() else set()
"""A worker of root has given up the capabilities that the fork server has, and may not read its memory."""


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((), {*ALL_ACTS}),
        # TCP alone is restricted; processes inherit it
        (("landlock",), {"use_network", "start_processes", "run_code", "call_drivers"}),
        (("seccomp",), {"read_files", *MEMORY}),
        (("landlock", "seccomp"), set()),
    ],
)
async def test_probe_reports_what_layers_do_not_prevent(
    pool: WorkerPool, tmp_path: Path, layers: tuple[Layer, ...], expected: set[ForbiddenAct]
) -> None:
    if "landlock" in layers and not landlock.find_abi():
        pytest.skip("this kernel has no Landlock")
    worker = await pool.start("w")
    found = await worker.execute(Probe(str(tmp_path), layers))
    assert (set(found.succeeded), found.layers, found.problems) == (expected, layers, ())
    assert found.landlock_abi == (landlock.find_abi() if "landlock" in layers else 0)
    assert sum(1 for _ in os.scandir(tmp_path)) == 0


NO_LANDLOCK = """
def _call(*_):
    raise OSError(38, "Function not implemented")
"""


@pytest.mark.parametrize(
    ("abi", "layers", "expected"),
    [
        (0, ("seccomp",), {"read_files", *MEMORY}),  # a kernel without Landlock
        (1, LAYERS, set()),  # Linux 5.13, which knows no truncation: the filter has that
        (3, LAYERS, set()),  # Linux 6.2, which restricts no connections: the filter has those
    ],
)
async def test_older_kernels_confine_as_far_as_they_can(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    abi: int,
    layers: tuple[Layer, ...],
    expected: set[ForbiddenAct],
) -> None:
    if abi > landlock.find_abi():
        pytest.skip("this kernel has an older Landlock")
    code = f"find_abi = lambda: {abi}\n" if abi else NO_LANDLOCK
    patch_runtime(tmp_path, monkeypatch, {"landlock": code})
    save(models.add(), tmp_path, "m")
    async with running_pool() as pool:
        found = pool.applied.confinement
        assert (pool.applied.layers, found.landlock_abi) == (layers, abi)
        assert {*found.not_prevented} == expected
        worker, _ = await load(pool, order_of(tmp_path, layers=pool.applied.layers))
        assert await answer(worker, floats("x", 1)) == [2]


async def test_layer_that_cannot_be_applied_ends_the_worker(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    with pytest.raises(WorkerDied):  # the filter refuses the system calls of Landlock
        await load(pool, order_of(tmp_path, layers=("seccomp", "landlock")))
    worker, _ = await load(pool, order_of(tmp_path))
    assert await answer(worker, floats("x", 1)) == [2]
    assert [resource.prlimit(worker.pid, kind) for kind in NO_FILES] == 2 * [(0, 0)]
    capabilities = re.findall(r"^Cap(?:Inh|Prm|Eff):\t(\w+)$", status_of(worker.pid), re.MULTILINE)
    assert {int(each, 16) for each in capabilities} == {0}


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_numbers_of_system_calls_are_those_of_the_headers() -> None:
    folder = Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h")
    headers = [folder, Path("/usr/include/asm-generic/unistd.h")]
    if not all(path.exists() for path in headers):
        pytest.skip("the kernel's headers are not installed (linux-libc-dev)")
    for column, path in enumerate(headers):
        found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
        known = {name: int(number) for name, number in found}
        known.setdefault("newfstatat", known.get("fstatat", -1))
        known.setdefault("mseal", 462)  # headers before Linux 6.10
        for name, numbers in seccomp.NUMBERS.items():
            assert numbers[column] == known.get(name) or numbers[column] is None, name


def run(program: bytes, audit_number: int, number: int, *arguments: int) -> int:
    """Run a filter as the kernel does; returns its result."""
    arguments = (*arguments, *(6 - len(arguments)) * (0,))
    data = struct.pack("=IIQ6Q", number, audit_number, 0, *arguments)
    code = [seccomp.INSTRUCTION.unpack_from(program, at) for at in range(0, len(program), 8)]
    at = word = 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        match operation:
            case seccomp.LOAD_WORD:
                [word] = struct.unpack_from("=I", data, operand)
            case seccomp.AND:
                word &= operand
            case seccomp.JUMP_IF_EQUAL:
                at += if_true if word == operand else if_false
            case seccomp.RETURN:
                return int(operand)


ALLOWED, DENIED = seccomp.ALLOW, seccomp.ERRNO | errno.EPERM
PID = 77
READ, EXEC = 1, 4
CASES = [  # system call, arguments, result
    ("read", (), ALLOWED),
    ("openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOWED),
    ("openat", (0, 0, os.O_WRONLY | os.O_CREAT), DENIED),
    ("mmap", (0, 1, READ, 0x02), ALLOWED),  # a private file
    ("mmap", (0, 1, READ, 0x20022), ALLOWED),  # a stack of glibc
    ("mmap", (0, 1, READ | EXEC, 0x02), DENIED),
    ("mmap", (0, 1, READ, 0x21), DENIED),  # shared memory
    ("mmap", (0, 1, READ, 0x122), DENIED),  # MAP_GROWSDOWN
    ("mprotect", (0, 1, EXEC), DENIED),
    ("clone", (0x3D0F00,), ALLOWED),  # glibc's thread
    ("clone", (0x01200011,), DENIED),  # glibc's fork
    ("clone", (0x3D0F00 | 0x10000000,), DENIED),
    ("clone3", (), seccomp.ERRNO | errno.ENOSYS),
    ("sendto", (3, 0, 9, 0x40), ALLOWED),  # MSG_DONTWAIT
    ("sendto", (3, 0, 9, 1), DENIED),  # MSG_OOB
    ("sendto", (3, 0, 9, 0, 77, 16), DENIED),  # an address
    ("recvfrom", (3, 0, 9, 0, 77, 77), ALLOWED),
    ("recvfrom", (3, 0, 9, 2), DENIED),  # MSG_PEEK
    ("prlimit64", (0, 2), ALLOWED),
    ("prlimit64", (PID, 2), DENIED),
    ("fcntl", (3, 4), ALLOWED),
    ("fcntl", (3, 8), DENIED),  # F_SETOWN
    ("ioctl", (0, 0x5401), ALLOWED),
    ("ioctl", (0, 0x5412), DENIED),  # TIOCSTI
    ("prctl", (15,), ALLOWED),
    ("prctl", (1, 0), DENIED),
    ("kill", (PID, 9), ALLOWED),
    ("kill", (1, 0), DENIED),
    ("tgkill", (1, 1, 0), DENIED),
]
DEVICE_CASES = [  # system call, arguments, result for a library, for a driver
    ("mmap", (0, 1, READ | EXEC, 0x02), ALLOWED, ALLOWED),
    ("mprotect", (0, 1, EXEC), ALLOWED, ALLOWED),
    ("mmap", (0, 1, READ, 0x21), DENIED, ALLOWED),
    ("openat", (0, 0, os.O_RDWR), DENIED, ALLOWED),
    ("ioctl", (3, 0xC020462A), DENIED, ALLOWED),
    ("mremap", (), DENIED, ALLOWED),
    ("clone", (0x01200011,), DENIED, DENIED),
    ("kill", (1, 0), DENIED, DENIED),
]
GRANTED = {
    Grants.NOTHING: CASES,
    Grants.CODE: [(name, arguments, expected) for name, arguments, expected, _ in DEVICE_CASES],
    Grants.CODE | Grants.DRIVERS: [
        (name, arguments, expected) for name, arguments, _, expected in DEVICE_CASES
    ],
}


@pytest.mark.parametrize("machine", seccomp.MACHINES)
@pytest.mark.parametrize("grants", GRANTED)
def test_filter_allows_calls_by_number_and_arguments(machine: str, grants: Grants) -> None:
    found = seccomp.MACHINES[machine]
    other = next(each for name, each in seccomp.MACHINES.items() if name != machine)
    program = seccomp.build_filter(found, PID, grants)
    for name, arguments, expected in GRANTED[grants]:
        number = seccomp.NUMBERS[name][found.column]
        assert number is not None
        assert run(program, found.audit_number, number, *arguments) == expected, name
        assert run(program, other.audit_number, number, *arguments) == seccomp.KILL_PROCESS
    known = {numbers[found.column] for numbers in seccomp.NUMBERS.values()}
    for number in {*range(600), *(0x40000000 | each for each in range(600))} - known:
        assert run(program, found.audit_number, number) == DENIED, number
