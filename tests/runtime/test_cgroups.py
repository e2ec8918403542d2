"""The CPUs that a process may use, from files as the kernel writes them."""

import os
from pathlib import Path

import pytest
from support.cgroups import Files

from runtime.cgroups import count_usable_cpus, find_cpu_quota, parse_quota

SERVICE, SLICE = "system.slice/loadledger.service/", "system.slice/"
V2 = f"0::/{SERVICE}\n"
V1 = "12:pids:/docker/0123abcd\n9:cpu,cpuacct:/docker/0123abcd\n8:cpuset:/elsewhere\n"
OWN, PARENT, ROOT = "cpu/docker/0123abcd/", "cpu/docker/", "cpu/"
HYBRID = "9:name=systemd:/\n4:cpu,cpuacct:/pods/a\n1:memory:/\n0::/user.slice/a\n"
NONE = "max 100000\n"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


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
        (V1, v1(OWN, "250000\n") | v1(PARENT, "-1\n"), 2),
        (V1, v1(OWN, "800000\n") | v1(PARENT, "300000\n") | v1(ROOT, "-1\n"), 3),
        (V1, v1(OWN, "-1\n") | v1(PARENT, "-1\n"), None),
        (V1, v1(ROOT, "500000\n"), 5),  # a container that sees the host's path: the mount is its own
        (V1, {f"{OWN}cpu.cfs_quota_us": "100000\n"}, None),  # without its period
        (HYBRID, v1("cpu/pods/a/", "200000\n") | {"unified/user.slice/a/cpu.max": "100000 100000\n"}, 1),
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
