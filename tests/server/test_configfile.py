"""The file of `--config`: what it may say, which place it has, and what is told of a mistake in it."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from loadledger.cli.main import main
from server.config import load_config, settings
from server.configfile import MAX_FILE_BYTES, read_config_file
from server.settings import ConfigError

KNOWN = {setting.name: setting for setting in settings()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    return folder / "server.toml"


def refused(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        read_config_file(file, KNOWN)
    return str(refusal.value)


def test_flags_go_before_the_environment_that_before_the_file_and_that_before_defaults(file: Path) -> None:
    file.write_text('repository = "m"\ndata = "d"\nhost = "file"\nport = 1\nthreads = 2\nmax_loaded = 3\n')
    environment = {"LOADLEDGER_PORT": "4", "LOADLEDGER_THREADS": "5"}
    config = load_config({"config": str(file), "threads": "6"}, environment)
    assert (config.host, config.port, config.threads, config.max_loaded) == ("file", 4, 6, 3)
    assert config.timeout_s == 300


def test_the_file_is_named_by_the_flag_or_else_by_the_variable(file: Path) -> None:
    file.write_text('repository = "m"\ndata = "d"\n')
    other = file.with_name("other.toml")
    other.write_text('repository = "m"\ndata = "other"\n')
    environment = {"LOADLEDGER_CONFIG": str(other)}
    assert load_config({"config": None}, environment).data == file.parent / "other"
    assert load_config({"config": str(file)}, environment).data == file.parent / "d"
    for flags, variables in (({"config": ""}, {}), ({}, {"LOADLEDGER_CONFIG": ""})):
        with pytest.raises(ConfigError, match="LOADLEDGER_CONFIG"):
            load_config(flags, variables)


def test_a_relative_path_is_relative_to_the_file_and_an_absolute_one_is_taken_as_it_is(file: Path) -> None:
    file.write_text('repository = "../models"\ndata = "/var/lib/loadledger"\n')
    values = read_config_file(file, KNOWN)
    assert values == {"repository": file.parent / "../models", "data": Path("/var/lib/loadledger")}


def test_every_setting_can_stand_in_the_file_and_means_what_its_option_means(file: Path) -> None:
    numbers = {float: "0.5", int: "3"}  # which no setting refuses, and none has by default
    flags = {
        setting.name: numbers.get(setting.kind, setting.default)
        for setting in settings()
        if setting.default is not None
    }
    paths = {"repository": "/m", "data": "/d", "tls_cert": "/c", "tls_key": "/k", "jwt_keys": "/j"}
    others = {"jwt_issuer": "https://i", "trusted_proxies": "::1"}
    flags |= paths | others
    file.write_text("".join(f"{name} = {written(name, value)}\n" for name, value in flags.items()))
    assert flags.keys() == KNOWN.keys(), "give those without a default a value here"
    assert load_config({"config": str(file)}, {}) == load_config(flags, {})


def written(name: str, value: object) -> str:
    """Return a value as TOML has it."""
    return f'"{value}"' if KNOWN[name].kind in {str, Path} else str(value)


def test_a_file_may_begin_with_the_mark_that_editors_of_windows_write(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfport = 1\r\nhost = ''\r\n")
    with pytest.raises(ConfigError, match=r"server\.toml:2: host"):
        read_config_file(file, KNOWN)
    file.write_bytes(b"\xef\xbb\xbfport = 1\r\n")
    assert read_config_file(file, KNOWN) == {"port": 1}


def test_a_path_in_the_file_is_written_out(file: Path) -> None:
    assert f"{file}:1: data: '~/x' is refused." in refused(file, 'data = "~/x"\n')


def test_an_empty_file_says_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert read_config_file(file, KNOWN) == {}


def test_whole_numbers_may_stand_for_seconds_and_lines_may_end_as_on_windows(file: Path) -> None:
    file.write_bytes(b"drain_timeout_s = 5\r\nport = 1\r\n")
    assert read_config_file(file, KNOWN) == {"drain_timeout_s": 5.0, "port": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prot = 1", ("no setting 'prot'", "did you mean port?")),
        ("loads-at-once = 1", ("did you mean loads_at_once?",)),
        ('"LOADLEDGER_PORT" = 1', ("did you mean port?",)),
        ("zzzzzzzz = 1", ("loadledger serve --help",)),
        ("[server]\nport = 1", ("no setting 'server'", "under no [table]")),
        ("port = '1'", ("port is the text '1'", "a whole number without quotes")),
        ("port = 1.0", ("port is the number 1.0", "a whole number")),
        ("port = true", ("port is the boolean true", "a whole number")),
        ("port.x = 1", ("port is a table",)),
        ("[[port]]", ("port is a list",)),
        ("port = 1979-05-27", ("port is a date or time",)),
        ("port = 65536", ("port: 65536 is refused",)),
        ("on_demand = true", ("on_demand is the boolean true", 'on_demand = "…"')),
        ("memory_budget = 80", ("memory_budget is the number 80", 'memory_budget = "…"')),
        ("memory_budget = '80'", None),
        ("drain_timeout_s = nan", ("drain_timeout_s: nan is refused",)),
        ("drain_timeout_s = inf", ("drain_timeout_s: inf is refused",)),
        (f"drain_timeout_s = 1{'0' * 400}", ("a number without quotes",)),
        ("data = ''", ("data is the text ''", "a path")),
        ('data = "a\\u0000b"', ("data: 'a\\x00b' is refused", "NUL")),
        ("data = 7", ("data is the number 7",)),
        ("trusted_proxies = ['::1']", ("trusted_proxies is a list",)),
        ("trusted_proxies = '10.0.0.1/8'", ("that is 10.0.0.0/8",)),
    ],
    ids=lambda value: value[:20].replace("\n", " ") if isinstance(value, str) else "",
)  # fmt: skip
def test_a_mistake_is_told_with_file_line_and_what_to_do(
    file: Path, line: str, words: tuple[str, ...] | None
) -> None:
    if words is None:
        file.write_text(line)
        assert len(read_config_file(file, KNOWN)) == 1
        return
    text = refused(file, f"# the first line\nthreads = 1\n\n{line}\n")
    assert text.startswith(f"{file}:4: ")
    for word in words:
        assert word in text


def test_all_mistakes_are_told_at_once_each_with_its_line(file: Path) -> None:
    text = refused(file, "prot = 1\nthreads = 0\nhost = 'here'\nmax_loaded = 'x'\n")
    assert [line.partition(": ")[0] for line in text.splitlines()] == [f"{file}:{n}" for n in (1, 2, 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = \n", (":1: is not TOML",)),
        ("port = 1\nport = 2\n", (":2: is not TOML",)),
        (f"port = {'9' * 5000}\n", ("is not TOML",)),
        (f"port = {'[' * 100_000}\n", ("is not TOML",)),
    ],
    ids=["no value", "twice", "long number", "deep"],
)
def test_what_is_no_toml_is_told_with_the_line_where_it_is_known(
    file: Path, text: str, words: tuple[str, ...]
) -> None:
    said = refused(file, text)
    assert str(file) in said
    for word in words:
        assert word in said


def test_bytes_that_are_no_utf_8_are_told_with_their_line(file: Path) -> None:
    file.write_bytes(b"port = 1\nhost = '\xff'\n")
    with pytest.raises(ConfigError, match=r"server\.toml:2: is not UTF-8"):
        read_config_file(file, KNOWN)


def test_what_is_no_file_or_endless_is_not_read(file: Path) -> None:
    for path in (file, file.parent, Path("/dev/zero"), Path("/dev/stdin\0")):
        with pytest.raises(ConfigError, match="--config"):
            read_config_file(path, KNOWN)
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="more than"):
        read_config_file(file, KNOWN)


@PLAIN
@given(st.text(max_size=60) | st.from_regex(r"[a-z_]{1,12} *= *[0-9a-z\"'\[\]{}.]{0,12}"))
def test_whatever_stands_in_the_file_is_taken_or_told(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    said = outcome(path)
    assert str(path) in said if isinstance(said, str) else said.keys() <= KNOWN.keys()


def outcome(path: Path) -> str | dict[str, object]:
    try:
        return read_config_file(path, KNOWN)
    except ConfigError as error:
        return str(error)


def test_the_command_names_every_mistake_of_the_file_and_starts_nothing(file: Path, tmp_path: Path) -> None:
    file.write_text("prot = 1\nthreads = 0\n")
    for arguments, variables in (([f"--config={file}"], {}), ([], {"LOADLEDGER_CONFIG": str(file)})):
        command = ["serve", f"--repository={tmp_path}", f"--data={tmp_path / 'data'}", *arguments]
        result = CliRunner().invoke(main, command, env=variables)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"loadledger: {file}:1: ")
        assert f"{file}:2: threads" in result.stderr
    assert not (tmp_path / "data").exists()
    said = CliRunner().invoke(main, ["serve", "--help"]).stdout
    assert "--config FILE" in said
    assert "LOADLEDGER_CONFIG" in said


# The documentation


PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(toml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_s_file_is_taken_and_its_mistakes_are_told_as_it_says(file: Path) -> None:
    (_, example), (_, said) = BLOCK.findall(PAGE)
    file.write_text(example)
    assert load_config({"config": file}, {}).on_demand == "on"
    said = said.removeprefix("loadledger: ").replace("/etc/loadledger/server.toml", str(file))
    mistaken = example.replace("port =", "prot =").replace("= 20\n", '= "20"\n')
    assert refused(file, mistaken) == said.rstrip("\n")
