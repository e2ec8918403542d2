"""The Dockerfile and `deploy/`: what they name exists, and what they ask for works."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.deployment import (
    DEPLOY,
    DOCKERFILE,
    DRAIN_S,
    ROOT,
    drain_options,
    image_environment,
    instructions,
    read_valid,
)
from support.servers import LIMIT_S, MODULE, QUIET, clean_environment

from runtime.memory import list_descendants
from runtime.worker.landlock import find_abi
from server.config import settings
from server.configsources import OF_OTHERS
from server.http.responses import TooManyConnections

UNIT = DEPLOY / "loadledger.service"
NODE = DEPLOY / "systemd" / "node.conf"
"""A drop-in of the unit."""
NODE_ENVIRONMENT = DEPLOY / "systemd" / "node.env"
VARIABLES = {setting.variable for setting in settings()} | {"LOADLEDGER_CONFIG"}
NODE_VARIABLES = {f"LOADLEDGER_{name}" for name in ("LEDGER", "NODE_NAME", "NODE_ADDRESS", "NODE_ATTRIBUTES")}
"""Settings of a node."""
PAGES = [ROOT / "docs" / name for name in ("deployment.md", "configuration.md", "cluster.md")]
FILES = [path for pattern in ("*.*", "kubernetes/*", "systemd/*") for path in sorted(DEPLOY.glob(pattern))]
TEXTS = [ROOT / "Dockerfile", *(path for path in FILES if path.is_file()), *PAGES]
LIMITS = {"s": 1, "m": 60}


def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["loadledger"]
    return found


def unit(path: Path = UNIT) -> dict[str, str]:
    """Return the section `Service` of a unit or drop-in, with continued lines joined."""
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(path.read_text(encoding="utf-8").replace("\\\n", " "))
    return dict(parser["Service"])


def stop_command() -> list[str]:
    """Return the command line of ExecStop as systemd runs it, without the prefix `-`."""
    line = unit(NODE)["ExecStop"].removeprefix("-").replace("%S", "/var/lib")
    return shlex.split(line.replace("${LOADLEDGER_NODE_NAME}", "node-1"))


# All of them


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_variables_and_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"LOADLEDGER_[A-Z_]+\b", text)) <= VARIABLES | NODE_VARIABLES | OF_OTHERS
    given = re.findall(r"loadledger serve((?: +-[^|&;#`\n]*)?)", text)
    flags = {flag for arguments in given for flag in re.findall(r"--[a-z][a-z-]+", arguments)}
    assert flags <= {setting.flag for setting in settings()} | {"--config", "--help"}


# The image


def test_image_copies_every_package() -> None:
    copied = [line.split() for line in instructions("COPY") if not line.startswith("--from")]
    sources = {source for *names, _ in copied for source in names}
    assert all((ROOT / source).exists() for source in sources)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    [installed] = re.findall(r"^PACKAGES = (.+)$", setup, re.MULTILINE)
    packages = set(json.loads(installed))
    assert packages | {"examples", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= sources
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_image_settings_are_valid_and_match_its_volumes() -> None:
    config = read_valid({}, image_environment())
    assert [str(config.data), str(config.repository)] == json.loads(instructions("VOLUME")[0])
    assert [str(config.port)] == instructions("EXPOSE")
    assert config.host == "0.0.0.0"


def test_image_runs_without_root_and_stops_by_sigterm() -> None:
    user, group = instructions("USER")[-1].split(":")
    assert int(user) == int(group) >= 10_000
    assert instructions("ENTRYPOINT") == ['["loadledger"]']
    assert instructions("CMD")[-1] == '["serve"]'
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    [check] = instructions("HEALTHCHECK")
    python, script = json.loads(check.partition("CMD ")[2])
    assert python == "python"
    assert f"COPY deploy/{Path(script).name} {script}" in DOCKERFILE
    docker_s = re.search(r"--timeout=(\d+)s", check)
    limit_s = re.search(r"^LIMIT_S = ([\d.]+)$", (DEPLOY / "healthcheck.py").read_text(), re.MULTILINE)
    assert docker_s
    assert limit_s
    assert 2 * float(limit_s[1]) < int(docker_s[1])


def test_compose_service_has_least_privilege() -> None:
    asked = service()
    assert asked["read_only"] is True
    assert asked["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in asked["security_opt"]
    assert [mount.partition(":")[0] for mount in asked["tmpfs"]] == ["/tmp"]
    targets = {re.sub(r":ro$", "", mount).rpartition(":")[2] for mount in asked["volumes"]}
    assert targets == set(json.loads(instructions("VOLUME")[0]))
    assert asked["ports"] == ["127.0.0.1:8080:8080"]
    assert seconds(asked["stop_grace_period"]) > 2 * DRAIN_S
    read_valid({}, image_environment() | asked["environment"])
    assert (DEPLOY / asked["build"]["context"] / "Dockerfile").is_file()
    assert (DEPLOY / asked["volumes"][0].partition(":-")[2].partition("}")[0] / "digits").is_dir()


def seconds(text: str) -> int:
    """Read a duration of one unit."""
    return int(text[:-1]) * LIMITS[text[-1]] if text[-1] in LIMITS else int(text)


# systemd


def test_unit_command_and_paths_match_the_server() -> None:
    said = unit()
    assert said["ExecStart"] == "/opt/loadledger/bin/loadledger serve --config /etc/loadledger/server.toml"
    assert said["Type"] == "notify"
    assert said["KillMode"] == "mixed"
    assert int(said["TimeoutStopSec"]) > 2 * DRAIN_S
    user = re.search(r"^u (\S+) ", (DEPLOY / "loadledger.sysusers").read_text(), re.MULTILINE)
    assert user
    assert said["User"] == said["Group"] == user[1]
    calls = re.findall(r"^SystemCallFilter=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert "landlock_create_ruleset landlock_add_rule landlock_restrict_self" in calls
    config = read_valid({"config": DEPLOY / "server.toml"}, {})
    assert config.data == Path("/var/lib") / said["StateDirectory"]


def test_example_configuration_is_valid(tmp_path: Path) -> None:
    place = read_valid({"config": DEPLOY / "server.toml"}, {}).repository
    assert f"sudo install -d {place} && sudo cp -r examples/digits {place}" in PAGES[0].read_text()
    text = (DEPLOY / "server.toml").read_text(encoding="utf-8")
    path = tmp_path / "server.toml"
    path.write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    config = read_valid({"config": path}, {})
    assert config.tls_cert is not None
    assert config.trusted_proxies is not None
    assert config.evict == "idle"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("drop_ins", [[], [NODE]], ids=["server", "node"])
def test_systemd_finds_the_unit_valid_and_well_protected(tmp_path: Path, drop_ins: list[Path]) -> None:
    script = Path(sys.executable).with_name("loadledger")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/loadledger/bin/loadledger", str(script)))
    for drop_in in drop_ins:
        copy = tmp_path / f"{UNIT.name}.d" / drop_in.name
        copy.parent.mkdir()
        copy.write_text(drop_in.read_text().replace("/opt/loadledger/bin/loadledger", str(script)))
    done = analyze("verify", "--man=no", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = analyze("security", "--offline=yes", "--threshold=15", str(path))  # in tenths
    if "offline" in done.stderr:
        pytest.skip("this systemd-analyze checks installed units only")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_node_unit_drains_before_it_stops() -> None:
    said = unit(NODE)
    assert said["ExecStop"].startswith("-")  # a drain that fails does not make the stop one
    asked = drain_options(stop_command())
    assert (asked["node_id"], asked["wait"]) == ("node-1", True)
    assert asked["timeout_s"] < int(said["TimeoutStopSec"])
    assert asked["data"] == read_valid({"config": DEPLOY / "server.toml"}, {}).data
    assert stop_command()[0] == unit()["ExecStart"].split()[0]
    assert f"sudo install -m 0600 deploy/systemd/node.env {said['EnvironmentFile']}" in PAGES[-1].read_text()


def test_node_environment_is_valid() -> None:
    text = NODE_ENVIRONMENT.read_text(encoding="utf-8")
    complete = re.sub(r"^# (?=\w+=)", "", text, flags=re.MULTILINE)
    pairs = [line.split("=", 1) for line in complete.splitlines() if line and not line.startswith("#")]
    given = dict(pairs)
    assert len(given) == len(pairs)
    assert NODE_VARIABLES - given.keys() == {"LOADLEDGER_NODE_NAME"}  # node.conf has it
    read_valid({"config": DEPLOY / "server.toml"}, given | {"LOADLEDGER_NODE_NAME": "node-1"})


# As in a container


SANDBOX = """
set -e
mount --make-rprivate /
mount --bind "$DATA" "$DATA"
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$TMPDIR"
while read -r _ _ _ _ point _; do
  case "$point" in "$DATA"|"$TMPDIR"|/proc*|/sys*|/dev*) ;; *) mount -o remount,bind,ro "$point" ;; esac
