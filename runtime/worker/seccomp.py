"""seccomp: a filter that allows a worker the system calls of serving one model, and refuses all others.

seccomp(2), "Seccomp BPF" in the kernel's documentation. The filter is a classic BPF program over the number
and the arguments of a system call; all other calls fail with EPERM, except clone3, which fails with ENOSYS so
that the C library falls back to clone, whose flags a filter can read. System calls of another architecture,
which have other numbers, kill the process.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Flag, auto
from typing import NamedTuple

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
"""linux/prctl.h, linux/seccomp.h"""
LOAD_WORD, JUMP_IF_EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
"""Instructions of linux/bpf_common.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ, BPF_ALU|BPF_AND, BPF_RET."""
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
"""Results of a filter (linux/seccomp.h); an error's number is added to ERRNO."""
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET, ARGUMENT_BYTES = 0, 4, 16, 8
"""Offsets in `struct seccomp_data`. Each argument has 64 bits, of which the lower 32 come first."""
INSTRUCTION = struct.Struct("=HBBI")
WORD = 0xFFFFFFFF


class Grants(Flag):
    """Permissions of a worker beyond serving a model on the CPU.

    Attributes:
        CODE: map libraries, and make code: an execution provider is loaded, and may compile the model.
        DRIVERS: calls of NVIDIA's driver in a process, after its documentation; they were not tried.
    """

    NOTHING = 0
    CODE = auto()
    DRIVERS = auto()


class Machine(NamedTuple):
    """An architecture: its number in linux/audit.h, and its column of `NUMBERS`."""

    audit_number: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

