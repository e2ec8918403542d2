"""Devices at the command line: the list, loads on one, and the config check."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support import models
from support.answers import fill
from support.clients import Shell, run_command
from support.models import save
from support.openvino import DEVICE, openvino_environment, visible_devices
from support.servers import Server, standing

from answers.jobs import JobInfo
from loadledger.cli.jobs import report_job


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("devices")
    root, environment = folder / "repository", openvino_environment(folder)
    save(models.add(), root, "m")
    with standing(root, f"--device-memory={DEVICE}=2GB", environment=environment) as server:
        yield server


def test_devices_are_listed_and_loaded_on(server: Server) -> None:
    alice = Shell(server.api, "admin")
    assert "load completed" in alice.prints(f"load m --device {DEVICE} --device=cpu --fallback=cpu -w")
    shown = alice.prints("show m")
    assert re.search(rf"devices: +1 node of its graph on {DEVICE} \(openvino 1\.\S+\)", shown)
    assert re.search(rf"parameters: .*devices {DEVICE} cpu, fallback cpu", shown)
    taken = alice.prints("resources")
    assert re.search(r"^workers on devices confined by .*; not prevented: .*run_code", taken, re.MULTILINE)
    head, cpu, device, *rest = taken.split("\n\n")[1].splitlines()
    assert head.split() == [
        *("DEVICE", "PROVIDER", "HARDWARE", "USED", "RESERVED", "BUDGET", "FREE", "MODELS"),
    ]
    assert re.fullmatch(r"cpu +cpu 1\.\S+ +- .*MB +- +\S+ GB +- +0", cpu)
    assert re.fullmatch(rf"{DEVICE} +openvino 1\.\S+ +\S.* MB +- +2\.00 GB +- +1", device)
    assert rest == []
    told = alice.json("resources")
    assert [each["device"] for each in told["devices"]] == ["cpu", DEVICE]
    assert told["device_problems"] == []
    assert "device_unavailable" in alice.refused(2, "load m --device rocm:0")
    assert f"on {DEVICE} (1 graph nodes)" in alice.prints("events --model m")


def test_report_says_what_a_device_has_not_returned(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"created_at": "2026-01-31T14:02:00Z", "finished_at": "2026-01-31T14:02:05Z"}
    job = fill(JobInfo, kind="unload", model_id="m", version=1, status="completed", **times)
    report_job(replace(job, unreturned_bytes=2_000_000), as_json=False)
    told = "m version 1: unload completed in 5.0s; its device has not returned 2.0 MB\n"
    assert capsys.readouterr().out == told


def test_check_lists_devices_and_loads_on_the_default_ones(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    save(models.add(), root, "m")
    save(models.add(), root, "elsewhere")
    (root / "elsewhere" / "loadledger.toml").write_text('devices = ["rocm:0"]\n')
    command = ("check", "--port=0", f"--repository={root}")
    assert not re.search("^device ", run_command(*command, "--visible-devices=cpu").stdout, re.MULTILINE)
    used = (f"--visible-devices={DEVICE}", f"--devices={DEVICE}")
    with visible_devices([DEVICE], tmp_path):
        result = run_command(*command, *used, "m")
        absent = run_command(*command, *used, "elsewhere")
        wrong = run_command(*command, *used, "--device-memory=rocm:0=1GB", "--json")
    listed = re.findall(r"^device (\S+): .*(no memory budget)$", result.stdout, re.MULTILINE)
    assert listed == [(DEVICE, "no memory budget")]
    assert "1 model, 1 version, loaded: no problems" in result.stdout
    assert "(device_unavailable)" in absent.stdout
    assert (wrong.exit_code, json.loads(wrong.stdout)["devices"]) == (1, [])
    found = [(each["place"], each["code"]) for each in json.loads(wrong.stdout)["findings"]]
    assert ("--device-memory", "invalid_setting") in found
