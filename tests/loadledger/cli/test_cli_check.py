"""`loadledger check`: findings of a configuration and a repository before it is served."""

import asyncio
import hashlib
import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from click.testing import CliRunner, Result
from support import models
from support.clients import NO_SETTINGS, run_command
from support.history import History, opened
from support.http import LocalApi, local_server
from support.ledgers import append_events, store_events
from support.models import save, save_bytes
from support.modes import unreadable
from support.postgres import Database
from support.signing import make_key, public_pem, sign_version

from events.sqlite.datalock import LEDGER
from events.sqlite.schema import connect
from events.values import Credential
from features.approvals.commands import ApproveVersion
from features.approvals.rules import ApprovalRule
from features.rules import LoadPolicy
from features.signatures.rules import TrustMode, TrustRule
from loadledger.cli.main import main
from nodes.check import check_ledger
from server.appkeys import CONSUMER, LOG
from server.check import (
    CheckResult,
    check_changes,
    check_configuration,
    check_policy,
    check_references,
    check_repository,
    check_rows,
    check_version,
    check_workers,
    read_ledger,
)
from server.config import Config

PROBLEM, NOTE = "problem", "note"
HASHED = ("--repository", "policy", NOTE)
"""Says how much is hashed."""


def run(*arguments: object, **environment: Any) -> Result:
    return run_command("check", "--port=0", *arguments, **environment)


def found(result: CheckResult, severity: str = PROBLEM) -> list[tuple[str, str]]:
    """Return place and code of each finding of this severity."""
    return [(each.place, each.code) for each in result.findings if each.severity == severity]


def checked_repository(config: Config) -> CheckResult:
    result = CheckResult()
    check_references(config, result, check_repository(config, result, lambda *_: False))
    return result


# The command


def test_check_loads_no_model_but_the_named_one(tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    save(models.add(), tmp_path, "m", 2)
    save(models.endless(), tmp_path, "slow")
    file = tmp_path.with_suffix(".toml")
    file.write_text(f'repository = "{tmp_path.name}"\n')
    for named, told in (((), "2 models, 3 versions"), (("m",), "1 model, 1 version, loaded")):
        result = run(*named, LOADLEDGER_CONFIG=str(file))
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == f"{told}: no problems"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "slow"]
    nothing = run(HOME="")
    assert (nothing.exit_code, nothing.stdout, "LOADLEDGER_REPOSITORY" in nothing.stderr) == (2, "", True)


async def test_check_prints_what_each_step_finds(repository: Path, tmp_path: Path) -> None:
    history = History()
    history.restart()
    history.remove_version(of="m")
    data = tmp_path / "data"
    data.mkdir()
    async with opened(data / LEDGER) as log:
        await append_events(log, history.facts)
    for version in (1, 2):
        save(models.add(), repository, "m", version)
    save(models.external("../../secret"), repository, "outside")
    file = tmp_path / "config.toml"
    file.write_text(f'data = "{data}"\nloads = 1\n[[approval]]\nmodels = ["m"]\n')
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as taken:
        closed.bind(("127.0.0.1", 0))
        ledger = f"postgresql://nobody@127.0.0.1:{closed.getsockname()[1]}/none"
        checked = await asyncio.to_thread(
            run_command, "check", f"--repository={repository}", f"--config={file}", "--json",
            "--evict=all", f"--ledger={ledger}", f"--port={taken.getsockname()[1]}", LOADLEDGER_PROT="1",
        )  # fmt: skip
    told = json.loads(checked.stdout)
    assert (checked.exit_code, told["fine"]) == (1, False)
    places = [(each["place"], each["code"], each["severity"]) for each in told["findings"]]
    assert [each for each in places if each[0] != "--confine"] == [
        (f"{file}:2: loads", "invalid_setting", PROBLEM),
        ("--evict", "invalid_setting", PROBLEM),
        ("--port", "no_address", NOTE),
        ("LOADLEDGER_PROT", "unknown_variable", NOTE),
        ("--ledger", "log_unavailable", PROBLEM),
        ("m/1", "not_served", PROBLEM),
        ("outside/1", "unsafe_file", PROBLEM),
        HASHED,
        ("m/2", "not_approved", PROBLEM),
    ]
    assert (told["models"], told["versions"], told["loaded"]) == (2, 2, False)
    assert told["confinement"]


