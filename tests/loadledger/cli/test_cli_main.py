"""`loadledger` itself: help, aliases, exit codes, completion, and what the thin commands import."""

import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.clients import every_command, lost_output, printed, refused
from support.connections import odd_server, said
from support.servers import clean_environment

from events.sqlite.datalock import LEDGER
from loadledger.cli.completion import _items
from loadledger.cli.main import ALIASES, EXAMPLES, SECTIONS, CommandGroup, find_command, main
from loadledger.cli.serve import MOST_USED
from loadledger.cli.startup import MAX_FINDINGS, describe_models
from server.check import CheckFinding, CheckResult
from server.config import SECTIONS as SETTINGS
from server.config import settings
from server.configsources import warn_of_unknown_variables

WIDTH = 80
LIMIT_S = 60
PIPE_BYTES = 4096
"""The smallest pipe: less than the help of `serve`."""
HEAVY = {
    *("aiohttp", "onnxruntime", "numpy", "server", "runtime", "events"),
    *("sqlite3", "asyncio", "cryptography", "rich"),
}
"""What no command may import that only asks a server or explains itself."""
LIGHT = {"events", "events.eventtext"}
"""Of these packages, what needs the standard library only."""


@pytest.mark.parametrize("command", ["", "key", "token", *every_command()])
def test_help_explains_command_and_options_with_examples(command: str) -> None:
    text = printed(*command.split(), "--help")
    assert text.startswith("Usage: ")
    assert text == printed(*command.split(), "-h")
    options = every_command()[command].params if command in every_command() else []
    for parameter in options:
        if isinstance(parameter, click.Option):
            assert (parameter.help or "").endswith((".", "]")), parameter.name
    if not command:
        return
    lines = text.splitlines()
    shown = lines[lines.index("  Examples:") + 1 :]
    assert len(shown) == (1 if command == "demo" else 2)  # it takes nothing
    for line in shown:
        assert f"{line.strip()} ".startswith(f"loadledger {command} ")


@pytest.mark.parametrize("line", EXAMPLES.read_text(encoding="utf-8").splitlines())
def test_example_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "digits.onnx").touch()
    (tmp_path / "data").mkdir()
    program, name, *words = shlex.split(line)
    command = find_command(name)
    if isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    parent = click.Context(main, info_name=program, **main.context_settings)
    assert not command.make_context(name, words, parent=parent).args


def test_help_lists_commands_in_sections_on_whole_lines() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=WIDTH).stdout
    contents = text.partition("Options:")[2].splitlines()
    for title, names in SECTIONS.items():
        begin = contents.index(f"{title}:") + 1
        listed = contents[begin : begin + len(names)]
        assert [line.split()[0] for line in listed] == list(names)
        for line, name in zip(listed, names, strict=True):
            assert line.endswith("."), line
            assert len(line) < WIDTH
            first = (find_command(name).help or "").partition("\n\n")[0].replace("\n", " ")
            assert line.split(maxsplit=1)[1] == first


def test_settings_are_each_in_one_section() -> None:
    listed = [name for names in SETTINGS.values() for name in names]
    assert sorted(listed) == sorted(setting.name for setting in settings())


@pytest.mark.parametrize("command", ["serve", "check"])
def test_help_of_serve_has_used_settings_and_all_of_them(command: str) -> None:
    text = printed(command, "--help")
    listed = {setting.name for setting in settings() if f"  {setting.flag} " in text}
    assert listed == MOST_USED
    assert "--help-all" in text
    text = "".join(printed(command, "--help-all").split())
    for setting in settings():
        assert setting.flag in text
        default = "no default" if setting.default is None else f"default: {setting.default}"
        assert f"[{setting.variable};{default}]".replace(" ", "") in text


@pytest.mark.parametrize(
    ("typed", "usage"),
    [
        ("help", "[OPTIONS] COMMAND"),
        ("help ps", "models [OPTIONS]"),
        *((f"{alias} --help", f"{ALIASES[alias][0]} ") for alias in ALIASES),
    ],
)
def test_alias_leads_to_command(typed: str, usage: str) -> None:
    assert printed(*typed.split()).startswith(f"Usage: loadledger {usage}")


def test_version_is_printed() -> None:
    assert re.search(r"\d+\.\d+\.\d+", printed("--version"))


@pytest.mark.parametrize("ends_by", [KeyboardInterrupt, click.Abort])
def test_interrupt_ends_with_130(ends_by: type[BaseException]) -> None:
    def end() -> None:
        raise ends_by

    result = CliRunner().invoke(CommandGroup("group", callback=end, invoke_without_command=True), [])
    assert (result.exit_code, result.output) == (130, "")


LOST = [
    # where the output goes; exit code and stderr, as of `cat`
    ("pipe", 141, b""),
    ("/dev/full", 1, b"loadledger: write error: No space left on device\n"),
]


@pytest.mark.parametrize(("place", "code", "said"), LOST)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("typed", ["--help", "--version", "show --help", "completion fish"])
def test_lost_output_ends_a_command_as_cat(
    typed: str, unbuffered: str, place: str, code: int, said: bytes
) -> None:
    with lost_output(place) as output:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "loadledger", *typed.split()],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (code, said)


