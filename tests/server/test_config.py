import dataclasses
from pathlib import Path

import pytest

from server.config import (
    Config,
    ConfigError,
    check_files,
    configuration_table,
    load_config,
    read_settings,
    settings,
)

REQUIRED = {"repository": "/models", "data": "/data"}


def test_flags_win_over_environment_and_environment_over_defaults() -> None:
    environment = {"LOADLEDGER_PORT": "1", "LOADLEDGER_HOST": "0.0.0.0", "LOADLEDGER_DATA": "/elsewhere"}
    config = load_config({**REQUIRED, "port": 2, "host": None}, environment)
    assert (config.port, config.host, config.threads) == (2, "0.0.0.0", 1)
    assert config.data == Path("/data")


def test_every_setting_can_come_from_its_variable() -> None:
    values = {
        "repository": "/models", "data": "/data", "host": "::1", "port": "0", "loads_at_once": "3",
        "threads": "2", "drain_timeout_s": "0.5", "inference_timeout_s": "1.5", "timeout_s": "10",
        "inference_grace_s": "0.5", "inference_queue": "7",
        "jwt_audience": "a", "jwt_issuer": "https://issuer", "jwt_keys": "/keys.json",
        "jwt_roles_claim": "groups",
        "limit_management": "1/second", "limit_inference": "off", "limit_reads": "7 per 2 minutes",
        "limit_auth_failures": "5/hour",
    }  # fmt: skip
    config = load_config({}, {f"LOADLEDGER_{name.upper()}": value for name, value in values.items()})
    assert {name: str(value) for name, value in dataclasses.asdict(config).items()} == values


def test_the_environment_of_this_process_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADLEDGER_PORT", "1")
    assert load_config(REQUIRED, {}).port == 8080


def test_an_empty_variable_is_a_mistake_and_not_a_default() -> None:
    with pytest.raises(ConfigError, match="LOADLEDGER_PORT"):
        load_config(REQUIRED, {"LOADLEDGER_PORT": ""})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"), ("port", "-1"), ("port", "http"), ("port", "8080.5"), ("threads", "0"),
        ("loads_at_once", "-1"), ("timeout_s", "0"), ("timeout_s", "3601"), ("drain_timeout_s", "-1"),
        ("drain_timeout_s", "nan"), ("inference_timeout_s", "0"), ("inference_timeout_s", "inf"),
        ("limit_reads", "many"), ("limit_reads", "0/minute"), ("limit_reads", "1/second;10/minute"),
        ("limit_management", "OFF"), ("host", ""), ("jwt_audience", " "), ("jwt_issuer", "a\nb"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_setting(name: str, value: str) -> None:
    variable = f"LOADLEDGER_{name.upper()}"
    with pytest.raises(ConfigError, match=variable):
        load_config(REQUIRED, {variable: value})
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        load_config({**REQUIRED, name: value}, {})


def test_the_variable_that_kubernetes_sets_for_a_service_is_explained() -> None:
    with pytest.raises(ConfigError, match="enableServiceLinks"):
        load_config(REQUIRED, {"LOADLEDGER_PORT": "tcp://10.0.0.1:8080"})


def test_a_missing_required_setting_says_both_ways_to_give_it() -> None:
    with pytest.raises(ConfigError, match="--repository or set LOADLEDGER_REPOSITORY"):
        load_config({"data": "/data"}, {})


def test_a_command_reads_only_the_settings_it_needs() -> None:
    environment = {"LOADLEDGER_DATA": "/data", "LOADLEDGER_PORT": "no number"}
    assert read_settings(["data", "jwt_audience"], {}, environment) == {
        "data": Path("/data"),
        "jwt_audience": "loadledger",
    }


def test_a_configuration_made_in_code_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--port"):
        Config(repository=Path(), data=Path(), port=70000)


def test_what_must_exist_is_checked_when_serving_begins(tmp_path: Path) -> None:
    config = Config(repository=tmp_path, data=tmp_path / "new")
    check_files(config)
    file = tmp_path / "file"
    file.write_text("no keys")
    for change, option in (
        (dataclasses.replace(config, repository=tmp_path / "none"), "--repository"),
        (dataclasses.replace(config, data=file), "--data"),
        (dataclasses.replace(config, jwt_keys=file), "--jwt-keys"),
        (dataclasses.replace(config, jwt_keys=tmp_path), "--jwt-keys"),
    ):
        with pytest.raises(ConfigError, match=option):
            check_files(change)


def test_zero_loads_at_once_means_the_cores() -> None:
    assert Config(repository=Path(), data=Path()).max_loads() >= 1
    assert Config(repository=Path(), data=Path(), loads_at_once=7).max_loads() == 7


def test_the_table_has_a_row_for_each_setting() -> None:
    rows = configuration_table().splitlines()[2:]
    assert len(rows) == len(settings()) == len(dataclasses.fields(Config))
    for row, setting in zip(rows, settings(), strict=True):
        assert setting.flag in row
        assert setting.variable in row
        assert setting.help in row
        assert row.count("|") == 5
