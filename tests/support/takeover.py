"""What the code of a model could try in a worker that it has taken over. Runs in workers of a patched tree.

`try_all(facts)` returns which attempts succeeded. Each is harmless where it succeeds: it opens and does not
write, it sends signals that are ignored, what it starts ends at once. It imports nothing of ours.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)
SYSCALLS = {
    "bpf": (321, 280), "io_uring_setup": (425, 425), "keyctl": (250, 219), "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438), "userfaultfd": (323, 282),
}  # fmt: skip
PAGE = 4096
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
GROWS = 0x100  # MAP_GROWSDOWN
GIB = 2**30
NORESERVE, FIXED_NOREPLACE, MREMAP_MAYMOVE, AT_RANDOM = 0x4000, 0x100000, 1, 25
DOWN_THE_STACK = 2**20
"""Well below what the thread has used of it, and within its limit."""
DATA = 3
"""The descriptor of the worker's data channel."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
F_SETSIG = 10
SPAN = 2**21
"""Addresses of a page of page tables."""
KEPT: list[mmap.mmap] = []
LIBC = ctypes.CDLL(None, use_errno=True)

Facts = Mapping[str, Any]
"""`server`, `fork_server`, `sibling`: process ids; `data`: a data directory; `others`: a file of another
model; `own`: the version's folder; `port`: of a server on 127.0.0.1."""


def _call(function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(name: str, *arguments: Any) -> int:
    values = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return _call(LIBC.syscall, ctypes.c_long(SYSCALLS[name][COLUMN]), *values)


def _open(path: str | Path, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags, 0o600))


def _create(folder: str | Path) -> None:
    path = Path(folder, f".takeover-{os.getpid()}")
    _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    path.unlink()


def _rename(folder: str) -> None:
    path = Path(folder, "model.onnx")
    path.rename(path.with_suffix(".moved"))
    path.with_suffix(".moved").rename(path)


def _link(folder: str) -> None:
    path = Path(folder, "model.onnx")
    path.with_suffix(".linked").symlink_to("/")
    path.with_suffix(".linked").unlink()


def _connect(port: int) -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", port))


def _listen() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()


def _send_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", 9))


def _make_socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def _fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _execute() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def _execute_in_place() -> None:
    os.execv("/nonexistent/program", ["program"])  # where it may: no such file


def _unshare() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0 else 1)
    if os.waitpid(pid, 0)[1]:
        raise PermissionError


def _read_memory(pid: int) -> None:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    os.close(descriptor)


def _read_memory_by_call(pid: int) -> None:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    ours = Vector(ctypes.cast(buffer, ctypes.c_void_p), 8)
    theirs = Vector(id(None), 8)  # forked: the same address in all workers and in the fork server
    _call(LIBC.process_vm_readv, pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)


def _trace(pid: int) -> None:
    LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    _call(LIBC.ptrace, PTRACE_SEIZE, pid, None, None)
    LIBC.ptrace(PTRACE_DETACH, pid, None, None)


def _take_descriptor(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.close(_syscall("pidfd_getfd", pidfd, 0, 0))
    finally:
        os.close(pidfd)


def _signal_by_pidfd(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, 0)
    finally:
        os.close(pidfd)


def _signal_by_descriptor(pid: int) -> None:
    """Have the kernel send a signal, which is ignored, when a message comes."""
    fcntl.fcntl(3, fcntl.F_SETOWN, pid)
    fcntl.fcntl(3, F_SETSIG, signal.SIGURG)


def _limit_of(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_NOFILE, resource.prlimit(pid, resource.RLIMIT_NOFILE))


def _set_affinity(pid: int) -> None:
    os.sched_setaffinity(pid, os.sched_getaffinity(pid))


def _set_priority(pid: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))


def _allow_core_dumps() -> None:
    if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0):
        raise PermissionError


