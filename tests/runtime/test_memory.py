"""What a container or machine may use and what processes take, from files as the kernel writes them."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cgroups import Files
from support.history import PLAIN

from runtime import memory
from runtime.cgroups import count_usable_cpus, find_cpu_quota, parse_cgroups, parse_quota
from runtime.memory import MemoryLimit, MemoryUnknown, Pressure, tree_bytes

GB = 2**30
MACHINE = MemoryLimit(24684096 * 1024, "machine")
MEMINFO = "MemTotal:       24684096 kB\nMemFree:        24153040 kB\nMemAvailable:   24262108 kB\n"
SERVICE, SLICE = "system.slice/loadledger.service/", "system.slice/"
V2 = f"0::/{SERVICE}\n"
V1 = "12:pids:/docker/0123abcd\n9:hugetlb,memory:/docker/0123abcd\n8:freezer:/docker/0123abcd\n"
V1_OWN, V1_PARENT, V1_ROOT = (
    f"memory/{folder}memory.limit_in_bytes" for folder in ("docker/0123abcd/", "docker/", "")
)
HYBRID_V1, HYBRID_V2 = "memory/pods/a/memory.limit_in_bytes", "unified/user.slice/a/memory.max"
HYBRID = "9:name=systemd:/\n4:memory:/pods/a\n1:cpu:/\n0::/user.slice/a\n"
V1_NONE = "9223372036854771712\n"
V1_NONE_64K = "9223372036854710272\n"

TEXT = st.one_of(
    st.binary(max_size=200),
    st.from_regex(rb"\A[0-9]{1,40}\n?\Z"),
    st.from_regex(rb"\A([0-9]{0,2}:[a-z,]{0,9}:[/.a-z\x00\xff:]{0,40}\n?){0,4}\Z"),
    st.from_regex(rb"\AMemTotal:[ ]*[0-9x]{0,30}( kB)?\n?\Z"),
    st.from_regex(rb"\A(some|full) avg10=[0-9.]{0,12}( avg60=0.00)?\n?\Z"),
    st.sampled_from([b"max\n", b"0::/a/b\n", b"4:memory:/a\n0::/a\n", b"MemTotal: " + b"9" * 5000]),
)


def limit_of(files: Files) -> MemoryLimit:
    return memory.find_memory_limit(files.proc, files.cgroups)


def pressure_of(files: Files) -> Pressure | None:
    return memory.read_pressure(files.proc, files.cgroups)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path)
    files.write(meminfo=MEMINFO)
    return files


# The limit

OUTSIDE = "0::/../outside\n"


@pytest.mark.parametrize(
    ("own", "limits", "limit_gb"),
    [
        (V2, {SERVICE: f"{4 * GB}\n"}, 4),
        (V2, {SERVICE: f"{4 * GB}\n", SLICE: f"{2 * GB}\n"}, 2),
        (V2, {SERVICE: "max\n", SLICE: f"{3 * GB}\n"}, 3),
        (V2, {SERVICE: f"{GB}\n", SLICE: "max\n"}, 1),
        (V2, {SERVICE: "max\n", SLICE: "max\n"}, None),
        (V2, {"system.slice/other.service/": f"{GB}\n"}, None),
        (V2, {f"{SERVICE}child/": f"{GB}\n"}, None),
        (V2, {SERVICE: f"{64 * GB}\n"}, None),  # more than there is
        (V2, {}, None),
        # In a container the mount is its own cgroup, whatever its path is said to be.
        *(
            (own, {"": f"{2 * GB}\n"}, 2)
            for own in ("0::/\n", "0::/kubepods.slice/pod1\n", "0::/../cri-2\n", "")
        ),
        (OUTSIDE, {"": "max\n", "../outside/": f"{GB}\n", "outside/": f"{GB}\n"}, None),
    ],
)
def test_limit_is_the_least_of_the_cgroups_above(
    files: Files, own: str, limits: dict[str, str], limit_gb: int | None
) -> None:
    files.unified(own, limits)
    (files.cgroups.parent / "memory.max").write_text("4096\n")  # above the mount: nobody's
    assert limit_of(files) == (MACHINE if limit_gb is None else MemoryLimit(limit_gb * GB, "cgroup v2"))


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (V1, {V1_OWN: f"{4 * GB}\n", V1_PARENT: V1_NONE, V1_ROOT: V1_NONE}, MemoryLimit(4 * GB, "cgroup v1")),
        (V1, {V1_OWN: f"{4 * GB}\n", V1_PARENT: f"{3 * GB}\n"}, MemoryLimit(3 * GB, "cgroup v1")),
        (V1, {V1_OWN: V1_NONE, V1_PARENT: V1_NONE, V1_ROOT: f"{5 * GB}\n"}, MemoryLimit(5 * GB, "cgroup v1")),
        # A container that sees the host's path: the mount is its own.
        (V1, {V1_ROOT: f"{5 * GB}\n"}, MemoryLimit(5 * GB, "cgroup v1")),
        (V1, {V1_OWN: V1_NONE, V1_ROOT: V1_NONE_64K}, MACHINE),
        (HYBRID, {HYBRID_V1: f"{2 * GB}\n"}, MemoryLimit(2 * GB, "cgroup v1")),
        (HYBRID, {HYBRID_V1: V1_NONE}, MACHINE),
        (HYBRID, {HYBRID_V2: f"{3 * GB}\n"}, MemoryLimit(3 * GB, "cgroup v2")),
        (HYBRID, {HYBRID_V1: f"{2 * GB}\n", HYBRID_V2: f"{GB}\n"}, MemoryLimit(GB, "cgroup v2")),
    ],
)
def test_limit_of_cgroup_v1_and_of_both(
    files: Files, own: str, limits: dict[str, str], expected: MemoryLimit
) -> None:
    files.write(self_cgroup=own)
    files.cgroup(limits | {"unified/cgroup.controllers": "memory\n"})
    assert limit_of(files) == expected


@pytest.mark.parametrize("text", ["", "-1\n", "0\n", "1.5\n", "4G\n", "\u0664\n", "9" * 5000, "max max\n"])
def test_unreadable_limit_is_skipped(files: Files, text: str) -> None:
    assert memory.parse_limit(text) is None
    files.unified(V2, {SERVICE: text, SLICE: f"{2 * GB}\n"})
    assert limit_of(files) == MemoryLimit(2 * GB, "cgroup v2")


@pytest.mark.parametrize("text", ["", "MemTotal:\n", "MemTotal: much kB\n", "MemTotal: 0 kB\n"])
def test_limit_of_cgroup_without_meminfo(files: Files, text: str) -> None:
    files.unified(V2, {SERVICE: f"{4 * GB}\n"})
    files.write(meminfo=text)
    assert limit_of(files) == MemoryLimit(4 * GB, "cgroup v2")


@pytest.mark.parametrize("grouped", [V2, ""], ids=["own", "parent"])
def test_grouped_kills_are_read_beside_the_limit(files: Files, grouped: str) -> None:
    folder = SERVICE if grouped else ""
    files.unified(V2, {SERVICE: f"{GB}\n"})
    assert not limit_of(files).kills_together
    files.cgroup({f"{folder}memory.oom.group": "0\n"})
    assert not limit_of(files).kills_together
    files.cgroup({f"{folder}memory.oom.group": "1\n"})
    assert limit_of(files) == MemoryLimit(GB, "cgroup v2", kills_together=True)


def test_unreadable_limits_are_an_error_naming_the_places(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with pytest.raises(MemoryUnknown, match="meminfo") as error:
        limit_of(files)
    assert str(files.proc) in str(error.value)
    assert str(files.cgroups) in str(error.value)
    files.write(self_cgroup=V1, meminfo="")
    files.cgroup({V1_ROOT: V1_NONE_64K})
    with pytest.raises(MemoryUnknown):
        limit_of(files)


def test_folders_in_place_of_files_are_skipped(files: Files) -> None:
    for path in ("proc/self/cgroup", "cgroup/cgroup.controllers", "cgroup/memory.max"):
        (files.proc.parent / path).mkdir(parents=True)
    assert limit_of(files) == MACHINE
    assert pressure_of(files) is None


def test_cgroup_name_may_contain_anything(files: Files) -> None:
    name = b"b\xf8r"
    files.unified("", {"": "max\n"})
    (files.proc / "self/cgroup").write_bytes(b"0::/" + name + b"\n")
    folder = files.cgroups / os.fsdecode(name)
    folder.mkdir()
    (folder / "memory.max").write_text(f"{GB}\n")
    assert limit_of(files) == MemoryLimit(GB, "cgroup v2")
    assert parse_cgroups("4:memory:/a:b\n0::/c:d e\n", "memory") == ("/c:d e", "/a:b")


@PLAIN
@given(own=TEXT, meminfo=TEXT, limit=TEXT, some=TEXT)
def test_garbled_files_raise_memory_unknown_at_most(
    tmp_path_factory: pytest.TempPathFactory, own: bytes, meminfo: bytes, limit: bytes, some: bytes
) -> None:
    files = Files(tmp_path_factory.mktemp("garbled"))
    files.unified("", {"": "", "a/": ""})
    files.cgroup({"memory/a/memory.limit_in_bytes": ""})
    for path, content in (
        ("proc/self/cgroup", own), ("proc/meminfo", meminfo), ("cgroup/memory.max", limit),
        ("cgroup/a/memory.max", limit), ("cgroup/memory/a/memory.limit_in_bytes", limit),
        ("cgroup/memory.pressure", some), ("cgroup/a/cpu.pressure", some),
    ):  # fmt: skip
        (files.proc.parent / path).write_bytes(content)
    try:
        assert limit_of(files).bytes > 0
    except MemoryUnknown:
        assert memory.parse_limit(limit.decode(errors="replace")) is None
    assert memory.is_under_pressure(pressure_of(files)) in (True, False)


def test_thread_takes_its_stack_and_more() -> None:
    code = (
        "import resource; from runtime.memory import thread_bytes\n"
        "for limit in (2**20, resource.RLIM_INFINITY):\n"
        "    resource.setrlimit(resource.RLIMIT_STACK, (limit, resource.RLIM_INFINITY))\n"
        "    print(thread_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == [
        2**20 + memory.THREAD_HEAP_BYTES,
        memory.UNLIMITED_STACK_BYTES + memory.THREAD_HEAP_BYTES,
    ]


def test_this_machine_has_a_limit_and_pressure() -> None:
    with Path("/proc/meminfo").open(encoding="ascii") as meminfo:
        total = memory.parse_field(meminfo.read(), "MemTotal")
    assert 0 < memory.find_memory_limit().bytes <= total
    found = memory.read_pressure()
    assert found is None or found != Pressure(None, None)


# Pressure


def psi(avg10: float) -> str:
    line = f"avg10={avg10:.2f} avg60=0.85 avg300=1.85 total=2818861001\n"
    return f"some {line}full avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"


@pytest.mark.parametrize(
    ("own", "mount", "folder"),
    [
        (V2, "", SERVICE),
        # In a container the mount is its own cgroup.
        ("0::/\n", "", ""),
        ("0::/pods/pod1\n", "unified/", "unified/"),
        ("0::/../x\n", "", ""),
    ],
)
def test_own_cgroup_pressure_goes_before_the_machines(
    files: Files, own: str, mount: str, folder: str
) -> None:
    files.unified(own, {}, mount=mount)
    files.write(pressure_memory=psi(50), pressure_cpu=psi(60))
    assert pressure_of(files) == Pressure(50, 60)
    files.cgroup({f"{folder}memory.pressure": psi(1.25), f"{folder}cpu.pressure": psi(2)})
    assert pressure_of(files) == Pressure(1.25, 2)


def test_each_pressure_is_read_where_it_is(files: Files) -> None:
    files.unified(V2, {})
    assert pressure_of(files) is None
    files.write(pressure_cpu=psi(6))
    assert pressure_of(files) == Pressure(None, 6)
    files.cgroup({f"{SERVICE}memory.pressure": psi(7)})
    assert pressure_of(files) == Pressure(7, 6)
    files.write(pressure_cpu="")
    assert pressure_of(files) == Pressure(7, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (psi(0), 0), (psi(100), 100), (psi(12.34), 12.34), ("some avg10=7 avg60=1\n", 7),
        ("full avg10=5.00\nsome avg10=6.00\n", 6), ("", None), ("full avg10=5.00 avg60=0.00\n", None),
        ("some avg60=5.00\n", None), ("some avg10=\n", None), ("some avg10=nan\n", None),
        ("some avg10=1000.00\n", None), ("some avg10=-1.00\n", None), ("awesome avg10=5.00\n", None),
    ],
)  # fmt: skip
def test_pressure_is_the_ten_second_average(text: str, expected: float | None) -> None:
    assert memory.parse_some_percent(text) == expected


def test_either_pressure_counts() -> None:
    much_memory, much_cpu = memory.MEMORY_PRESSURE_PERCENT, memory.CPU_PRESSURE_PERCENT
    little = Pressure(much_memory - 0.01, much_cpu - 0.01)
    for found in (None, Pressure(None, None), Pressure(0, 0), little):
        assert not memory.is_under_pressure(found)
    for found in (Pressure(much_memory, 0), Pressure(much_memory, None)):
        assert memory.is_under_pressure(found)
    for found in (Pressure(0, much_cpu), Pressure(None, much_cpu)):
        assert memory.is_under_pressure(found)


# Memory of processes

ROLLUP = """\
55cf01eef000-7ffd3aff2000 ---p 00000000 00:00 0                          [rollup]
Rss:               10240 kB
Pss_Dirty:          4000 kB
Shared_Clean:       3000 kB
Private_Clean:       100 kB
Private_Dirty:      2000 kB
Private_Hugetlb:      24 kB
"""

NEST = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"], stdin=subprocess.PIPE)
input()
child.communicate(b"\\n")
"""