done < /proc/self/mountinfo
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"
"""
"""Only the data and a new /tmp are writable, and no process has a capability."""

PROBE = "import os, sys; sys.exit(0 if not os.access(sys.argv[1], os.W_OK) and os.getpid() == 1 else 9)"


def sandboxed(folder: Path, *command: str) -> list[str]:
    """Return a command line that runs a command as process 1 of the sandbox; skip where there is none."""
    if any(shutil.which(tool) is None for tool in ("unshare", "setpriv", "mount")):
        pytest.skip("there are no unshare, setpriv and mount here to make a sandbox with")
    for name in ("data", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    sandbox = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*sandbox, "bash", "-c", SANDBOX, "bash", *command]


def sandbox_environment(folder: Path) -> dict[str, str]:
    python = {name: value for name, value in image_environment().items() if name.startswith("PYTHON")}
    places = {"DATA": str(folder / "data"), "TMPDIR": str(folder / "tmp"), "LOADLEDGER_PORT": "0"}
    return clean_environment() | QUIET | python | places


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    """Listen as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.settimeout(LIMIT_S)
        yield listening


def test_serve_as_process_1_on_a_read_only_system(tmp_path: Path) -> None:
    probe = sandboxed(tmp_path, sys.executable, "-c", PROBE, str(tmp_path))
    environment = sandbox_environment(tmp_path)
    tried = subprocess.run(probe, env=environment, capture_output=True, timeout=60, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no such sandbox can be made here: {tried.stderr.decode()[-200:]}")
    arguments = (f"--data={tmp_path / 'data' / 'new'}", f"--repository={ROOT / 'examples'}")
    with manager(tmp_path / "data" / "notify") as told, (tmp_path / "stderr").open("w") as stderr:
        environment["NOTIFY_SOCKET"] = told.getsockname()
        confine = "--confine=require" if find_abi() else "--confine=auto"
        command = sandboxed(tmp_path, *MODULE, "serve", confine, *arguments)
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            try:
                state, _, url = told.recv(4096).decode().partition("\nSTATUS=ready at ")
                assert (state, process.stdout and process.stdout.readline()) == (
                    "READY=1",
                    f"loadledger is ready at {url}\n",
                )
                done = health(url.rpartition(":")[2])
                assert done.returncode == 0, done.stderr
                server = list_descendants(process.pid)[0]
                status = Path(f"/proc/{server}/status").read_text()
                assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
                assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE)
                assert stat.S_IMODE((tmp_path / "data" / "new").stat().st_mode) == 0o700
                os.kill(server, signal.SIGTERM)
                assert process.wait(LIMIT_S) == 0
                assert told.recv(4096).startswith(b"STOPPING=1")
            finally:
                process.kill()  # and with it all that is in there
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def health(port: str, host: str = "0.0.0.0") -> subprocess.CompletedProcess[str]:
    """Run the image's check, as in an image that listens there."""
    command = [sys.executable, str(DEPLOY / "healthcheck.py")]
    asked = {"LOADLEDGER_HOST": host, "LOADLEDGER_PORT": port, "http_proxy": "http://192.0.2.1:1"}
    environment = clean_environment() | asked
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