_PLAIN = {  # name: its number on x86_64 (asm/unistd_64.h), on aarch64 (asm-generic/unistd.h)
    "read": (0, 63),
    "readv": (19, 65),
    "pread64": (17, 67),
    "write": (1, 64),
    "writev": (20, 66),
    "lseek": (8, 62),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "munmap": (11, 215),
    "madvise": (28, 233),
    "brk": (12, 214),
    "mseal": (462, 462),
    "futex": (202, 98),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "getrandom": (318, 278),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_CHECKED = {
    "recvfrom": (45, 207),
    "sendto": (44, 206),
    "openat": (257, 56),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "clone": (56, 220),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "prctl": (157, 167),
    "kill": (62, 129),
    "tgkill": (234, 131),
}
_DRIVING = {
    "mremap": (25, 216),
    "mincore": (27, 232),
    "mlock": (149, 228),
    "munlock": (150, 229),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "get_mempolicy": (239, 236),
    "sched_setaffinity": (203, 122),
    "eventfd2": (290, 19),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "getuid": (102, 174),
    "geteuid": (107, 175),
}
_REFUSED = {"clone3": (435, 435)}

NUMBERS: Mapping[str, tuple[int, int | None]] = _PLAIN | _CHECKED | _DRIVING | _REFUSED
"""Numbers of system calls, by `Machine.column`; None where the architecture has no such call.

Only drivers may call `mremap`, which makes memory of any size of a page of the stack, counted by no limit
except that of addresses (malloc then moves the data itself). Nobody may call `sendmsg` and `recvmsg`, whose
descriptors and flags lie in memory, where a filter cannot read them.
"""

_PROT_EXEC = 0x4
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 0x01, 0x02, 0x20
_MAP_GROWSDOWN, _MAP_HUGETLB = 0x100, 0x40000
_MAP_KINDS = _MAP_SHARED | _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_GROWSDOWN | _MAP_HUGETLB
_COUNTED = (
    _MAP_PRIVATE | _MAP_ANONYMOUS,
    _MAP_PRIVATE,
    _MAP_SHARED,
    _MAP_SHARED | _MAP_PRIVATE,  # MAP_SHARED_VALIDATE
)
"""Kinds of mappings: files, and private memory, which RLIMIT_DATA counts. It does not count shared memory,
nor mappings that grow like a stack."""
_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
"""Flags of openat that a worker which only reads may not give; O_TMPFILE takes one of them, too."""
_CLONE_VM, _CLONE_SIGHAND, _CLONE_THREAD = 0x100, 0x800, 0x10000
_CLONE_NEW = 0x80 | 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""All CLONE_NEW* of linux/sched.h."""
_THREAD = _CLONE_VM | _CLONE_SIGHAND | _CLONE_THREAD
_FCNTLS = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Other commands lock files, or have the kernel
signal any process of this user (F_SETOWN)."""
_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS (Python's isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_PRCTLS = (15, 41, 0x53564D41)
"""PR_SET_NAME, PR_SET_THP_DISABLE, PR_SET_VMA."""


_SOCKET_FLAGS = (0, 0x40)
"""None, MSG_DONTWAIT. Other flags send and receive out of band."""


class Check(NamedTuple):
    """A condition on the lower 32 bits of an argument: masked with `mask`, they must be in `values`."""

    argument: int
    mask: int
    values: tuple[int, ...]


def build_checks(pid: int, grants: Grants) -> dict[str, tuple[Check, ...]]:
    """Return the conditions of the checked system calls, for the process `pid`."""
    drives = Grants.DRIVERS in grants
    no_code = () if Grants.CODE in grants else (Check(2, _PROT_EXEC, (0,)),)
    itself = (Check(0, WORD, (pid,)),)
    return {
        "recvfrom": (Check(3, WORD, _SOCKET_FLAGS),),
        "sendto": (Check(3, WORD, _SOCKET_FLAGS), Check(5, WORD, (0,))),  # without an address
        "openat": () if drives else (Check(2, _WRITES, (0,)),),
        "mmap": (*no_code, *(() if drives else (Check(3, _MAP_KINDS, _COUNTED),))),
        "mprotect": no_code,
        "clone": (Check(0, _THREAD | _CLONE_NEW, (_THREAD,)),),
        "prlimit64": (Check(0, WORD, (0,)),),
        "fcntl": (Check(1, WORD, _FCNTLS),),
        "ioctl": () if drives else (Check(1, WORD, _IOCTLS),),
        "prctl": (Check(0, WORD, _PRCTLS),),
        "kill": itself,
        "tgkill": itself,
    }


def build_filter(machine: Machine, pid: int, grants: Grants) -> bytes:
    """Return the BPF program for a worker.

    Args:
        machine: the architecture.
        pid: the worker's process id: it may signal only itself.
        grants: the worker's permissions beyond serving a model on the CPU.
    """
    calls = _PLAIN | (_DRIVING if Grants.DRIVERS in grants else {})
    checks = build_checks(pid, grants)
    program = [
        _instruction(LOAD_WORD, ARCHITECTURE_OFFSET),
        _instruction(JUMP_IF_EQUAL, machine.audit_number, if_true=1),
        _instruction(RETURN, KILL_PROCESS),
        _instruction(LOAD_WORD, NUMBER_OFFSET),
    ]
    for numbers in calls.values():
        program += _on_call(numbers[machine.column], [_instruction(RETURN, ALLOW)])
    for name, numbers in _CHECKED.items():
        program += _on_call(numbers[machine.column], list(_check_arguments(checks[name])))
    for numbers in _REFUSED.values():
        program += _on_call(numbers[machine.column], [_instruction(RETURN, ERRNO | errno.ENOSYS)])
    return b"".join([*program, _instruction(RETURN, ERRNO | errno.EPERM)])


def _on_call(number: int | None, body: Sequence[bytes]) -> Sequence[bytes]:
    """Run `body`, which returns, if the system call has this number."""
    return () if number is None else (_instruction(JUMP_IF_EQUAL, number, if_false=len(body)), *body)


def _check_arguments(checks: Sequence[Check]) -> Iterator[bytes]:
    """Allow the system call if all conditions hold."""
    for argument, mask, values in checks:
        yield _instruction(LOAD_WORD, ARGUMENTS_OFFSET + ARGUMENT_BYTES * argument)
        yield _instruction(AND, mask)
        for rest, value in zip(range(len(values), 0, -1), values, strict=True):
            yield _instruction(JUMP_IF_EQUAL, value, if_true=rest)
        yield _instruction(RETURN, ERRNO | errno.EPERM)
    yield _instruction(RETURN, ALLOW)


def _instruction(code: int, operand: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return INSTRUCTION.pack(code, if_true, if_false, operand)


_LIBC = ctypes.CDLL(None, use_errno=True)
_MACHINE = MACHINES.get(platform.machine())
_PID = 0x7FFFFFF7
"""In place of a worker's process id, in the filters that the fork server builds for all workers."""
_TEMPLATE = b"" if _MACHINE is None else build_filter(_MACHINE, _PID, Grants.NOTHING)
"""The filter of workers without grants; others build their own."""


class _Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("instructions", ctypes.c_ushort), ("code", ctypes.c_void_p))


def restrict(grants: Grants = Grants.NOTHING) -> None:
    """Filter the system calls of this thread, and of threads that it starts, for good.

    The process needs `no_new_privs` first.

    Raises:
        OSError: ENOSYS for an architecture without a table here, or the kernel's reason.
    """
    if _MACHINE is None:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    template = build_filter(_MACHINE, _PID, grants) if grants else _TEMPLATE
    code = template.replace(_PID.to_bytes(4, sys.byteorder), os.getpid().to_bytes(4, sys.byteorder))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // INSTRUCTION.size, ctypes.addressof(buffer))
    if _LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