def _raise_limit(kind: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(kind, (hard, hard + 1))


def _map(size: int, protection: int, flags: int = 0) -> None:
    """Map memory; Python's own, with 0, is shared."""
    kind = flags | mmap.MAP_ANONYMOUS if flags else mmap.MAP_SHARED
    mmap.mmap(-1, size, flags=kind, prot=protection).close()


def _make_executable() -> None:
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    address = LIBC.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _call(LIBC.mprotect, address, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)


def _remap_stack(size: int) -> None:
    """Make memory of a page of the stack: no limit of data counts it, and it is given back untouched."""
    LIBC.getauxval.restype = ctypes.c_ulong
    page = LIBC.getauxval(AT_RANDOM) // PAGE * PAGE - DOWN_THE_STACK
    ctypes.memset(page, 0, PAGE)  # grows the stack
    LIBC.mremap.restype = ctypes.c_void_p
    LIBC.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    moved = LIBC.mremap(page, PAGE, size, MREMAP_MAYMOVE)
    if moved in {None, ctypes.c_void_p(-1).value}:
        raise OSError(ctypes.get_errno(), "mremap")
    LIBC.munmap(moved, size)


def _raise_soft_limit(kind: int) -> None:
    """Have more than the process began with, without the right to raise hard limits."""
    soft, hard = resource.getrlimit(kind)
    if soft == hard != resource.RLIM_INFINITY:
        raise PermissionError
    resource.setrlimit(kind, (hard, hard))


def _send_out_of_band() -> None:
    with socket.socket(fileno=os.dup(DATA)) as channel:
        channel.send(b"", socket.MSG_MORE)


def _send_message() -> None:
    with socket.socket(fileno=os.dup(DATA)) as channel:
        channel.sendmsg([])


def _receive_message() -> None:
    with socket.socket(fileno=os.dup(DATA)) as channel:
        channel.recvmsg(0, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def _close_new(descriptor: int) -> None:
    os.close(descriptor)


def attempts(facts: Facts) -> dict[str, Callable[[], object]]:
    """Return all attempts by name."""
    data, own = Path(facts["data"]), facts["own"]
    others = {name: facts[name] for name in ("server", "fork_server", "sibling")}
    zeros = ctypes.create_string_buffer(128)
    found: dict[str, Callable[[], object]] = {
        "read ledger key": partial(_open, data / "ledger.key"),
        "read token key": partial(_open, data / "keys" / "key.pem"),
        "read ledger": partial(_open, data / "ledger.db"),
        "write ledger": partial(_open, data / "ledger.db", os.O_RDWR),
        "list data directory": partial(os.listdir, data),
        "create in data directory": partial(_create, data),
        "read other model": partial(_open, facts["others"]),
        "write own model": partial(_open, f"{own}/model.onnx", os.O_RDWR),
        "truncate own model": partial(_open, f"{own}/model.onnx", os.O_RDWR | os.O_APPEND),
        "create beside own model": partial(_create, own),
        "rename own model": partial(_rename, own),
        "link beside own model": partial(_link, own),
        "mode of own model": partial(os.chmod, f"{own}/model.onnx", 0o600),
        "times of own model": partial(os.utime, f"{own}/model.onnx"),
        "read /etc/passwd": partial(_open, "/etc/passwd"),
        "create in temporary directory": partial(_create, "/tmp"),
        "create in /dev/shm": partial(_create, "/dev/shm"),
        "list /proc": partial(os.listdir, "/proc"),
        "list connections": partial(_open, "/proc/self/net/tcp"),
        "list mounts": partial(_open, "/proc/self/mountinfo"),
        "change directory's root": partial(os.chroot, "/"),
        "tcp connect": partial(_connect, facts["port"]),
        "tcp listen": _listen,
        "udp": _send_datagram,
        "read control key": partial(_open, f"{facts['data']}/control.key"),
        "unix socket": partial(_make_socket, socket.AF_UNIX, socket.SOCK_STREAM),
        "socket pair": partial(socket.socketpair),
        "netlink socket": partial(_make_socket, socket.AF_NETLINK, socket.SOCK_RAW),
        "raw socket": partial(_make_socket, socket.AF_INET, socket.SOCK_RAW),
        "fork": _fork,
        "start a program": _execute,
        "become a program": _execute_in_place,
        "namespaces": _unshare,
        "outlive the fork server": partial(_call, LIBC.prctl, PR_SET_PDEATHSIG, 0, 0, 0, 0),
        "core dumps": _allow_core_dumps,
        "raise limit of files": partial(_raise_limit, resource.RLIMIT_NOFILE),
        "raise limit of memory": partial(_raise_limit, resource.RLIMIT_DATA),
        "memory beyond the limit": partial(_map, 6 * GIB, READ_WRITE, mmap.MAP_PRIVATE),
        "memory beyond the limit, shared": partial(_map, 6 * GIB, READ_WRITE),
        "memory beyond the limit, as a stack": partial(_map, 6 * GIB, READ_WRITE, mmap.MAP_PRIVATE | GROWS),
        "memory beyond the limit, of a page of the stack": partial(_remap_stack, 6 * GIB),
        "memory beyond the limit, to read only": partial(
            _map, 600 * GIB, mmap.PROT_READ, mmap.MAP_PRIVATE | NORESERVE
        ),
        "raise limit of the stack": partial(_raise_soft_limit, resource.RLIMIT_STACK),
        "raise limit of addresses": partial(_raise_limit, resource.RLIMIT_AS),
        "flags of a channel": _send_out_of_band,
        "send a message": _send_message,
        "receive a message": _receive_message,
        "memory with code": partial(_map, PAGE, READ_WRITE | mmap.PROT_EXEC),
        "memory made code": _make_executable,
        "memory file": lambda: _close_new(os.memfd_create("x")),
        "io_uring": lambda: _close_new(_syscall("io_uring_setup", 8, zeros)),
        "perf events": lambda: _close_new(_syscall("perf_event_open", zeros, 0, -1, -1, 0)),
        "bpf": partial(_syscall, "bpf", 0, zeros, 128),
        "user faults": lambda: _close_new(_syscall("userfaultfd", 0)),
        "kernel keys": partial(_syscall, "keyctl", 0, -3, 0),
        "set the clock": partial(_call, LIBC.clock_settime, 0, zeros),
        "be readable for others": partial(_call, LIBC.prctl, PR_SET_DUMPABLE, 1, 0, 0, 0),
    }
    for name, pid in others.items():
        found |= {
            f"environment of {name}": partial(_open, f"/proc/{pid}/environ"),
            f"memory map of {name}": partial(_open, f"/proc/{pid}/maps"),
            f"memory of {name}": partial(_read_memory, pid),
            f"memory of {name} by call": partial(_read_memory_by_call, pid),
            f"trace {name}": partial(_trace, pid),
            f"descriptor of {name}": partial(_take_descriptor, pid),
            f"signal {name}": partial(os.kill, pid, 0),
            f"signal {name} by pidfd": partial(_signal_by_pidfd, pid),
            f"signal {name} by descriptor": partial(_signal_by_descriptor, pid),
            f"limits of {name}": partial(_limit_of, pid),
            f"cores of {name}": partial(_set_affinity, pid),
            f"priority of {name}": partial(_set_priority, pid),
        }
    return found


def _reserve(size: int, address: int | None = None) -> int | None:
    """Map memory to read only, which no limit of data counts; returns its address, None if it is refused."""
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE | (0 if address is None else FIXED_NOREPLACE)
    mapped = LIBC.mmap(address, size, mmap.PROT_READ, kind, -1, 0)
    return None if mapped in {None, ctypes.c_void_p(-1).value} else int(mapped)


def scatter_pages() -> None:
    """Read two pages at each second border of a GiB: up to 16 KB of page tables for 8 KB of addresses."""
    for border in range(2 * GIB, 131_000 * GIB, 2 * GIB):
        mapped = _reserve(2 * PAGE, border - PAGE)
        if mapped is not None:
            ctypes.string_at(mapped, 1)
            ctypes.string_at(border, 1)


def scatter_pages_and_wait() -> None:
    scatter_pages()
    signal.pause()


def read_reserved() -> None:
    """Read a page of each 2 MiB, which takes 4 KiB of tables, of all addresses that there are, or 600 GiB."""
    size, left = 64 * GIB, 600 * GIB
    while size >= SPAN and left > 0:
        mapped = _reserve(size)
        if mapped is None:
            size //= 2
            continue
        left -= size
        for place in range(mapped, mapped + size, SPAN):
            ctypes.string_at(place, 1)


def leave_pages() -> None:
    """Keep one page of each mapping that the kernel places, so that the next one comes further down."""
    LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for _ in range(60_000):
        mapped = _reserve(GIB // 4)
        if mapped is None:
            break
        ctypes.string_at(mapped, 1)
        LIBC.munmap(mapped + PAGE, GIB // 4 - PAGE)


def take_everything() -> None:
    """Take all the data that the limit allows, and then page tables in each way."""
    size = GIB
    while size >= SPAN:
        try:
            taken = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=READ_WRITE)
        except (OSError, MemoryError):
            size //= 2
            continue
        KEPT.append(taken)
        for place in range(0, size, PAGE):
            taken[place] = 1
    leave_pages()
    scatter_pages()
    read_reserved()


def take_all_stacks() -> None:
    """Take memory that is no data: of a page of the stack, by a longer stack, and to read only."""
    for take in (
        partial(_remap_stack, GIB),
        partial(_raise_soft_limit, resource.RLIMIT_STACK),
        partial(_map, 600 * GIB, mmap.PROT_READ, mmap.MAP_PRIVATE | NORESERVE),
    ):
        try:
            take()
        except OSError:
            continue
        signal.pause()


def try_all(facts: Facts) -> list[str]:
    """Return the attempts that succeeded."""
    succeeded = []
    for name, attempt in attempts(facts).items():
        try:
            attempt()
        except (OSError, ValueError, MemoryError):
            continue
        succeeded.append(name)
    return succeeded
