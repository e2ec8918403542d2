"""Settings: their sources, valid values, and the messages about invalid ones."""

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from loadledger import profiles
from loadledger.cli.main import SECTIONS, find_command, main
from runtime.uploads.staging import UploadPolicy
from server.check import find_unusable_paths, load_config
from server.config import (
    Config,
    ConfigError,
    parse_budget,
    parse_limit,
    parse_size,
    parse_store_size,
    settings,
)
from server.configsources import CONFIG_VARIABLE, OF_OTHERS, read_settings, unknown_variables

ROOT = Path(__file__).parents[2]
REQUIRED = ("repository", "data")
VALUES = {
    "ledger": "postgresql://server@db.example,other.example:5433/ledger", "node_name": "a-1",
    "node_address": "http://a.example:8080", "node_attributes": "gpu=none,zone=a",
    "lease_s": "3.0", "when_away": "stop",
    "repository": "/models", "data": "/data", "host": "::1", "port": "0", "grpc_port": "8001",
    "tls_cert": "/cert.pem", "tls_key": "/key.pem", "trusted_proxies": "10.0.0.0/8,::1",
    "threads": "2", "drain_timeout_s": "0.5", "inference_timeout_s": "1.5",
    "devices": "cuda:*,cpu", "device_memory": "cuda:0=20GB,cuda:1=50%",
    "visible_devices": "cuda:1,openvino:*", "memory_budget": "12.5%",
    "max_loaded": "4", "evict": "idle", "min_residency_s": "0.5",
    "keep_alive_s": "90", "on_demand": "on",
    "confine": "require-cpu", "restore": "none",
    "ledger_stderr": "off",
    "store_size": "5TB", "max_request_size": "128MiB",
    "repository_writable": "off",
    "idle_timeout_s": "650.0", "log_format": "json", "log_level": "warning",
    "trace_inferences": "1.0", "metrics": "open", "jwt_audience": "a",
    "jwt_issuer": "https://issuer", "jwt_keys": "/keys.json", "jwt_roles_claim": "groups",
    "limit_management": "1/second", "limit_inference": "7 per 2 minutes",
}  # fmt: skip
"""A valid value for each setting, other than its default."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def mistakes(flags: dict[str, Any], environment: dict[str, str] | None = None) -> list[str]:
    """Return a line for each invalid value."""
    return [f"{place}: {text}" for place, text in read_settings(flags, environment or {})[1]]


# Sources


def test_option_then_variable_then_file_then_default(file: Path) -> None:
    file.write_text('host = "file"\nport = 1\nthreads = 2\n')
    environment = {"LOADLEDGER_CONFIG": str(file), "LOADLEDGER_PORT": "4", "LOADLEDGER_THREADS": "5"}
    values, wrong = read_settings({"threads": "6", "port": None}, environment)
    assert not wrong
    found = tuple(values[name] for name in ("host", "port", "threads", "lease_s"))
    assert found == ("file", 4, 6, 10)
    other = file.with_name("other.toml")
    other.write_text("port = 7")
    values, _ = read_settings({"config": str(other)}, {"LOADLEDGER_CONFIG": str(file)})
    assert (values["host"], values["port"]) == ("127.0.0.1", 7)


def test_every_setting_comes_from_each_source(file: Path) -> None:
    kinds = {setting.name: setting.kind for setting in settings()}
    text = (
        f'{name} = "{value}"' if kinds[name] in {str, Path} else f"{name} = {value}"
        for name, value in VALUES.items()
    )
    file.write_text("\n".join(text))
    variables = {f"LOADLEDGER_{name.upper()}": value for name, value in VALUES.items()}
    for flags, environment in ((VALUES, {}), ({}, variables), ({"config": str(file)}, {})):
        values, wrong = read_settings(flags, environment)
        assert not wrong
        assert {name: str(value) for name, value in values.items()} == VALUES
        assert Config(**values).port == values["port"]


def test_relative_path_in_file_is_relative_to_file(file: Path) -> None:
    file.write_text('repository = "../models"\ndata = "/var/lib/loadledger"\n')
    values, _ = read_settings({"config": str(file), "jwt_keys": "keys.json"}, {})
    assert values["repository"] == file.parent / "../models"
    assert values["data"] == Path("/var/lib/loadledger")
    assert values["jwt_keys"] == Path("keys.json")


def test_file_is_utf_8_with_any_bom_and_line_ends(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfport = 1\r\nhost = ''\r\ndrain_timeout_s = 5\r\n")
    values, [wrong] = read_settings({"config": str(file)}, {})
    assert (values["port"], values["drain_timeout_s"]) == (1, 5.0)
    assert wrong.place == f"{file}:2: host"
    file.write_bytes(b"port = 1\nhost = '\xff'\n")
    [said] = mistakes({"config": str(file)})
    assert f"'{file}' is not TOML: 'utf-8' codec can't decode" in said


# Values


REFUSED = {
    "ledger": "ledger.db postgresql:// mysql://a/b", "node_name": "a/b -a \u00e4", "lease_s": "0 nan",
    "node_address": "a:8080 http:// http://a/b ftp://a", "node_attributes": "zone zone= =a a=b=c",
    "when_away": "die",
    "port": "65536 -1 http 8080.5 tcp://10.0.0.1:8080", "threads": "-1 1025 auto",
    "drain_timeout_s": "-1 nan", "inference_timeout_s": "0 inf",
    "limit_inference": "many 0/minute 1/second;10/minute 1/eon 1/minutely OFF", "max_loaded": "-1 1.5",
    "memory_budget": "0 -1 0.0% 100.1% 80_% 1.5 8gb nan% " + "9" * 5000,
    "visible_devices": "ALL cuda *",
    "evict": "on", "min_residency_s": "-1 nan", "keep_alive_s": "-2 31536001 1.5",
    "on_demand": "1",
    "confine": "on", "restore": "off", "ledger_stderr": "none",
    "store_size": "0 0GB -1 1.5GB 1gb Auto Off", "max_request_size": "0 64mib 3GB 2147483649",
    "idle_timeout_s": "nan", "log_format": "JSON", "log_level": "INFO",
    "trace_inferences": "-0.1 1.1 nan", "metrics": "off",
    "jwt_issuer": "a\x07b", "trusted_proxies": "10.0.0.1/8 proxy ::/0 10.0.0.1,",
    "data": "~/ledger ~", "tls_cert": "~/x",
}  # fmt: skip
"""By setting; the empty text, too, which no setting takes."""


@pytest.mark.parametrize("name", [setting.name for setting in settings()])
def test_invalid_value_is_refused_from_each_source(name: str) -> None:
    variable, flag = f"LOADLEDGER_{name.upper()}", f"--{name.replace('_', '-')}"
    for value in ["", *REFUSED.get(name, "").split()]:
        [of_variable] = mistakes({}, {variable: value})
        [of_flag] = mistakes({name: value})
        assert re.match(rf"{variable}: '.* is refused\. .+\.$", of_variable), of_variable
        assert of_flag.startswith(f"{flag}: {value!r:.80} is refused. ")


def test_value_at_the_limit_is_taken() -> None:
    for name, values in {
        "memory_budget": ("1", "8589934592", "8GB", "100%", "0.5%"), "max_loaded": (0,),
        "min_residency_s": (0,),
        "keep_alive_s": (-1, 0, 31536000),
        "max_request_size": ("1", "2GiB"),
        "trace_inferences": (0, 1), "threads": (0, 1024),
    }.items():  # fmt: skip
        for value in values:
            assert read_settings({name: str(value)}, {})[0][name] == value


def test_zero_threads_and_loads_mean_one_for_each_cpu(tmp_path: Path) -> None:
    automatic = Config(repository=tmp_path, data=tmp_path)
    assert (automatic.model_threads(3), automatic.max_loads(3)) == (3, 3)
    chosen = Config(repository=tmp_path, data=tmp_path, threads=8, loads_at_once=1)
    assert (chosen.model_threads(3), chosen.max_loads(3)) == (8, 1)


def test_sizes_and_rate_limits_have_units() -> None:
    sizes = {
        "1": 1, "20GB": 20 * 10**9, "3MB": 3 * 10**6, "2TB": 2 * 10**12, "5MiB": 5 * 2**20, "1GiB": 2**30,
        "007TiB": 7 * 2**40,
    }  # fmt: skip
    assert {text: parse_size(text) for text in sizes} == sizes
    assert {text: parse_store_size(text) for text in sizes} == sizes
    assert (parse_store_size("auto"), parse_store_size("off")) == (None, 0)
    limits = {
        "600/minute": (600, 60), "1/second": (1, 1), "7 per 2 minutes": (7, 120), "5/Hour": (5, 3600),
        "9 / 3 days": (9, 259_200), "off": None,
    }  # fmt: skip
    assert {text: parse_limit(text) for text in limits} == limits


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"store_size": "0"}, {}, "like 20GB, auto, or off"),
        ({}, {"LOADLEDGER_PORT": "tcp://10.0.0.1:8080"}, "enableServiceLinks: false"),
        ({"trusted_proxies": "10.0.0.1/8"}, {}, "that is 10.0.0.0/8"),
        ({"config": ""}, {}, "--config: '' cannot be read"),
        ({"config": "/dev/stdin\0"}, {}, "--config"),
        ({}, {"LOADLEDGER_CONFIG": "/nowhere"}, "LOADLEDGER_CONFIG: '/nowhere' cannot be read: No such file"),
    ],
)
def test_refusal_says_what_to_do(flags: dict[str, str], environment: dict[str, str], words: str) -> None:
    assert words in "\n".join(mistakes(flags, environment))


# The file


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prot = 1", "prot: there is no such setting; did you mean port?"),
        ("limit-inference = 1", "did you mean limit_inference?"),
        ('"LOADLEDGER_PORT" = 1', "did you mean port?"),
        ("limit_inference_per_address = 9", "did you mean limit_inference?"),
        ("zzzzzzzz = 1", "loadledger serve --help-all"),
        ("[server]\nport = 1", "server: there is no such setting; settings stand at the top"),
        ("port = '1'", "port: '1' is refused. Must be a whole number without quotes."),
        ("port = 1.0", "port: 1.0 is refused. Must be a whole number"),
        ("port = true", "port: True is refused. Must be a whole number"),
        ("port.x = 1", "port: {'x': 1} is refused."),
        ("[[port]]", "port: [{}] is refused."),
        ("port = 1979-05-27", "port: datetime.date(1979, 5, 27) is refused."),
        ("port = 65536", "port: 65536 is refused. Must be greater than or equal to 0 and less"),
        ("on_demand = true", "on_demand: True is refused. Must be text in quotes."),
        ("memory_budget = 80", "Must be text in quotes."),
        ("drain_timeout_s = nan", "drain_timeout_s: nan is refused. Special numeric values"),
        (f"drain_timeout_s = 1{'0' * 400}", "Number too large."),
        ("data = ''", "data: '' is refused. Must name a path"),
        ('data = "~/x"', "data: '~/x' is refused. Must name a path in full"),
        ("data = 7", "Must be a path in quotes."),
        ("port = ", "is not TOML: Invalid value (at line 4"),
        (f"port = {'[' * 100_000}", "is not TOML: "),
    ],
)
def test_refusal_names_line_and_key_of_file(file: Path, line: str, words: str) -> None:
    file.write_text(f"# the first line\nthreads = 1\n\n{line}\n")
    [said] = mistakes({"config": str(file)})
    assert words in said
    assert said.startswith(f"{file}:4: ") or "TOML" in said


# All at once


def test_mistakes_of_all_sources_are_reported_at_once(file: Path, tmp_path: Path) -> None:
    file.write_text("prot = 1\nmax_loaded = 'x'\n")
    command = ["serve", f"--data={tmp_path / 'data'}", f"--repository={tmp_path / 'none'}", "--threads=-1"]
    environment = {"LOADLEDGER_CONFIG": str(file), "LOADLEDGER_EVICT": "all"}
    result = CliRunner().invoke(main, [*command, "--tls-cert=x"], env=environment)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.findall(r"^(?:loadledger: )?(.+?): ", result.stderr, re.MULTILINE) == [
        f"{file}:1", f"{file}:2", "LOADLEDGER_EVICT", "--threads", "--repository", "--tls-cert",
    ]  # fmt: skip
    assert not (tmp_path / "data").exists()


def test_missing_setting_says_each_way_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config({}, {})
    lines = str(refusal.value).splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, REQUIRED, strict=True):
        assert line.startswith(
            f"--{name}: is missing, and there is no HOME: "
            f"give it or set LOADLEDGER_{name.upper()}, or {name} in"
        )
    config = load_config({"repository": str(tmp_path), "data": str(tmp_path / "new")}, {})
    assert config == Config(repository=tmp_path, data=tmp_path / "new")


@pytest.mark.parametrize(
    ("variable", "below"), [("HOME", ".local/share/loadledger"), ("XDG_DATA_HOME", "loadledger")]
)
def test_user_has_own_directories_by_default(tmp_path: Path, variable: str, below: str) -> None:
    config = load_config({}, {"HOME": "/nowhere", variable: str(tmp_path)})
    own = tmp_path / below
    assert (config.repository, config.data) == (own / "models", own / "data")
    assert config.repository.is_dir()  # and the data directory is the server's to create


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("repository", "none", "none' is not a directory; create it"),
        ("repository", "file", "file' is not a directory; create it"),
        ("repository", "x" * 300, "cannot be read: File name too long; name another"),
        ("repository", "a\0b", "'a\\x00b' cannot be read: "),
        ("repository", "a\udcff", "'a\\udcff' cannot be read: 'utf-8' codec can't encode"),
        ("data", "file", "file is not a directory; name another"),
        ("data", "file/data", "Not a directory; name another"),
        ("data", "loop", "Too many levels of symbolic links; name another"),
        ("jwt_keys", "file", "must hold one public key"),
        ("jwt_keys", "none", "No such file or directory; name another"),
        ("tls_key", "x", "--tls-key: is given alone: HTTPS takes --tls-cert, too"),
        ("tls_cert", "x", "--tls-cert: is given alone: HTTPS takes --tls-key, too"),
    ],
)
def test_unusable_path_is_named(tmp_path: Path, name: str, path: str, words: str) -> None:
    (tmp_path / "file").write_text("no keys")
    (tmp_path / "loop").symlink_to("loop")
    flags = {"repository": str(tmp_path), "data": str(tmp_path / "new")}
    chosen = path if "\0" in path or "\udcff" in path else str(tmp_path / path)
    values, _ = read_settings({**flags, name: chosen}, {})
    [wrong] = find_unusable_paths(values)
    assert words in f"{wrong.place}: {wrong.text}"
    assert wrong.place == f"--{name.replace('_', '-')}"
    assert len(wrong.text) < 350


# Unknown variables


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LOADLEDGER_PROT", "did you mean LOADLEDGER_PORT?"),
        ("LOADLEDGER_REPO", "did you mean LOADLEDGER_REPOSITORY?"),
        ("LOADLEDGER_on_demand", "did you mean LOADLEDGER_ON_DEMAND?"),
        ("LOADLEDGER_TOKENS", "did you mean LOADLEDGER_TOKEN?"),
        ("LOADLEDGER_LIMIT_INFERENCE_PER_PEER", "did you mean LOADLEDGER_LIMIT_INFERENCE?"),
        ("LOADLEDGER_ZZZZZZZZ", "`loadledger serve --help-all` lists the settings"),
        ("LOADLEDGER_", "`loadledger serve --help-all` lists the settings"),
    ],
)
def test_unknown_variable_is_named_with_a_suggestion(name: str, advice: str) -> None:
    [found] = unknown_variables({name: "a secret", "PATH": "/bin", "LOADLEDGERS": "1"})
    assert found == (name, advice)


def test_variables_of_commands_and_compose_are_known() -> None:
    read = {profiles.URL, profiles.TOKEN, profiles.CA, profiles.PROFILE, CONFIG_VARIABLE}
    for name in (name for names in SECTIONS.values() for name in names):
        command = find_command(name)
        for each in [command, *(command.commands.values() if isinstance(command, click.Group) else ())]:
            read |= {str(parameter.envvar) for parameter in each.params if parameter.envvar}
    compose = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    read |= set(re.findall("LOADLEDGER_[A-Z_]+", compose))
    assert read >= OF_OTHERS
    read |= {setting.variable for setting in settings()}
    assert list(unknown_variables(dict.fromkeys(read, "x"))) == []


def test_service_links_of_kubernetes_are_known() -> None:
    address = "tcp://10.0.0.1:8080"
    service = {
        "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "8080", "SERVICE_PORT_HTTP_V1": "8080", "PORT": address,
        "PORT_8080_TCP": address, "PORT_8080_TCP_PROTO": "tcp", "PORT_8080_TCP_PORT": "8080",
        "PORT_53_UDP_ADDR": "10.0.0.1",
    }  # fmt: skip
    for name in ("LOADLEDGER", "LOADLEDGER_CANARY_2"):
        assert not list(unknown_variables({f"{name}_{key}": value for key, value in service.items()}))
    [(unknown, _)] = unknown_variables({"LOADLEDGER_HTTP_PORT": "8080"})
    assert unknown == "LOADLEDGER_HTTP_PORT"


# The documentation


PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(toml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_documented_example_and_its_mistakes_are_true(file: Path) -> None:
    (_, example), (_, shown) = BLOCK.findall(PAGE)
    file.write_text(example)
    values, wrong = read_settings({"config": str(file)}, {})
    assert (values["on_demand"], wrong) == ("on", [])
    file.write_text(example.replace("port =", "prot =").replace("= 20\n", '= "20"\n'))
    shown = shown.removeprefix("loadledger: ").replace("/etc/loadledger/server.toml", str(file))
    assert mistakes({"config": str(file)}) == shown.splitlines()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("80%", 800), ("100%", 1000), ("100.000%", 1000), ("12.5%", 125), ("0.1%", 1), ("33.3%", 333),
        ("0.000000001%", 1), ("080%", 800), ("1", 1), ("1000", 1000), ("8589934592", 8589934592),
        ("9" * 18, 10**18 - 1), ("8GB", 8 * 10**9), ("2GiB", 2**31),
    ],
)  # fmt: skip
def test_budget_is_a_size_or_a_percentage(setting: str, expected: int) -> None:
    assert parse_budget(setting, limit_bytes=1000) == expected


@pytest.mark.parametrize(
    "setting",
    [
        "", "0", "-1", "+1", "1.5", "1e9", "8gb", "9" * 19, " 1", "1\n", "0%", "0.0%", "100.1%", "101%",
        "1000%", "-5%", "nan%", "inf%", "%", ".5%", "5.%", "80 %", "80%\n", "80%%", "\u0661%", "\u0661",
        "1_000", "0x10",
    ],
)  # fmt: skip
def test_other_budget_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"Must be (bytes, or a number of MB.* like 80%|a percentage)"):
        parse_budget(setting, limit_bytes=1000)


@PLAIN
@given(limit=st.integers(1, 2**62), thousandths=st.integers(1, 100_000))
def test_percentage_is_exact_and_within_the_limit(limit: int, thousandths: int) -> None:
    budget = parse_budget(f"{thousandths // 1000}.{thousandths % 1000:03}%", limit)
    assert budget == max(1, limit * thousandths // 100_000)
    assert budget <= limit


@pytest.mark.parametrize(("writable", "is_refused"), [("auto", True), ("on", False), ("own", False)])
def test_one_of_several_servers_has_to_say_whose_repository_it_is(writable: str, *, is_refused: bool) -> None:
    config = Config(
        repository=Path(), data=Path(), ledger="postgresql://user@host/ledger", repository_writable=writable
    )
    refusal = config.upload_policy().unshared
    assert ("on if the" in refusal and "--repository-writable=own if" in refusal) is is_refused


def test_settings_decide_whether_versions_may_be_added() -> None:
    config = Config(
        repository=Path(), data=Path(), store_size="off", repository_writable="off", max_upload_bytes=7
    )
    assert config.upload_policy() == UploadPolicy("off", is_immutable=True, max_bytes=7)
