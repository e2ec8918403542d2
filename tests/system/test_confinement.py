"""Confined workers as an operator sees them: `--confine`, ledger, API, metrics, check and console."""

import os
import re
import sys
from pathlib import Path

import pytest
from msgspec.structs import asdict
from playwright.async_api import expect
from support import models
from support.browser import Console, chromium, needs_browser
from support.clients import run_command
from support.http import ONE, local_server
from support.models import save
from support.servers import MODULE, events, refused_start, serving

from events.sqlite.datalock import LEDGER
from events.types import ModelLoaded, ServerStarted
from events.values import Confinement
from runtime.process.confinement import ALL_ACTS
from runtime.worker.landlock import find_abi
from server.config import Config

WITHOUT_LANDLOCK = f"""
import ctypes, os, struct, sys
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 444, 6, 0, 0, 0x50001, 6, 0, 0, 0x7FFF0000)
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, ctypes.byref(Program(4, program)), 0, 0) == 0
os.execv(sys.executable, [sys.executable, *{MODULE[1:]!r}, *sys.argv[1:]])
"""
"""The command where landlock_create_ruleset fails with EPERM, as under the profile of an old container."""
OLD_CONTAINER = (sys.executable, "-P", "-c", WITHOUT_LANDLOCK)
FULL = Confinement("require", find_abi(), seccomp=True, not_prevented=())
ACTS = ("read_files", *(("read_memory",) if os.geteuid() else ()))
"""Workers of root have given up the capabilities that its other processes have."""
OPEN = Confinement("auto", 0, seccomp=True, not_prevented=ACTS)


@pytest.mark.parametrize(
    ("mode", "recorded"),
    [
        pytest.param(
            "require", FULL, marks=pytest.mark.skipif(not find_abi(), reason="this kernel has no Landlock")
        ),
        ("off", Confinement("off", 0, seccomp=False, not_prevented=ALL_ACTS)),
    ],
)
async def test_server_records_what_confines_its_workers(
    tmp_path: Path, mode: str, recorded: Confinement
) -> None:
    async with local_server(tmp_path, confine=mode) as api:
        api.save(models.add(), "m")
        await api.load("m")
        assert (await api.infer("m", ONE)).status == 200
        shown = (await api.get("/api/v1/resources")).json["confinement"]
        started, loaded = await api.data_of(ServerStarted), await api.data_of(ModelLoaded)
    assert shown == {**asdict(recorded), "not_prevented": [*recorded.not_prevented]}
    assert [started[0].confinement, loaded[0].confinement] == [recorded, recorded]


def test_check_says_what_confines_workers(config: Config) -> None:
    arguments = ("check", "--port=0", f"--repository={config.repository}")
    layers = "Landlock" if find_abi() else "seccomp"
    assert f"workers are confined by {layers}" in run_command(*arguments).stdout
    result = run_command(*arguments, "--confine=off")
    assert "note: --confine: workers are not confined: a model that takes over its worker" in result.stdout
    assert "(not_confined)" in result.stdout
    assert result.exit_code == 0


async def test_required_confinement_that_is_not_to_be_had_refuses_the_start(config: Config) -> None:
    said = await refused_start(config, "--confine=require", command=OLD_CONTAINER)
    assert "--confine=require: workers are confined by seccomp: a model that takes" in said
    assert re.search(r"\(landlock: (Operation not permitted|Function not implemented)\)", said)
    assert (config.data / LEDGER).stat().st_size == 0


@needs_browser
async def test_open_confinement_is_recorded_and_shown(config: Config) -> None:
    save(models.add(), config.repository, "m")
    async with serving(config, command=OLD_CONTAINER) as server:
        await server.api.load("m")
        metrics = (await server.api.get("/metrics")).body.decode()
        assert 'loadledger_worker_forbidden_acts{act="read_files"} 1.0' in metrics
        assert 'loadledger_worker_forbidden_acts{act="use_network"} 0.0' in metrics
        await server.logged("could read files of this user")
        async with chromium() as browser, Console.opened(browser, server.url) as console:
            await console.sign_in(server.api.token("admin"))
            line = console.page.locator("#confinement")
            await expect(line).to_contain_text("could read this user's files")
    loaded = [event.data for event in await events(config) if isinstance(event.data, ModelLoaded)]
    assert [each.confinement for each in loaded] == [OPEN]