def test_total_of_sizes_fits_into_the_ledger() -> None:
    assert memory.total_bytes([1, 2]) == 3
    assert memory.total_bytes([2**63 - 1, 2**63 - 1]) == 2**63 - 1


def test_private_pages_are_summed() -> None:
    assert memory.parse_private(ROLLUP) == 2024 * 1024
    assert memory.parse_field(ROLLUP, "VmData") == 0


def test_swapped_pages_and_page_tables_are_taken() -> None:
    status = b"VmHWM:\t 70 kB\nVmRSS:\t 60 kB\nRssAnon:\t 40 kB\nRssFile:\t 20 kB\n"
    assert memory.parse_resident(status) == memory.Resident(40 << 10, 60 << 10, 70 << 10)
    seen = memory.parse_resident(status + b"VmPTE:\t 8 kB\nVmSwap:\t 2 kB\nHugetlbPages:\t 0 kB\n")
    assert seen is not None
    assert (seen.taken_bytes, seen.file_bytes) == (50 << 10, 20 << 10)


def test_touched_memory_is_private() -> None:
    size = 32 * 2**20
    private, data = memory.private_bytes(), memory.data_bytes()
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:] = bytes(size)
        assert memory.private_bytes() - private > 0.9 * size
        assert memory.data_bytes() - data > 0.9 * size


