"""How a worker is confined before it reads a byte of a model, and how a throw-away worker tests that.

ONNX Runtime parses a model's bytes in C++, so a model file may take over its worker. The worker's rights are
therefore reduced to those for serving one model: Landlock restricts files, seccomp the system calls. Both
bind the calling thread and those that it starts, so they come before all threads of ours.
"""

import errno
import fcntl
import mmap
import os
import resource
import socket
import sysconfig
import termios
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnxruntime as ort

import runtime
from features import providers
from features.wire import FoundTarget, Library
from runtime.errors import LoadRefused
from runtime.memory import UNLIMITED_STACK_BYTES
from runtime.wire import ForbiddenAct, Layer, Load, Probe, Probed, ReadJson
from runtime.worker import landlock, privileges, seccomp
from runtime.worker.seccomp import Grants

MAX_DESCRIPTORS = 256
"""A worker has five, and opens a model's files one after the other."""
NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
"""Errors of a file system that has only files with names."""
CONTROL_SOCKET = "control.sock"
"""The name of `server.auth.control`'s socket in the data directory."""
LIBRARY_FOLDERS = {"site-packages", "dist-packages"}
SYSTEM_PATHS = ("/proc/self/status", "/proc/self/maps", "/proc/meminfo", "/sys/devices/system/cpu")
"""The C library and ONNX Runtime read these to find out how much memory and how many cores there are; our own
code reads the first two to limit memory and addresses."""

DRIVER_PATHS = (
    *("/etc/ld.so.cache", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/cuda", "/usr/local/nvidia"),
    *("/proc/driver/nvidia", "/proc/devices", "/proc/self", "/sys"),
)
"""Files that NVIDIA's driver reads, and folders of its libraries and of CUDA's. The list follows the driver's
documentation and was not tried."""


def _find_code() -> tuple[str, ...]:
    """Return the folders of a worker's code: Python's library, and the packages that a worker imports."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    for module in (np, ort, msgspec, runtime):
        package = Path(module.__path__[0])
        is_installed = package.parent.name in LIBRARY_FOLDERS
        folders.add(str(package.parent if is_installed else package))
    return tuple(sorted(folders))


CODE = _find_code()


def confine(order: Load | Probe | ReadJson) -> None:
    """Confine this thread, and those that it starts, to the files of an order, by the layers that it names.

    Raises:
        OSError: a layer cannot be applied.
    """
    if not order.layers:
        return
    grants = _find_grants(order)
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_STACK: UNLIMITED_STACK_BYTES if soft == resource.RLIM_INFINITY else soft,
        resource.RLIMIT_FSIZE: 0,
    }
    for kind, limit in limits.items():
        privileges.limit_resource(kind, limit)
    privileges.drop_privileges()
    for layer in order.layers:
        if layer == "landlock":
            landlock.restrict(_find_accesses(order))
        else:
            seccomp.restrict(grants)


def _find_libraries(order: Load | Probe | ReadJson) -> tuple[Library, ...]:
    """Return the libraries of execution providers that an order uses."""
    if isinstance(order, Probe | ReadJson):
        return order.providers if isinstance(order, Probe) else ()
    return () if order.target is None else (order.target.library,)


def _find_grants(order: Load | Probe | ReadJson) -> Grants:
    """Return an order's profile. A probe has that of any worker with the same providers."""
    grants = Grants.NOTHING
    for library in _find_libraries(order):
        grants |= Grants.CODE | (Grants.DRIVERS if library.has_driver else Grants.NOTHING)
    return grants


def _find_accesses(order: Load | Probe | ReadJson) -> dict[str, int]:
    own = {order.root: landlock.READS} if isinstance(order, Load) else {}
    reads = [*SYSTEM_PATHS, *CODE, *(str(Path(each.path).parent) for each in _find_libraries(order))]
    if Grants.DRIVERS in _find_grants(order):
        reads += DRIVER_PATHS
        own |= {str(path): landlock.DRIVES for path in Path("/dev").glob("nvidia*")}
    return {**dict.fromkeys(reads, landlock.READS), **own}


def probe(order: Probe) -> Probed:
    """Apply the layers of an order one by one, as far as this kernel allows, then try forbidden acts.

    In between it registers the order's providers, and lists their targets.
    """
    abi, applied, problems = landlock.find_abi(), list[Layer](), list[str]()
    target = _Target(order.outside, os.getppid())
    for layer in order.layers:
        try:
            confine(msgspec.structs.replace(order, layers=(layer,)))
        except OSError as error:
            problems.append(f"{layer}: {error.strerror or error}")
        else:
            applied.append(layer)
    if "landlock" not in applied:
        abi = 0
    targets = list[FoundTarget]()
    for library in order.providers:
        try:
            targets += providers.find_targets(library)
        except LoadRefused as refusal:
            problems.append(str(refusal))
    return Probed(abi, tuple(applied), tuple(_try_all(target)), tuple(problems), tuple(targets))


class _Target(NamedTuple):
    """A folder that no worker may read, and the fork server's process id."""

    outside: str
    fork_server: int


def _try_all(target: _Target) -> Iterable[ForbiddenAct]:
    for name, act in FORBIDDEN_ACTS.items():
        with suppress(OSError):
            act(target)
            yield name


def _read_file(target: _Target) -> None:
    os.close(os.open(target.outside, os.O_RDONLY))


def _write_file(target: _Target) -> None:
    try:
        descriptor = os.open(target.outside, os.O_WRONLY | os.O_TMPFILE, 0o600)  # a file without a name
    except OSError as error:
        if error.errno not in NO_UNNAMED_FILES:
            raise
        path = Path(target.outside, f".attempt-{os.getpid()}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        path.unlink()
    os.close(descriptor)


def _use_network(_: _Target) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def _start_process(_: _Target) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _read_memory(target: _Target) -> None:
    """Read the fork server's memory, where None has the same address as here."""
    descriptor = os.open(f"/proc/{target.fork_server}/mem", os.O_RDONLY)
    try:
        os.pread(descriptor, 8, id(None))
    finally:
        os.close(descriptor)


def _run_code(_: _Target) -> None:
    """Map memory that can be written and then executed."""
    code = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, code).close()


def _call_driver(_: _Target) -> None:
    """Ask the driver of stdin, /dev/null, for the size of a window, a call that this driver does not know."""
    try:
        fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise


def _manage_server(target: _Target) -> None:
    """Read the control socket's key, and connect to the socket; no server need listen yet."""
    folder = os.open(target.outside, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as control, suppress(FileNotFoundError, ConnectionRefusedError):
            control.connect(f"/proc/self/fd/{folder}/{CONTROL_SOCKET}")
    finally:
        os.close(folder)


FORBIDDEN_ACTS: Mapping[ForbiddenAct, Callable[[_Target], None]] = {
    "read_files": _read_file,
    "write_files": _write_file,
    "use_network": _use_network,
    "start_processes": _start_process,
    "read_memory": _read_memory,
    "run_code": _run_code,
    "call_drivers": _call_driver,
    "manage_server": _manage_server,
}
"""Eight forbidden acts; each raises OSError if the kernel refuses it."""