def test_check_counts_problems_in_any_encoding_and_on_dumb_terminal(tmp_path: Path) -> None:
    (tmp_path / "…x.onnx").touch()
    arguments = ["check", "--port=0", f"--repository={tmp_path}", "--evict=all", "--threads=-1"]
    result = CliRunner(charset="latin-1").invoke(main, arguments, env=NO_SETTINGS, color=True)
    assert (result.exit_code, "?x.onnx" in result.stdout, "\x1b" in result.stdout) == (1, True, True)
    result = run_command(*arguments, color=True, TERM="dumb")
    assert (result.exit_code, "\x1b" in result.stdout) == (1, False)
    for line in ("problem: --evict: ", "problem: --threads: ", "note: …x.onnx: "):
        assert line in result.stdout
    assert result.stdout.endswith("\n0 models, 0 versions: 2 problems\n")


# Settings


@pytest.mark.parametrize(
    ("flags", "place", "code", "severity"),
    [
        ({"jwt_keys": "{folder}/none"}, "--jwt-keys", "invalid_setting", PROBLEM),
        ({"host": "host.invalid"}, "--host", "no_address", PROBLEM),
        ({"host": "192.0.2.1"}, "--port", "no_address", PROBLEM),
        ({"repository": "{folder}/\udcff"}, "--repository", "invalid_setting", PROBLEM),
        ({"memory_budget": "999999999999999"}, "--memory-budget", "beyond_limit", NOTE),
    ],
)
def test_check_finds_a_setting_that_this_machine_cannot_have(
    flags: dict[str, str], place: str, code: str, severity: str, tmp_path: Path
) -> None:
    named = {name: text.format(folder=tmp_path) for name, text in flags.items()}
    result = CheckResult()
    check_configuration({"repository": str(tmp_path), "port": "0", **named}, {}, result)
    assert found(result, severity) == [(place, code)]
    assert result.fine is (severity == NOTE)


def test_check_finds_unusable_directories(tmp_path: Path) -> None:
    repository, data, result = tmp_path / "repository", tmp_path / "data", CheckResult()
    for folder in (repository, data):
        folder.mkdir()
    with unreadable(repository), unreadable(data):
        config = check_configuration(
            {"repository": str(repository), "data": str(data), "port": "0"}, {}, result
        )
        check_repository(config, result, lambda *_: False)
    assert found(result) == [("--data", "invalid_setting"), ("--repository", "unreadable")]
    result = CheckResult()
    assert check_repository(config, result, lambda *_: False) == []
    assert found(result, NOTE) == [("--repository", "empty")]


def test_check_examines_the_database_of_a_ledger(
    ledger: Database, database: Database, tmp_path: Path
) -> None:
    def examined(url: str) -> CheckResult:
        result = CheckResult()
        check_ledger(Config(repository=tmp_path, data=tmp_path, ledger=url), result)
        return result

    sound = examined(ledger.server_url)
    assert found(sound, NOTE) == [("--ledger", "durability"), ("--ledger", "clock_offset")]
    durability, clock = sound.findings
    assert durability.text.startswith("commits wait for no disk: fsync is off")  # of the tests' server
    assert clock.text.startswith("the database's clock is 0.0")
    assert found(examined(ledger.owner_url)) == [("--ledger", "unsafe_role")]
    assert found(examined(database.server_url)) == [("--ledger", "schema_missing")]


# The repository


def test_check_finds_problems_of_files(tmp_path: Path) -> None:
    save(models.weights(4), tmp_path, "large")
    for name, line in (("parameters", 'instances = "two"'), ("delay", "max_queue_delay_us = 5")):
        save(models.add(), tmp_path, name)
        (tmp_path / name / "loadledger.toml").write_text(f"{line}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no name").mkdir()
    save_bytes(b"text", tmp_path, "text")
    save(models.external("../../secret"), tmp_path, "outside")
    result = checked_repository(Config(repository=tmp_path, data=tmp_path, memory_budget="9000000"))
    assert found(result) == [
        ("empty", "not_served"),
        ("delay/loadledger.toml", "invalid_defaults"),
        ("large/1", "insufficient_memory"),
        ("parameters/loadledger.toml", "invalid_defaults"),
        ("text/1", "invalid_model"),
        ("outside/1", "unsafe_file"),
    ]
    assert found(result, NOTE) == [("no name", "invalid_model_id")]


def test_check_names_versions_that_cannot_be_read(tmp_path: Path) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    folder = config.repository / "m"
    for version in (1, 2, 3):
        (save(models.add(), config.repository, "m", version) / "more").touch()
    with unreadable(folder / "1"), unreadable(folder / "2/model.onnx"), unreadable(folder / "3/more"):
        result = checked_repository(config)
    cause = "cannot be read: Permission denied; let the server's user read it"
    assert [f"{each.place}: {each.text}" for each in result.findings] == [
        f"m/1: {cause}",
        f"m/2: {cause}",
        f"m/3: 'more' {cause}",
    ]


