"""`loadledger check`: findings of a configuration and a repository before it is served."""

import asyncio
import hashlib
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import models
from support.clients import NO_SETTINGS, run_command
from support.http import local_server
from support.models import save, save_bytes
from support.modes import unreadable
from support.postgres import Database
from support.signing import make_key, public_pem, sign_version

from events.values import Credential
from features.approvals.commands import ApproveVersion
from features.approvals.rules import ApprovalRule
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode, TrustRule
from loadledger.cli.main import main
from server.appkeys import CONSUMER, LOG
from server.check import CheckResult, check_policy, read_ledger
from server.config import Config


def run(*arguments: object, **environment: Any) -> Result:
    return run_command("check", "--port=0", *arguments, **environment)


def problems(*arguments: object) -> list[tuple[str, str]]:
    """Return place and code of each problem; the exit code has to agree."""
    result = run(*arguments, "--json")
    told = json.loads(result.stdout)
    found = [each for each in told["findings"] if each["severity"] == "problem"]
    assert (result.exit_code, told["fine"]) == ((1, False) if found else (0, True))
    return [(each["place"], each["code"]) for each in found]


def test_check_loads_no_model_but_the_named_one(tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    save(models.add(), tmp_path, "m", 2)
    save(models.endless(), tmp_path, "slow")
    for named, told in (
        ((), "2 models, 3 versions"),
        (("m",), "1 model, 1 version, loaded"),
        (("m/1",), "1 model, 1 version, loaded"),
    ):
        result = run(f"--repository={tmp_path}", *named)
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == f"{told}: no problems"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "slow"]


@pytest.mark.parametrize(
    ("named", "code"),
    [("none", "unknown_model"), ("m/2", "unknown_version"), ("-", "invalid_model_id")],
)
def test_check_of_a_version_that_is_not_there_is_a_problem(named: str, code: str, tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    assert problems(f"--repository={tmp_path}", named) == [(named.partition("/")[0], code)]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (models.unknown_operator(), "invalid_model"),
        (models.crash_on_load(), "worker_died"),
        (models.memory_bomb_on_load(), "out_of_memory"),
        (models.reshape(), "warm_up_failed"),
        (models.endless(), "timeout"),
    ],
)
def test_check_of_a_version_finds_its_failed_load(model: Any, code: str, tmp_path: Path) -> None:
    save(model, tmp_path, "bad")
    (tmp_path / "bad" / "loadledger.toml").write_text("timeout_s = 5\n")
    repository = (f"--repository={tmp_path}", "--memory-budget=400000000")
    assert problems(*repository, "bad") == [("bad/1", code)]
    assert problems(*repository) == []


def test_check_finds_problems_of_files(tmp_path: Path) -> None:
    save(models.weights(4), tmp_path, "large")
    for name, line in (("parameters", 'instances = "two"'), ("delay", "max_queue_delay_us = 5")):
        save(models.add(), tmp_path, name)
        (tmp_path / name / "loadledger.toml").write_text(f"{line}\n")
    (tmp_path / "empty").mkdir()
    save_bytes(b"text", tmp_path, "text")
    save(models.external("../../secret"), tmp_path, "outside")
    assert problems(f"--repository={tmp_path}", "--memory-budget=9000000") == [
        ("empty", "not_served"),
        ("delay/loadledger.toml", "invalid_defaults"),
        ("large/1", "insufficient_memory"),
        ("parameters/loadledger.toml", "invalid_defaults"),
        ("text/1", "invalid_model"),
        ("outside/1", "unsafe_file"),
    ]


