import dataclasses
from pathlib import Path

import pytest

from server.config import (
    Config,
    check_files,
    load_config,
    read_settings,
)
from server.settings import ConfigError

REQUIRED = {"repository": "/models", "data": "/data"}


def test_flags_win_over_environment_and_environment_over_defaults() -> None:
    environment = {"LOADLEDGER_PORT": "1", "LOADLEDGER_HOST": "0.0.0.0", "LOADLEDGER_DATA": "/elsewhere"}
    config = load_config({**REQUIRED, "port": 2, "host": None}, environment)
    assert (config.port, config.host, config.threads) == (2, "0.0.0.0", 1)
    assert config.data == Path("/data")


def test_every_setting_can_come_from_its_variable() -> None:
    values = {
        "repository": "/models", "data": "/data", "host": "::1", "port": "0",
        "tls_cert": "/cert.pem", "tls_key": "/key.pem", "trusted_proxies": "10.0.0.0/8,::1",
        "forwarded_header": "forwarded", "loads_at_once": "3",
        "threads": "2", "drain_timeout_s": "0.5", "inference_timeout_s": "1.5", "timeout_s": "10",
        "inference_grace_s": "0.5", "inference_queue": "7",
        "memory_budget": "12.5%", "max_loaded": "4", "evict": "idle", "min_residency_s": "0.5",
        "keep_alive_s": "90", "strategy": "auto", "on_demand": "on", "warm_up": "off",
        "prepare": "off", "prepared_size": "1GiB", "huge_pages": "off", "restore": "none",
        "streams_per_subject": "5", "max_connections": "99", "max_connections_per_address": "9",
        "head_timeout_s": "2.5",
        "idle_timeout_s": "650.0", "log_format": "json", "log_level": "warning", "log_inferences": "0.25",
        "otel": "on", "trace_inferences": "1.0", "metrics": "open", "jwt_audience": "a",
        "jwt_issuer": "https://issuer", "jwt_keys": "/keys.json",
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


@pytest.mark.parametrize("name", ["repository", "data", "tls_cert", "tls_key", "jwt_keys"])
@pytest.mark.parametrize("path", ["", "~/ledger", "~"])
def test_a_path_that_is_empty_or_left_to_a_shell_is_refused_and_not_made_somewhere(
    name: str, path: str
) -> None:
    others = {key: value for key, value in REQUIRED.items() if key != name}
    variable = f"LOADLEDGER_{name.upper()}"
    for flags, environment in ((others, {variable: path}), ({**others, name: path}, {})):
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} \(or {variable}\).* is refused"):
            load_config(flags, environment)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"), ("port", "-1"), ("port", "http"), ("port", "8080.5"), ("threads", "0"),
        ("loads_at_once", "-1"), ("timeout_s", "0"), ("timeout_s", "3601"), ("drain_timeout_s", "-1"),
        ("drain_timeout_s", "nan"), ("inference_timeout_s", "0"), ("inference_timeout_s", "inf"),
        ("limit_reads", "many"), ("limit_reads", "0/minute"), ("limit_reads", "1/second;10/minute"),
        ("memory_budget", "0"), ("memory_budget", "-1"), ("memory_budget", "0.0%"),
        ("memory_budget", "100.1%"), ("memory_budget", "80 %"), ("memory_budget", "1.5"),
        ("memory_budget", "8GB"), ("memory_budget", "nan%"), ("memory_budget", "9" * 5000),
        ("max_loaded", "-1"), ("max_loaded", "1.5"), ("evict", "on"), ("min_residency_s", "-1"),
        ("min_residency_s", "nan"), ("keep_alive_s", "-2"), ("keep_alive_s", "31536001"),
        ("keep_alive_s", "1.5"), ("strategy", "Beside"), ("on_demand", "1"), ("warm_up", "yes"),
        ("prepare", "auto"), ("huge_pages", "on"), ("prepared_size", ""), ("prepared_size", "0GB"),
        ("prepared_size", "-1"), ("prepared_size", "1.5GB"), ("prepared_size", "1 GB"),
        ("prepared_size", "1gb"), ("prepared_size", "GB"), ("prepared_size", "9" * 19),
        ("prepared_size", "\u0661GB"),
        ("restore", "off"), ("streams_per_subject", "0"), ("max_connections", "0"),
        ("max_connections_per_address", "-1"), ("max_connections_per_address", "ten"),
        ("head_timeout_s", "0"), ("idle_timeout_s", "nan"), ("log_format", "JSON"), ("log_level", "INFO"),
        ("log_inferences", "1.1"), ("log_inferences", "nan"), ("otel", "yes"), ("trace_inferences", "-0.1"),
        ("metrics", "off"),
        ("limit_management", "OFF"), ("host", ""), ("jwt_audience", " "), ("jwt_issuer", "a\nb"),
        ("trusted_proxies", "10.0.0.1/8"), ("trusted_proxies", "proxy"), ("trusted_proxies", "::/0"),
        ("trusted_proxies", "10.0.0.1,"), ("forwarded_header", "Forwarded"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_setting(name: str, value: str) -> None:
    variable = f"LOADLEDGER_{name.upper()}"
    with pytest.raises(ConfigError, match=variable):
        load_config(REQUIRED, {variable: value})
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        load_config({**REQUIRED, name: value}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_budget", "1"), ("memory_budget", "8589934592"), ("memory_budget", "100%"),
        ("memory_budget", "0.5%"), ("max_loaded", 0), ("evict", "off"), ("evict", "idle"),
        ("min_residency_s", 0), ("keep_alive_s", -1), ("keep_alive_s", 0), ("keep_alive_s", 31536000),
        ("strategy", "beside"), ("strategy", "in_place"), ("on_demand", "off"), ("warm_up", "on"),
        ("restore", "all"), ("prepare", "on"), ("huge_pages", "auto"), ("prepared_size", "1"),
        ("prepared_size", "999TB"), ("max_connections", 1),
        ("max_connections_per_address", 0), ("log_level", "error"), ("log_format", "text"),
        ("log_inferences", 1), ("log_inferences", 0), ("otel", "auto"), ("otel", "off"),
    ],
)  # fmt: skip
def test_a_value_at_the_edge_is_taken(name: str, value: object) -> None:
    assert getattr(load_config({**REQUIRED, name: str(value)}, {}), name) == value


def test_no_space_for_prepared_models_is_refused_with_the_option_that_prepares_none() -> None:
    with pytest.raises(ConfigError, match="--prepare=off"):
        load_config({**REQUIRED, "prepared_size": "0"}, {})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1", 1), ("20000000000", 20 * 10**9), ("20GB", 20 * 10**9), ("3MB", 3 * 10**6), ("2TB", 2 * 10**12),
        ("5MiB", 5 * 2**20), ("1GiB", 2**30), ("007TiB", 7 * 2**40),
    ],
)  # fmt: skip
def test_the_space_for_prepared_models_is_told_in_bytes(size: str, expected: int) -> None:
    assert load_config({**REQUIRED, "prepared_size": size}, {}).prepared_bytes() == expected


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