def test_check_notes_files_with_hard_links(tmp_path: Path) -> None:
    for model_id in ("alone", "linked"):
        save(models.add(), tmp_path / "models", model_id)
    for name in ("weights", "model.onnx"):
        (tmp_path / "models/linked/1" / name).touch()
        (tmp_path / name).hardlink_to(tmp_path / "models/linked/1" / name)
    [note] = checked_repository(Config(repository=tmp_path / "models", data=tmp_path)).findings
    assert (note.place, note.code, note.severity) == ("linked/1", "hard_link", NOTE)
    assert note.text.startswith("model.onnx and 1 more have other names (hard links)")


@pytest.mark.parametrize(
    ("model_id", "version", "loadable", "code"),
    [
        ("m", None, ["m/2"], None),
        ("m", 1, ["m/1"], None),
        ("m", 3, [], "unknown_version"),
        ("none", None, [], "unknown_model"),
        ("-", None, [], "invalid_model_id"),
    ],
)
def test_check_takes_the_version_that_is_named(
    model_id: str, version: int | None, loadable: list[str], code: str | None, tmp_path: Path
) -> None:
    config, result = Config(repository=tmp_path, data=tmp_path), CheckResult()
    for number in (1, 2):
        save(models.add(), tmp_path, "m", number)
    taken = check_version(config, result, lambda *_: False, model_id, version)
    assert [each.place for each in taken] == loadable
    assert found(result) == ([] if code is None else [(model_id, code)])
    assert (result.models, result.versions) == (len(loadable), len(loadable))


def test_check_of_versions_finds_their_failed_loads(tmp_path: Path) -> None:
    config = Config(repository=tmp_path, data=tmp_path, memory_budget="400000000", visible_devices="none")
    failing = {
        "out_of_memory": models.memory_bomb_on_load(),
        "timeout": models.endless(),
        "warm_up_failed": models.reshape(),
    }
    for code, model in failing.items():
        save(model, tmp_path, code)
    (tmp_path / "timeout" / "loadledger.toml").write_text("timeout_s = 1\n")
    result = CheckResult()
    check_workers(config, result, check_repository(config, result, lambda *_: False))
    assert found(result) == [(f"{code}/1", code) for code in failing]
    assert not result.loaded


def test_check_says_whether_rows_are_independent(tmp_path: Path) -> None:
    config, history = Config(repository=tmp_path, data=tmp_path), History()
    for model_id, model in {
        "allowed": models.quantised(),
        "earlier": models.quantised(),
        "fixed": models.identity(shape=[3, 4]),
        "independent": models.rows(),
        "quantised": models.quantised(),
        "unbatched": models.quantised(),
        "unknown": models.unfamiliar_rows(),
    }.items():
        save(model, tmp_path, model_id)
        file = "" if model_id == "unbatched" else "max_batch_size = 8\n"
        file += 'dependent_rows = "allow"\n' if model_id == "allowed" else ""
        (tmp_path / model_id / "loadledger.toml").write_text(file)
    history.load("L", of="earlier", max_batch_size=8)
    result = CheckResult()
    left = check_rows(config, result, check_repository(config, result, lambda *_: False), history.state)
    assert [each.model_id for each in left] == ["allowed", "earlier", "independent", "unbatched", "unknown"]
    assert found(result, PROBLEM) == [("fixed/1", "invalid_model"), ("quantised/1", "rows_depend")]
    assert found(result, NOTE) == [
        ("allowed/1", "rows_depend"),
        ("earlier/1", "rows_depend"),
        ("independent/1", "rows_independent"),
        ("unknown/1", "rows_unknown"),
    ]
    texts = {each.place.partition("/")[0]: each.text for each in result.findings}
    for model_id, words in {
        "allowed": ("are joined", "DynamicQuantizeLinear"),
        "earlier": ("are not joined", "DynamicQuantizeLinear", 'dependent_rows = "allow"'),
        "fixed": ("would not load", "'x' has shape [3, 4]"),
        "quantised": ("would not load", "DynamicQuantizeLinear", "max_batch_size = 0"),
        "unknown": (
            "are not joined",
            "MaxpoolWithMask",
            'dependent_rows = "allow" in unknown/loadledger.toml',
        ),
    }.items():
        assert [word for word in words if word not in texts[model_id]] == []


def test_check_folds_the_ledger_of_an_earlier_release_anew(tmp_path: Path) -> None:
    """The models that an earlier release batched are not in the state that its folds have stored."""
    history = History()
    history.load("L", of="earlier", max_batch_size=8)
    path = tmp_path / LEDGER
    with closing(connect(path)) as connection:
        store_events(connection, history.facts)
        connection.execute("DELETE FROM models")
        connection.execute("UPDATE projected SET folds = 8")
        connection.commit()
    result = CheckResult()
    state = read_ledger(Config(repository=tmp_path, data=tmp_path), result)
    assert result.findings == []
    assert state.models["earlier"].may_lose_batches(1)