def test_check_finds_every_wrong_setting(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('strategy = "sideways"\nloads = 1\n')
    arguments = (f"--repository={tmp_path / 'none'}", "--evict=all", "--threads=-1", f"--config={file}")
    told = run(*arguments).stdout
    for words in ("--evict", "--threads", "config.toml:1", "config.toml:2", "none' is not a directory"):
        assert words in told
    assert "5 problems" in told
    assert [code for _, code in problems(*arguments)] == ["invalid_setting"] * 5


def test_check_reads_file_and_variables_as_serve_does(tmp_path: Path) -> None:
    save(models.add(), tmp_path / "repository", "m")
    file = tmp_path / "config.toml"
    file.write_text('repository = "repository"\n')
    result = run(LOADLEDGER_CONFIG=str(file))
    assert result.exit_code == 0
    assert result.stdout.endswith("\n1 model, 1 version: no problems\n")
    assert run(LOADLEDGER_REPOSITORY=str(tmp_path / "repository")).exit_code == 0
    result = run(HOME="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "LOADLEDGER_REPOSITORY" in result.stderr


def test_check_finds_problems_of_address_data_and_budget(tmp_path: Path) -> None:
    root = (f"--repository={tmp_path}",)
    long, odd = str(tmp_path / ("x" * 300)), os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "file").touch()
    for argument, found in (
        ("--host=host.invalid", ("--host", "no_address")),
        ("--host=192.0.2.1", ("--port", "no_address")),
        (f"--data={tmp_path / 'file'}", ("--data", "invalid_setting")),
        (f"--data={long}", ("--data", "invalid_setting")),
    ):
        assert found in problems(*root, argument)
    both = problems(*root, f"--jwt-keys={long}", f"--data={long}")
    assert [place for place, _ in both] == ["--data", "--jwt-keys"]
    Path(odd).mkdir()
    (tmp_path / "link").symlink_to(odd)
    for name in (odd, tmp_path / "link"):
        assert problems(f"--repository={name}") == [("--repository", "invalid_setting")]
    assert "beyond_limit" in run(*root, "--memory-budget=999999999999999").stdout


def test_check_notes_taken_port_and_unknown_variables(tmp_path: Path) -> None:
    root = (f"--repository={tmp_path}",)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(*root, f"--port={taken.getsockname()[1]}")
    assert result.exit_code == 0
    assert "note: --port: 127.0.0.1:" in result.stdout
    variables = {"LOADLEDGER_PROT": "1", "LOADLEDGER_TOKEN": "t", "LOADLEDGER_X_SERVICE_HOST": "10.0.0.1"}
    result = run(*root, **variables)
    assert result.exit_code == 0
    assert "note: LOADLEDGER_PROT: is unknown; did you mean LOADLEDGER_PORT? (unknown" in result.stdout
    assert result.stdout.count("LOADLEDGER_") == 2


def test_check_notes_files_with_hard_links(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for model_id in ("alone", "linked"):
        save(models.add(), repository, model_id)
    (repository / "linked/1/data").mkdir()
    for name in ("data/weights", "model.onnx"):
        (repository / "linked/1" / name).touch()
        (tmp_path / Path(name).name).hardlink_to(repository / "linked/1" / name)
    result = run(f"--repository={repository}")
    assert result.exit_code == 0
    assert "note: linked/1: data/weights and 1 more have other names (hard links)" in result.stdout
    assert "alone" not in result.stdout


def test_check_prints_in_any_encoding_and_on_dumb_terminal(tmp_path: Path) -> None:
    (tmp_path / "…x.onnx").touch()
    arguments = ["check", "--port=0", f"--repository={tmp_path}"]
    result = CliRunner(charset="latin-1").invoke(main, arguments, env=NO_SETTINGS, color=True)
    assert (result.exit_code, "?x.onnx" in result.stdout, "\x1b" in result.stdout) == (0, True, True)
    result = run_command(*arguments, color=True, TERM="dumb")
    assert (result.exit_code, "\x1b" in result.stdout) == (0, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="takes a user that may not read everything, and this is root")
def test_check_finds_unusable_directories(tmp_path: Path) -> None:
    root, data = tmp_path / "repository", tmp_path / "data"
    root.mkdir(mode=0o300)
    data.mkdir(mode=0o500)
    found = dict(problems(f"--repository={root}", f"--data={data}"))
    assert found == {"--data": "invalid_setting", "--repository": "unreadable"}


async def test_check_examines_the_database_of_a_ledger(
    ledger: Database, database: Database, tmp_path: Path
) -> None:
    async def found(url: str) -> list[tuple[str, str]]:
        return await asyncio.to_thread(problems, f"--repository={tmp_path}", f"--ledger={url}")

    checked = await asyncio.to_thread(run, f"--repository={tmp_path}", f"--ledger={ledger.server_url}")
    assert checked.exit_code == 0, checked.output
    assert "--ledger: commits wait for no disk: fsync is off" in checked.stdout  # of the tests' server
    assert "the database's clock is 0.0" in checked.stdout
    assert await found(ledger.owner_url) == [("--ledger", "unsafe_role")]
    assert await found(database.server_url) == [("--ledger", "schema_missing")]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = ledger.url("ledger_server", closed.getsockname())
        assert await found(nobody) == [("--ledger", "log_unavailable")]


# The policy for loads

APPROVED = LoadPolicy(approval=(ApprovalRule(("m",)),))


def trust(mode: TrustMode, *globs: str, key: Any = None) -> LoadPolicy:
    return LoadPolicy(trust=(TrustRule(globs, mode, () if key is None else (public_pem(key),)),))


HASHED = ("--repository", "policy", "note")
"""Says how much is hashed."""


def judged(config: Config, policy: LoadPolicy) -> list[tuple[str, str, str]]:
    """Return place, code and severity of what the policy is found to do."""
    result = CheckResult()
    check_policy(replace(config, policy=policy), result, read_ledger(config, result))
    found = [(each.place, each.code, each.severity.value) for each in result.findings]
    return [each for each in found if each != HASHED]


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        (LoadPolicy(), []),
        (trust(TrustMode.OFF, "*"), []),
        (trust(TrustMode.ENFORCE, "other"), []),
        (trust(TrustMode.WARN, "m"), [("m/2", "signature_missing", "note")]),
        (trust(TrustMode.ENFORCE, "?"), [("m/2", "signature_missing", "problem")]),
        (APPROVED, [("m/2", "not_approved", "problem")]),
    ],
)
def test_check_says_what_the_policy_does_to_the_highest_version(
    policy: LoadPolicy, found: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    for version in (1, 2):
        save(models.add(), config.repository, "m", version)
    assert judged(config, policy) == found


def test_check_of_a_policy_without_store_is_a_problem(tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    config = Config(repository=tmp_path, data=tmp_path, store_size="off")
    assert judged(config, APPROVED) == [("--store-size", "policy_needs_store", "problem")]


def test_check_names_versions_that_are_back_or_cannot_be_read(tmp_path: Path) -> None:
    async def remove_version() -> Config:
        async with local_server(tmp_path) as api:
            for version in (1, 2, 3, 4, 5):
                (api.save(models.add(), "m", version) / "more").touch()
            assert (await api.send("DELETE", "/api/v1/models/m/versions/2")).status == 204
            api.save(models.add(), "m", 2)
            return api.config

    config = asyncio.run(remove_version())
    folder = config.repository / "m"
    with unreadable(folder / "3"), unreadable(folder / "4/model.onnx"), unreadable(folder / "5/more"):
        result = run(f"--repository={config.repository}", f"--data={config.data}")
    assert result.exit_code == 1
    assert "m/2: was removed, and its folder has files all the same, which are not served" in result.stdout
    assert "m/3: cannot be read: Permission denied; let the server's user read it" in result.stdout
    assert "m/4: cannot be read: Permission denied; let the server's user read it" in result.stdout
    assert "m/5: 'more' cannot be read: Permission denied; let the server's user" in result.stdout


async def test_check_reads_signatures_of_repository_and_store(tmp_path: Path) -> None:
    signer, other = make_key(), make_key()
    async with local_server(tmp_path) as api:
        [file] = api.save(models.add(), "m").glob("*.onnx")
        contents = ((file.name, hashlib.sha256(file.read_bytes()).hexdigest()),)
        (api.config.repository / "m" / "1.sig").write_bytes(sign_version(contents, signer))
        await api.load("m")

    async def found(key: Any) -> list[tuple[str, str, str]]:
        return await asyncio.to_thread(judged, api.config, trust(TrustMode.ENFORCE, "m", key=key))

    refused = ("m/1", "signature_untrusted", "problem")
    assert await found(signer) == [("m/1", "policy", "note")]
    assert await found(other) == [refused, refused]
    shutil.rmtree(api.config.repository / "m")
    assert await found(signer) == []
    assert await found(other) == [refused]


async def test_check_names_loaded_models_that_a_restart_would_not_load(tmp_path: Path) -> None:
    async with local_server(tmp_path, policy=APPROVED) as api:
        api.save(models.add(), "m")
        checked = await api.app[CONSUMER].check_version("m", 1)
        contents = tuple((file.path, file.sha256) for file in checked.files)
        said = "bob", "reviewed", Credential()
        await api.app[LOG].submit(ApproveVersion("m", 1, checked.digest, contents, *said))
        await api.load("m")
        for policy, found in [
            (APPROVED, [("m/1", "policy", "note")]),
            (LoadPolicy(approval=(ApprovalRule(("m",), 2),)), [("m/1", "not_approved", "problem")]),
            (trust(TrustMode.WARN, "m"), [("m/1", "signature_missing", "note")]),
            (trust(TrustMode.ENFORCE, "m"), [("m/1", "signature_missing", "problem")] * 2),
        ]:
            assert await asyncio.to_thread(judged, api.config, policy) == found
        api.save(models.add(2), "m", 2)
        strict = LoadPolicy(approval=(ApprovalRule(("m",), 2),))
        back = [("m/2", "not_approved", "problem"), ("m/1", "not_approved", "note")]
        assert await asyncio.to_thread(judged, api.config, strict) == back
        shutil.rmtree(api.config.repository / "m" / "2")
        result = CheckResult()
        await asyncio.to_thread(check_policy, api.config, result, read_ledger(api.config, result))
        outcome = "[[approval]] m: no signature is needed; other persons that it needs: 1"
        hashed, outcomes = result.findings
        assert hashed.text.endswith(" GB of 1 version are hashed, to check the rules for loads")
        assert outcomes.text.endswith(outcome)
    (tmp_path / "data" / "ledger.db").write_bytes(b"no ledger")
    assert (await asyncio.to_thread(judged, api.config, APPROVED))[0][::2] == ("--data", "problem")
