"""`loadledger check`: says what is wrong with a configuration or a repository before it is served."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import models
from support.models import save, save_bytes

from loadledger.cli.main import main
from server.config import settings

NOTHING = dict.fromkeys([*(setting.variable for setting in settings()), "LOADLEDGER_CONFIG"])


def run(*arguments: str, **environment: str) -> Result:
    result = CliRunner().invoke(main, ["check", "--port=0", *arguments], env={**NOTHING, **environment})
    assert "Traceback" not in result.output
    return result


def found(*arguments: str) -> list[tuple[str, str]]:
    """Return where what was found, problems only; the exit code has to say the same."""
    result = run(*arguments, "--json")
    told = json.loads(result.stdout)
    problems = [each for each in told["findings"] if each["severity"] == "problem"]
    assert (result.exit_code, told["fine"]) == ((1, False) if problems else (0, True))
    return [(each["place"], each["code"]) for each in problems]


def test_a_repository_that_is_fine_is_loaded_and_that_is_said(tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    save(models.add(), tmp_path, "m", 2)
    result = run(f"--repository={tmp_path}")
    assert (result.exit_code, result.stdout) == (0, "1 model, 2 versions, 2 of them loaded: no problems\n")
    quick = run(f"--repository={tmp_path}", "--quick")
    assert (quick.exit_code, quick.stdout) == (0, "1 model, 2 versions: no problems\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_what_a_load_would_come_to_is_found_by_loading(tmp_path: Path) -> None:
    save(models.unknown_operator(), tmp_path, "bad")
    save_bytes(b"text", tmp_path, "text")
    save(models.external("../../secret"), tmp_path, "outside")
    save(models.crash_on_load(), tmp_path, "crash")
    save(models.memory_bomb_on_load(), tmp_path, "bomb")
    save(models.reshape(), tmp_path, "unwarmed")
    save(models.add(), tmp_path, "good")
    said = found(f"--repository={tmp_path}", "--memory-budget=400000000")
    assert said == [
        ("bad/1", "invalid_model"),
        ("bomb/1", "out_of_memory"),
        ("crash/1", "worker_died"),
        ("outside/1", "unsafe_file"),
        ("text/1", "invalid_model"),
        ("unwarmed/1", "warm_up_failed"),
    ]
    assert found(f"--repository={tmp_path}", "--quick") == []


def test_a_model_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    save(models.endless(), tmp_path, "endless")
    assert found(f"--repository={tmp_path}", "--limit-s=0.5") == [("endless/1", "timeout")]


def test_what_the_files_show_is_found_without_loading(tmp_path: Path) -> None:
    save(models.weights(4), tmp_path, "large")
    save(models.add(), tmp_path, "parameters")
    (tmp_path / "parameters" / "loadledger.toml").write_text('instances = "two"\n')
    save(models.add(), tmp_path, "delay")
    (tmp_path / "delay" / "loadledger.toml").write_text("max_queue_delay_us = 5\n")
    (tmp_path / "empty").mkdir()
    said = found(f"--repository={tmp_path}", "--quick", "--memory-budget=9000000")
    assert said == [
        ("empty", "not_served"),
        ("delay/loadledger.toml", "invalid_defaults"),
        ("large/1", "insufficient_memory"),
        ("parameters/loadledger.toml", "invalid_defaults"),
    ]


def test_all_that_is_wrong_with_a_configuration_is_told_and_not_the_first_of_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('strategy = "sideways"\nloads = 1\n')
    arguments = (f"--repository={tmp_path / 'none'}", "--evict=all", "--threads=0", f"--config={file}")
    told = run(*arguments).stdout
    for words in ("--evict", "--threads", "config.toml:1", "config.toml:2", "none' is not a directory"):
        assert words in told
    assert "5 problems" in told
    assert [code for _, code in found(*arguments)] == ["invalid_setting"] * 5


def test_settings_come_from_the_file_and_the_variables_as_of_serve(tmp_path: Path) -> None:
    save(models.add(), tmp_path / "repository", "m")
    file = tmp_path / "config.toml"
    file.write_text('repository = "repository"\n')
    result = run("--quick", LOADLEDGER_CONFIG=str(file))
    assert (result.exit_code, result.stdout) == (0, "1 model, 1 version: no problems\n")
    assert run("--quick", LOADLEDGER_REPOSITORY=str(tmp_path / "repository")).exit_code == 0


def test_the_address_the_data_and_the_budget_are_looked_at(tmp_path: Path) -> None:
    root = ("--quick", f"--repository={tmp_path}")
    assert ("--host", "no_address") in found(*root, "--host=host.invalid")
    assert ("--port", "no_address") in found(*root, "--host=192.0.2.1")
    (tmp_path / "file").touch()
    assert [place for place, _ in found(*root, f"--data={tmp_path / 'file'}")] == ["--data"]
    assert "beyond_limit" in run(*root, "--memory-budget=999999999999999").stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(*root, f"--port={taken.getsockname()[1]}")
    assert result.exit_code == 0
    assert "note: --port: 127.0.0.1:" in result.stdout


def test_paths_that_cannot_be_looked_at_are_told_and_the_rest_is_checked_all_the_same(tmp_path: Path) -> None:
    save(models.add(), tmp_path / "root", "m")
    root, long = f"--repository={tmp_path / 'root'}", str(tmp_path / ("x" * 300))
    assert found("--quick", root, f"--data={long}") == [("--data", "invalid_setting")]
    both = f"--jwt-keys={long}", f"--data={long}"
    assert [place for place, _ in found("--quick", root, *both)] == ["--data", "--jwt-keys"]
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(odd).mkdir()
    assert found("--quick", f"--repository={odd}") == [("--repository", "invalid_setting")]
    (tmp_path / "link").symlink_to(odd)
    assert found("--quick", f"--repository={tmp_path / 'link'}") == [("--repository", "invalid_setting")]


def test_variables_that_nothing_reads_are_noted_with_those_that_are_meant(tmp_path: Path) -> None:
    variables = {"LOADLEDGER_PROT": "1", "LOADLEDGER_TOKEN": "t", "LOADLEDGER_X_SERVICE_HOST": "10.0.0.1"}
    result = run("--quick", f"--repository={tmp_path}", **variables)
    assert result.exit_code == 0
    assert "note: LOADLEDGER_PROT: nothing reads it; did you mean LOADLEDGER_PORT? (unknown" in result.stdout
    assert result.stdout.count("LOADLEDGER_") == 2


def test_what_an_encoding_lacks_is_no_error_and_a_dumb_terminal_gets_no_colours(tmp_path: Path) -> None:
    (tmp_path / "…x.onnx").touch()
    arguments = ["check", "--quick", "--port=0", f"--repository={tmp_path}"]
    result = CliRunner(charset="latin-1").invoke(main, arguments, env=NOTHING, color=True)
    assert (result.exit_code, "?x.onnx" in result.stdout, "\x1b" in result.stdout) == (0, True, True)
    result = CliRunner().invoke(main, arguments, env={**NOTHING, "TERM": "dumb"}, color=True)
    assert (result.exit_code, "\x1b" in result.stdout) == (0, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="takes a user that may not read everything, and this is root")
def test_a_data_directory_or_repository_that_may_not_be_used_is_told(tmp_path: Path) -> None:
    root, data = tmp_path / "repository", tmp_path / "data"
    root.mkdir(mode=0o300)
    data.mkdir(mode=0o500)
    said = dict(found("--quick", f"--repository={root}", f"--data={data}"))
    assert said == {"--data": "invalid_setting", "--repository": "unreadable"}


def test_without_a_repository_there_is_nothing_to_check() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "LOADLEDGER_REPOSITORY" in result.stderr
    nothing: Any = run("--nope")
    assert nothing.exit_code == 2