# The policy for loads

APPROVED = LoadPolicy(approval=(ApprovalRule(("m",)),))


def trust(mode: TrustMode, *globs: str, key: Any = None) -> LoadPolicy:
    return LoadPolicy(trust=(TrustRule(globs, mode, () if key is None else (public_pem(key),)),))


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


def test_check_of_a_policy_that_cannot_be_judged_is_a_problem(tmp_path: Path) -> None:
    save(models.add(), tmp_path / "repository", "m")
    config = Config(repository=tmp_path / "repository", data=tmp_path)
    without_store = judged(replace(config, store_size="off"), APPROVED)
    assert without_store == [("--store-size", "policy_needs_store", "problem")]
    (tmp_path / LEDGER).write_bytes(b"no ledger")
    assert judged(config, APPROVED)[0][::2] == ("--data", "problem")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """A server whose policy demands the approval of one model."""
    async with local_server(tmp_path_factory.mktemp("judged"), policy=APPROVED) as api:
        yield api


async def test_check_reads_signatures_of_repository_and_store(shared: LocalApi) -> None:
    signer, other = make_key(), make_key()
    [file] = shared.save(models.add(), "signed").glob("*.onnx")
    contents = ((file.name, hashlib.sha256(file.read_bytes()).hexdigest()),)
    (file.parents[1] / "1.sig").write_bytes(sign_version(contents, signer))
    await shared.load("signed")

    async def found(key: Any) -> list[tuple[str, str, str]]:
        policy = trust(TrustMode.ENFORCE, "signed", key=key)
        return await asyncio.to_thread(judged, shared.config, policy)

    refused = ("signed/1", "signature_untrusted", "problem")
    assert await found(signer) == [("signed/1", "policy", "note")]
    assert await found(other) == [refused, refused]
    shutil.rmtree(file.parents[1])
    assert await found(signer) == []
    assert await found(other) == [refused]


async def test_check_names_loaded_models_that_a_restart_would_not_load(shared: LocalApi) -> None:
    shared.save(models.add(), "m")
    checked = await shared.app[CONSUMER].check_version("m", 1)
    contents = tuple((file.path, file.sha256) for file in checked.files)
    said = "bob", "reviewed", Credential()
    await shared.app[LOG].submit(ApproveVersion("m", 1, checked.digest, contents, *said))
    await shared.load("m")
    strict = LoadPolicy(approval=(ApprovalRule(("m",), 2),))
    for policy, found in [
        (APPROVED, [("m/1", "policy", "note")]),
        (strict, [("m/1", "not_approved", "problem")]),
        (trust(TrustMode.WARN, "m"), [("m/1", "signature_missing", "note")]),
        (trust(TrustMode.ENFORCE, "m"), [("m/1", "signature_missing", "problem")] * 2),
    ]:
        assert await asyncio.to_thread(judged, shared.config, policy) == found
    result = CheckResult()
    await asyncio.to_thread(check_policy, shared.config, result, read_ledger(shared.config, result))
    hashed, outcomes = result.findings
    assert hashed.text.endswith(" GB of 1 version are hashed, to check the rules for loads")
    assert outcomes.text.endswith("[[approval]] m: no signature is needed; other persons that it needs: 1")
    shared.save(models.add(2), "m", 2)
    back = [("m/2", "not_approved", "problem"), ("m/1", "not_approved", "note")]
    assert await asyncio.to_thread(judged, shared.config, strict) == back


# What was loaded, and what the folders have by now


def test_check_notes_newer_files_than_those_that_stay(tmp_path: Path) -> None:
    async def load_models() -> Config:
        async with local_server(tmp_path, on_demand="on") as api:
            for name in ("away", "loaded", "touched"):
                save(models.add(1), api.config.repository, name)
                await api.load(name)
            await api.unload("away", until_asked=True)
            return api.config

    config = asyncio.run(load_models())
    for name in ("away", "loaded"):
        save(models.add(8), config.repository, name)
    (config.repository / "touched/1/model.onnx").touch()
    for on_demand, expected in (("on", ["away/1", "loaded/1"]), ("off", ["loaded/1"])):
        result = CheckResult()
        check_changes(replace(config, on_demand=on_demand), result, read_ledger(config, result))
        assert found(result, NOTE) == [(place, "newer_files") for place in expected]
        assert "`loadledger load loaded/1` takes the newer ones" in result.findings[-1].text
