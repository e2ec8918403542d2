"""Variables that nothing reads: which those are, and what may be meant."""

import re
from pathlib import Path

import click
import pytest

from loadledger.cli import profile
from loadledger.cli.main import SECTIONS, find
from server.config import CONFIG_VARIABLE, settings
from server.unknownvariables import OF_COMMANDS, OF_COMPOSE, unknown_variables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LOADLEDGER_PROT", "did you mean LOADLEDGER_PORT?"),
        ("LOADLEDGER_REPO", "did you mean LOADLEDGER_REPOSITORY?"),
        ("LOADLEDGER_ONDEMAND", "did you mean LOADLEDGER_ON_DEMAND?"),
        ("LOADLEDGER_on_demand", "`loadledger serve --help` lists the settings"),
        ("LOADLEDGER_TOKENS", "did you mean LOADLEDGER_TOKEN?"),
        ("LOADLEDGER_ZZZZZZZZ", "`loadledger serve --help` lists the settings"),
        ("LOADLEDGER_", "`loadledger serve --help` lists the settings"),
    ],
)
def test_a_variable_that_nothing_reads_is_told_with_the_one_that_may_be_meant(name: str, advice: str) -> None:
    assert unknown_variables({name: "a secret", "PATH": "/bin", "LOADLEDGERS": "1"}) == {name: advice}


def test_what_something_reads_is_known() -> None:
    known = {*(setting.variable for setting in settings()), CONFIG_VARIABLE, *OF_COMMANDS, *OF_COMPOSE}
    assert unknown_variables(dict.fromkeys(known, "x")) == {}


def test_all_that_commands_and_the_file_for_compose_read_is_known() -> None:
    read = {profile.URL, profile.TOKEN, profile.CA, profile.PROFILE}
    for name in (name for names in SECTIONS.values() for name in names):
        command = find(name)
        for each in [command, *(command.commands.values() if isinstance(command, click.Group) else ())]:
            read |= {str(parameter.envvar) for parameter in each.params if parameter.envvar}
    compose = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    read |= set(re.findall("LOADLEDGER_[A-Z_]+", compose))
    assert unknown_variables(dict.fromkeys(read, "x")) == {}
    assert read >= OF_COMMANDS


def test_what_kubernetes_sets_for_services_is_known() -> None:
    address = "tcp://10.0.0.1:8080"
    service = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8080",
        "SERVICE_PORT_HTTP_V1": "8080",
        "PORT": address,
        "PORT_8080_TCP": address,
        "PORT_8080_TCP_PROTO": "tcp",
        "PORT_8080_TCP_PORT": "8080",
        "PORT_53_UDP_ADDR": "10.0.0.1",
    }
    for name in ("LOADLEDGER", "LOADLEDGER_CANARY_2"):
        assert unknown_variables({f"{name}_{key}": value for key, value in service.items()}) == {}
    assert list(unknown_variables({"LOADLEDGER_HTTP_PORT": "8080"})) == ["LOADLEDGER_HTTP_PORT"]