def test_output_is_whole_after_interrupted_write() -> None:
    """An unbuffered standard output of Python does not write the rest after a short write."""
    command = [sys.executable, "-m", "loadledger", "serve", "--help-all"]
    environment = {**clean_environment(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        size = fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        while struct.unpack("i", fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)))[0] < size:
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        process.send_signal(signal.SIGCONT)
        output = process.communicate(timeout=LIMIT_S)[0]
    told, expected = (text.partition("\n")[2] for text in (output.decode(), printed("serve", "--help-all")))
    assert "".join(told.split()) == "".join(expected.split())  # their lines are not as wide


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_shell_script(shell: str) -> None:
    script = printed("completion", shell)
    assert "_LOADLEDGER_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_completion_offers_nothing_that_a_shell_would_run() -> None:
    evil = [("; rm -rf ~", ""), ("$(id)", ""), ("`id`", ""), ("a\nb", "")]
    assert [item.value for item in _items([("m-1.0", "loaded"), *evil], "")] == ["m-1.0"]


THIN = (
    *("--help", "load --help", "load m --wait", "models", "jobs", "resources", "events --follow"),
    *("infer m x=1", "top", "completion zsh"),
)
OF_FILES = ("key list", "key ledger", "verify")
IMPORTS = """
import contextlib, json, sys
from loadledger.cli.main import main
seen = {}
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main(line.split(), prog_name="loadledger")
    seen[line] = sorted(sys.modules)
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The modules that are imported once each command has ended; one process runs one after the other."""
    of_files = [f"{line} --data={tmp_path_factory.mktemp('data')}" for line in OF_FILES]
    environment = clean_environment() | {"LOADLEDGER_URL": "http://127.0.0.1:9", "HOME": "/nowhere"}
    command = [sys.executable, "-P", "-c", IMPORTS, *THIN, *of_files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    found = json.loads(done.stderr.splitlines()[-1])
    return {line.partition(" --data=")[0]: set(names) for line, names in found.items()}


def test_thin_commands_import_nothing_heavy(imported: dict[str, set[str]]) -> None:
    heavy = {
        line: {name for name in imported[line] - LIGHT if name.partition(".")[0] in HEAVY} for line in THIN
    }
    assert heavy == {line: set() for line in THIN}
    assert "loadledger.transports.blocking" in imported[THIN[-1]]  # they did what they do


def test_commands_of_files_import_no_web_framework(imported: dict[str, set[str]]) -> None:
    assert "server.auth.keys" in imported[OF_FILES[0]]
    assert not {"aiohttp", "aiohttp_apispec", "onnxruntime"} & imported[OF_FILES[-1]]


# serve


def test_unknown_variables_are_one_warning_without_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("LOADLEDGER_PROT", "LOADLEDGER_ZZZZZZZZ\n"):
        monkeypatch.setenv(name, "secret")
    warn_of_unknown_variables(os.environ)
    [warning] = caplog.messages
    assert "LOADLEDGER_PROT: did you mean LOADLEDGER_PORT?; LOADLEDGER_ZZZZZZZZ\n: " in warning
    assert "secret" not in warning


def test_report_at_start_says_what_is_wrong_and_next() -> None:
    assert list(describe_models(Path("/models"), CheckResult()))[::2] == ["models: none in /models"]
    wrong = [CheckFinding(f"m{number}", "not_served", "has no version") for number in range(25)]
    [counted, *findings, more, following] = describe_models(
        Path("/models"), CheckResult(models=1, versions=2, findings=wrong)
    )
    assert counted == "models: 1 model with 2 versions in /models"
    assert len(findings) == MAX_FINDINGS
    assert click.unstyle(findings[0]) == "problem: m0: has no version (not_served)"
    assert more.startswith("5 more: ")
    assert "loadledger load MODEL" in following


def test_serve_refuses_unreadable_configuration_file_in_one_line(tmp_path: Path) -> None:
    reason = refused("serve", f"--config={'x' * 300}", "--repository=a\nb", f"--data={tmp_path}")
    first, _ = reason.splitlines()
    assert first.startswith("loadledger: --config: ")
    assert "File name too long" in first
    assert "Errno" not in reason


@pytest.mark.parametrize("command", ["serve", "serve --host localhost", "run model.onnx"])
def test_start_on_taken_port_is_refused_and_not_recorded(tmp_path: Path, command: str) -> None:
    (tmp_path / "model.onnx").touch()
    places = {"HOME": str(tmp_path), "LOADLEDGER_DATA": "data", "LOADLEDGER_REPOSITORY": "."}
    with odd_server(*[said(b"<html>It works!</html>", media_type="text/html")] * 2) as taken:
        port = taken.url.rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "loadledger", *command.split()],
            env=clean_environment() | places | {"LOADLEDGER_PORT": port},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    cure = f"{port}: address already in use: stop what uses it, or choose another --port (LOADLEDGER_PORT)"
    assert re.search(rf"^loadledger: (127\.0\.0\.1|localhost):{re.escape(cure)}$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "data" / LEDGER).stat().st_size == 0