OK, UNWELL = ("200 OK", "{}"), "503 Service Unavailable"


@pytest.mark.parametrize(
    ("host", "asked", "answer", "exit_code", "said"),
    [
        ("::", "::1", OK, 0, ""),
        ("::1", "::1", OK, 0, ""),
        ("127.0.0.2", "127.0.0.2", OK, 0, ""),
        ("127.0.0.1", "127.0.0.1", (UNWELL, f'{{"code": "{TooManyConnections.code}"}}'), 0, ""),
        ("127.0.0.1", "127.0.0.1", (UNWELL, '{"code": "unhealthy"}'), 1, "503"),
        ("127.0.0.1", "127.0.0.1", None, 1, "refused"),
    ],
)
def test_health_check_asks_where_the_server_listens(
    host: str, asked: str, answer: tuple[str, str] | None, exit_code: int, said: str
) -> None:
    with socket.socket(socket.AF_INET6 if ":" in asked else socket.AF_INET) as server:
        try:
            server.bind((asked, 0))
        except OSError:
            pytest.skip(f"there is no {asked} here")
        port = str(server.getsockname()[1])
        if answer is None:  # nobody listens
            done = health(port, host)
        else:
            server.listen()
            done = health_of(server, *answer, host)
    assert done.returncode == exit_code
    assert said in done.stderr
    assert exit_code == 1 or done.stderr == ""


def health_of(server: socket.socket, status: str, body: str, host: str) -> subprocess.CompletedProcess[str]:
    """Run the image's check, and answer it once; then the port is closed."""
    port = str(server.getsockname()[1])
    answering = threading.Thread(target=answer_once, args=(server, status, body))
    answering.start()
    done = health(port, host)
    answering.join(LIMIT_S)
    return done


def answer_once(server: socket.socket, status: str, body: str) -> None:
    """Answer one request."""
    server.settimeout(LIMIT_S)
    with suppress(TimeoutError):
        connection, _ = server.accept()
        server.close()
        with connection:
            connection.recv(4096)
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall((head + body).encode())