def test_descendants_are_found() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"  # from the grandchild
        found = memory.list_descendants(child.pid)
        assert len(found) == 1
        assert set(memory.list_descendants(os.getpid())) >= {child.pid, *found}
        own, of_child = tree_bytes(os.getpid()), tree_bytes(child.pid)
        assert own > of_child > tree_bytes(found[0]) > 0
        child.communicate(b"\n")


def test_exited_process_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    with pytest.raises(ProcessLookupError):
        memory.private_bytes(child.pid)
    assert memory.list_descendants(child.pid) == []


# The CPUs that a process may use


CPU_V1 = "12:pids:/docker/0123abcd\n9:cpu,cpuacct:/docker/0123abcd\n8:cpuset:/elsewhere\n"
OWN, PARENT, ROOT = "cpu/docker/0123abcd/", "cpu/docker/", "cpu/"
CPU_HYBRID = "9:name=systemd:/\n4:cpu,cpuacct:/pods/a\n1:memory:/\n0::/user.slice/a\n"
NONE = "max 100000\n"


def quota(files: Files) -> int | None:
    return find_cpu_quota(files.proc, files.cgroups)


def v1(folder: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {f"{folder}cpu.cfs_quota_us": quota, f"{folder}cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        ("100000\n", "100000\n", 1), ("150000", "100000", 1), ("200000", "100000", 2), ("1", "100000", 1),
        ("25000", "50000", 1), ("1600000", "50000", 32), ("max", "100000", None), ("-1\n", "100000", None),
        ("0", "100000", None), ("100000", "0", None), ("100000", "", None), ("", "", None),
        ("1.5", "1", None), ("\u0662", "1", None), ("9" * 5000, "1", None), ("2 2", "1", None),
        ("0x10", "1", None),
    ],
)  # fmt: skip
def test_quota_is_rounded_down_to_at_least_one_cpu(quota: str, period: str, expected: int | None) -> None:
    assert parse_quota(quota, period) == expected


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        (V2, {SERVICE: "400000 100000\n", SLICE: "200000 100000\n"}, 2),
        (V2, {SERVICE: NONE, SLICE: "300000 100000\n"}, 3),
        (V2, {SERVICE: "much\n", SLICE: "200000 100000\n"}, 2),
        (V2, {}, None),
    ],
)
def test_quota_is_least_of_cgroups_above(
    files: Files, own: str, quotas: dict[str, str], expected: int | None
) -> None:
    files.unified(own, quotas, limit="cpu.max")
    assert quota(files) == expected


