"""The command's help reads like a table of contents, and what is thin stays quick to start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.process import clean_environment

from loadledger.cli.completion import _items
from loadledger.cli.main import ALIASES, SECTIONS, Contents, find, main

ROOT = Path(__file__).parents[2]
WIDTH = 80
HEAVY = (
    "aiohttp",
    "onnxruntime",
    "numpy",
    "server",
    "runtime",
    "events",
    "sqlite3",
    "asyncio",
    "cryptography",
)
"""What no command may import that only asks a server or explains itself."""
NOBODY = "http://127.0.0.1:9"


def test_the_help_is_a_table_of_contents_in_which_no_line_is_broken_or_cut_off() -> None:
    text = CliRunner().invoke(main, ["--help"], terminal_width=WIDTH).stdout
    contents = text.partition("Options:")[2].splitlines()
    for title, names in SECTIONS.items():
        begin = contents.index(f"{title}:") + 1
        listed = contents[begin : begin + len(names)]
        assert [line.split()[0] for line in listed] == list(names)
        for line, name in zip(listed, names, strict=True):
            assert line.endswith("."), line
            assert len(line) < WIDTH
            first = (find(name).help or "").partition("\n\n")[0].replace("\n", " ")
            assert line.split(maxsplit=1)[1] == first


@pytest.mark.parametrize(
    ("typed", "usage"), [(["help"], "[OPTIONS] COMMAND"), (["help", "ps"], "models [OPTIONS]")]
)
def test_help_is_a_command_too(typed: list[str], usage: str) -> None:
    result = CliRunner().invoke(main, typed, prog_name="loadledger")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: loadledger {usage}")


@pytest.mark.parametrize("ends_by", [KeyboardInterrupt, click.Abort])
def test_what_ctrl_c_ends_does_not_end_as_if_it_had_found_something(ends_by: type[BaseException]) -> None:
    def end() -> None:
        raise ends_by

    result = CliRunner().invoke(Contents("group", callback=end, invoke_without_command=True), [])
    assert (result.exit_code, result.output) == (130, "")


def test_whose_reader_went_away_ends_quietly_and_as_such() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "loadledger", "completion", "fish"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_shell_is_offered_nothing_that_it_would_run() -> None:
    evil = [("; rm -rf ~", ""), ("$(id)", ""), ("`id`", ""), ("a\nb", "")]
    assert [item.value for item in _items([("m-1.0", "loaded"), *evil], "")] == ["m-1.0"]


def test_a_login_trusts_the_certificates_that_the_other_commands_trust(tmp_path: Path) -> None:
    environment = {"LOADLEDGER_CA": str(tmp_path / "none.pem"), "HOME": str(tmp_path)}
    result = CliRunner().invoke(main, ["login"], input="token\n", env=environment)
    assert result.exit_code == 2
    assert "none.pem" in result.stderr


def every_command() -> dict[str, click.Command]:
    """Return all commands by what is typed."""
    found: dict[str, click.Command] = {}
    for name in (name for names in SECTIONS.values() for name in names):
        command = find(name)
        assert command.name == name
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {each}": inner[each] for each in inner} or {name: command}
    return found


@pytest.mark.parametrize("name", every_command())
def test_every_option_is_explained(name: str) -> None:
    for parameter in every_command()[name].params:
        if isinstance(parameter, click.Option):
            assert (parameter.help or "").endswith((".", "]")), parameter.name


@pytest.mark.parametrize("alias", ALIASES)
def test_words_of_other_tools_lead_to_the_command_that_is_meant(alias: str) -> None:
    result = CliRunner().invoke(main, [alias, "--help"], prog_name="loadledger")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: loadledger {ALIASES[alias][0]} ")


@pytest.mark.parametrize(
    ("typed", "advice"),
    [("modles", "did you mean models"), ("lod", "load"), ("xyzzy", "`loadledger --help` lists them")],
)
def test_a_word_that_is_no_command_is_told_with_those_that_are_like_it(typed: str, advice: str) -> None:
    result = CliRunner().invoke(main, [typed])
    assert (result.exit_code, result.stdout) == (2, "")
    assert advice in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["load", "--help"],
        ["load", "m", "--wait"],
        ["models"],
        ["jobs"],
        ["resources"],
        ["events", "--follow"],
        ["infer", "m", "-i", "x=1"],
        ["top", "--once"],
        ["completion", "zsh"],
    ],
    ids=" ".join,
)
def test_what_is_thin_imports_no_server_no_runtime_and_nothing_heavy(arguments: list[str]) -> None:
    # What is imported is told whatever happens: nobody listens there, so most of these end with 2.
    script = (
        "import atexit, json, sys\n"
        "from loadledger.cli.main import main\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "main(sys.argv[1:], prog_name='loadledger')\n"
    )
    environment = clean_environment() | {"LOADLEDGER_URL": NOBODY, "HOME": "/nowhere"}
    command = [sys.executable, "-P", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    modules = json.loads(done.stderr.splitlines()[-1])
    assert "loadledger.cli.main" in modules
    assert not [name for name in modules if name.partition(".")[0] in HEAVY]
    assert not [name for name in modules if name.startswith("rich")]