@pytest.mark.parametrize(
    ("own", "quotas", "expected"),
    [
        (CPU_V1, v1(OWN, "250000\n") | v1(PARENT, "-1\n"), 2),
        (CPU_V1, v1(OWN, "800000\n") | v1(PARENT, "300000\n") | v1(ROOT, "-1\n"), 3),
        (CPU_V1, v1(OWN, "-1\n") | v1(PARENT, "-1\n"), None),
        (CPU_V1, v1(ROOT, "500000\n"), 5),  # a container that sees the host's path: the mount is its own
        (CPU_V1, {f"{OWN}cpu.cfs_quota_us": "100000\n"}, None),  # without its period
        (CPU_HYBRID, v1("cpu/pods/a/", "200000\n") | {"unified/user.slice/a/cpu.max": "100000 100000\n"}, 1),
    ],
)
def test_quota_of_cgroup_v1_and_of_both(
    files: Files, own: str, quotas: dict[str, str], expected: int | None
) -> None:
    files.write(self_cgroup=own)
    files.cgroup(quotas | {"unified/cgroup.controllers": "cpu\n"})
    assert quota(files) == expected


def test_this_process_may_use_a_cpu() -> None:
    assert 1 <= count_usable_cpus() <= len(os.sched_getaffinity(0))
