"""The commands that talk to a server, against a real one: what they do, print and end with."""

import asyncio
import json
import re
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import models
from support.models import save
from support.process import APART, Server, serving
from support.terminal import CTRL_C, at_terminal

from loadledger.cli.main import main
from server.config import Config

JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Person:
    """Somebody who types commands, with this environment and nothing of ours beside it."""

    def __init__(self, server: Server, home: Path, *roles: str) -> None:
        self.environment = {
            "LOADLEDGER_URL": server.url,
            "LOADLEDGER_TOKEN": server.api.token(*roles),
            "HOME": str(home),
        }

    async def types(self, *arguments: str, typed: str | None = None, **environment: str | None) -> Result:
        """Run a command in this process, while the server's client goes on."""
        unset = {"XDG_CONFIG_HOME": None, "LOADLEDGER_DATA": None, "LOADLEDGER_PROFILE": None}
        env = {**unset, **self.environment, **environment}
        return await asyncio.to_thread(
            CliRunner().invoke, main, arguments, input=typed, env=env, prog_name="loadledger"
        )

    async def gets(self, *arguments: str, **environment: str | None) -> str:
        """Run a command that must succeed, and return what it printed."""
        result = await self.types(*arguments, **environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def gets_json(self, *arguments: str) -> Any:
        """Run a command that must succeed, and return the JSON that it printed."""
        return json.loads(await self.gets(*arguments, "--json"))

    async def is_refused(self, code: int, *arguments: str, **environment: str | None) -> str:
        """Run a command that must end with this code, and return its reason."""
        result = await self.types(*arguments, **environment)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        return result.stderr


@asynccontextmanager
async def server_and_person(
    tmp_path: Path, *roles: str, arguments: Sequence[str] = ()
) -> AsyncIterator[tuple[Server, Person]]:
    (tmp_path / "repository").mkdir(exist_ok=True)
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    async with serving(config, *arguments) as server:
        yield server, Person(server, tmp_path, *(roles or ("admin",)))


def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    root.mkdir()
    return root


async def test_a_model_is_loaded_seen_asked_and_unloaded(tmp_path: Path) -> None:
    root = repository(tmp_path)
    save(models.add(1), root, "m")
    save(models.add(2), root, "m", 2)
    save(models.add(3), root, "other")
    async with server_and_person(tmp_path) as (_, alice):
        assert "no model is loaded" in await alice.gets("ps")
        loaded = await alice.types("load", "m", "--wait", "--pin", "--keep-alive-s", "60")
        assert re.fullmatch(r"m version 2: load completed in \d+(\.\d)?s\n", loaded.stdout)
        assert "Traceback" not in loaded.stderr
        assert "nothing to do" in await alice.gets("load", "m", "--version", "2")

        listed = (await alice.gets("models")).splitlines()
        assert listed[0].split()[:3] == ["MODEL", "STATE", "VERSION"]
        assert listed[1].split()[:6] == ["m", "*", "loaded", "2", "1,", "2"]
        assert listed[2].split()[:2] == ["other", "unloaded"]
        assert [line.split()[0] for line in (await alice.gets("ps")).splitlines()] == ["MODEL", "m"]
        assert [each["id"] for each in (await alice.gets_json("ls"))["models"]] == ["m", "other"]
        one = await alice.gets_json("models", "m")
        details = await alice.gets("models", "m")
        assert one["files"][0]["sha256"] in details
        assert "m: loading" in await alice.gets("models", "m", "--at", "3")
        past = (await alice.gets_json("models", "--at=3"))["models"]
        assert [(each["id"], each["state"]) for each in past] == [("m", "loading")]

        answer = await alice.gets("infer", "m", "-i", "x=[1, 2.5]")
        assert re.search(r"y +FP32 +\[2\] +\[3\.0, 4\.5\]", answer)
        assert (await alice.gets_json("infer", "m", "-i", "x=[1]"))["outputs"][0]["data"] == [3.0]
        (tmp_path / "x.json").write_text("[7]")
        assert "[9.0]" in await alice.gets("infer", "m", "-i", f"x=@{tmp_path / 'x.json'}")
        asked = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}],
            "outputs": [{"name": "y"}],
        }
        result = await alice.types("infer", "m", "-f", "-", typed=json.dumps(asked))
        assert "[3.0]" in result.stdout, result.output
        assert "no input 'z'; it has x" in await alice.is_refused(2, "infer", "m", "-i", "z=[1]")

        taken = await alice.gets("resources")
        assert re.search(r"^budget .+: used .+ MB, reserved .+, free .+ GB$", taken, re.MULTILINE)
        assert re.search(r"^m +2 +serving +1 .* pinned$", taken, re.MULTILINE)
        assert (await alice.gets_json("resources"))["models"][0]["pinned"] is True
        once = await alice.gets("top", "--once")
        assert re.search(r"^m +2 +serving", once, re.MULTILINE)

        events = (await alice.gets("logs", "--model", "m")).splitlines()
        assert [line.split()[2] for line in events] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        assert len((await alice.gets("events", "--tail", "2")).splitlines()) == 2
        assert len((await alice.gets("events", "-n", "1000")).splitlines()) == 4

        assert re.search("m version 2: unload (completed|pending|in_progress)", await alice.gets("unload"))
        jobs = (await alice.gets("jobs")).splitlines()
        assert [line.split()[1:3] for line in jobs[1:]] == [["unload", "m/2"], ["load", "m/2"]]
        (unload, load) = (await alice.gets_json("jobs", "--model=m"))["jobs"]
        assert (await alice.gets_json("job", load["id"]))["parameters"]["keep_alive_s"] == 60
        shown = await alice.gets("job", unload["id"], "--wait")
        assert "unload completed" in shown
        assert "cause request" in await alice.gets("job", load["id"])
        assert "no jobs" in await alice.gets("jobs", "--status", "failed")


async def test_what_fails_says_why_and_what_to_do_and_ends_with_its_code(tmp_path: Path) -> None:
    root = repository(tmp_path)
    save(models.unknown_operator(), root, "bad")
    save(models.add(), root, "m")
    async with server_and_person(tmp_path) as (server, alice):
        reason = await alice.is_refused(1, "load", "bad", "-w")
        assert "the load of bad version 1 failed" in reason
        assert "Frobnicate" in reason
        assert re.search(f"more: loadledger events --job {JOB.pattern}", reason)
        failed = await alice.types("load", "bad", "--wait", "--json")
        assert (failed.exit_code, json.loads(failed.stdout)["error"]["code"]) == (1, "invalid_model")
        job_id = json.loads(failed.stdout)["id"]
        assert "failed" in await alice.is_refused(1, "job", job_id, "--wait")
        assert "invalid_model" in await alice.gets("jobs")
        assert "bad" in await alice.gets("ps")
        assert re.search(r"^bad +failed +invalid_model", await alice.gets("top", "--once"), re.MULTILINE)
        assert [model["id"] for model in (await alice.gets_json("top"))["wrong"]] == ["bad"]

        assert "`loadledger models` lists them" in await alice.is_refused(2, "load", "nope")
        assert "no version 7" in await alice.is_refused(2, "load", "m", "-v", "7")
        assert "`loadledger ps`" in await alice.is_refused(2, "unload")
        assert "not loaded" in await alice.is_refused(2, "infer", "m", "-i", "x=[1]")
        assert "`loadledger jobs`" in await alice.is_refused(2, "job", "nope")
        assert "already" in await alice.is_refused(2, "cancel", job_id)
        assert "no id of a model" in await alice.is_refused(2, "load", "..")
        assert "timeout_s" in await alice.is_refused(2, "load", "m", "--timeout-s", "99999")

        nobody = await alice.is_refused(2, "models", LOADLEDGER_TOKEN=None)
        assert "set LOADLEDGER_TOKEN" in nobody
        assert "loadledger login" in nobody
        reader = server.api.token("audit")
        assert "403" in await alice.is_refused(2, "load", "m", LOADLEDGER_TOKEN=reader)
        assert "answered 401" in await alice.is_refused(2, "ps", LOADLEDGER_TOKEN="nonsense")
    away = await alice.is_refused(2, "models")
    assert "is the server running, and is this its URL?" in away
    assert "does not begin with http://" in await alice.is_refused(2, "ps", "--url", "localhost:1")


async def test_a_question_has_its_model_loaded_where_the_server_does_so_on_demand(tmp_path: Path) -> None:
    root = repository(tmp_path)
    for name in ("guessed", "other", "wrong", "shape"):
        save(models.add(), root, name)
    save(models.unknown_operator(), root, "bad")
    async with server_and_person(tmp_path, "predict", arguments=["--on-demand=on"]) as (_, bob):
        assert "[2.0]" in await bob.gets("infer", "guessed", "-i", "x=[1.0]")
        # It takes no whole numbers as such, and says so when it is loaded.
        assert "[2.0]" in await bob.gets("infer", "other", "-i", "x=[1]")
        assert "no input 'z'; it has x" in await bob.is_refused(2, "infer", "wrong", "-i", "z=[1]")
        assert "same length" in await bob.is_refused(2, "infer", "shape", "-i", "x=[[1], [2, 3]]")
        assert "Frobnicate" in await bob.is_refused(2, "infer", "bad", "-i", "x=[1]")
        file = tmp_path / "request.json"
        request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
        file.write_text(json.dumps(request | {"parameters": {"sequence_id": 1}}))
        assert "sequence_id" in await bob.is_refused(2, "infer", "shape", "-f", str(file))
        loaded = [each["id"] for each in (await bob.gets_json("ps"))["models"]]
        assert loaded == ["bad", "guessed", "other", "wrong"]


async def test_serve_warns_once_of_variables_that_nothing_reads(tmp_path: Path) -> None:
    config = Config(repository=repository(tmp_path), data=tmp_path / "data")
    variables = {"LOADLEDGER_LOG_LEVEL": "info", "LOADLEDGER_LOG_FORMAT": "json"}
    mistyped = {"LOADLEDGER_PROT": "secret", "LOADLEDGER_ZZZZZZZZ\n": "secret"}
    async with serving(config, environment=variables | mistyped) as server:
        assert await server.stop() == 0
    told = [json.loads(line) for line in server.output.read_text(encoding="utf-8").splitlines()]
    (warning,) = (line for line in told if line["level"] == "warning")
    assert "LOADLEDGER_PROT: did you mean LOADLEDGER_PORT?; LOADLEDGER_ZZZZZZZZ\n: " in warning["message"]
    assert "secret" not in str(told)


async def test_a_wait_shows_stages_at_a_terminal_and_ctrl_c_leaves_the_job_running(tmp_path: Path) -> None:
    root = repository(tmp_path)
    save(models.endless(), root, "endless")
    async with server_and_person(tmp_path) as (server, alice):
        with at_terminal("load", "endless", "--wait", environment=alice.environment) as terminal:
            await terminal.until(r"endless version 1 \S+ warming up 0:\d\d:\d?[1-9]")
            terminal.press(CTRL_C)
            assert await terminal.end() == 130
        assert "Traceback" not in terminal.plain
        again = re.search(rf"detached: .* loadledger job ({JOB.pattern}) --wait", terminal.plain, re.DOTALL)
        assert again, terminal.plain
        assert (await server.api.job(again[1]))["status"] == "in_progress"
        with at_terminal("job", again[1], "-w", environment=alice.environment) as terminal:
            await terminal.until("warming up")
            assert "endless" in await alice.gets("cancel", again[1])
            assert await terminal.end() == 1
        assert "was cancelled" in terminal.plain


async def test_colours_are_for_terminals_only_and_never_against_no_color(tmp_path: Path) -> None:
    root = repository(tmp_path)
    save(models.add(), root, "m")
    async with server_and_person(tmp_path) as (server, alice):
        await server.api.load("m")
        assert "\x1b" not in await alice.gets("models")
        with at_terminal("models", environment=alice.environment) as terminal:
            assert await terminal.end() == 0
        assert "\x1b[32mloaded\x1b[0m" in terminal.shown
        environment = {**alice.environment, "NO_COLOR": "1"}
        with at_terminal("models", environment=environment) as terminal:
            assert await terminal.end() == 0
        assert "\x1b" not in terminal.shown
        assert terminal.shown.split()[:9] == (await alice.gets("models")).split()[:9]


async def test_top_goes_on_when_the_server_is_away_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    root = repository(tmp_path)
    save(models.add(), root, "m")
    async with server_and_person(tmp_path, arguments=[APART]) as (server, alice):
        await server.api.load("m")
        port = server.url.rpartition(":")[2]
        with at_terminal("top", "--interval=0.2", environment=alice.environment) as terminal:
            await terminal.until(r"m +1 +serving")
            assert await server.stop() == 0
            await terminal.until("away, trying again")
            terminal.shown = ""
            async with serving(server.api.config, APART, f"--port={port}"):
                await terminal.until(r"Z  position \d+\s+memory")
                terminal.press(CTRL_C)
                assert await terminal.end() == 0
        assert "Traceback" not in terminal.plain


async def test_login_keeps_a_token_that_the_server_takes_where_nobody_else_reads_it(tmp_path: Path) -> None:
    async with server_and_person(tmp_path) as (server, alice):
        token, kept = server.api.token("predict"), tmp_path / ".config" / "loadledger" / "profile.toml"
        refused = await alice.types("login", typed="nonsense\n")
        assert (refused.exit_code, kept.exists()) == (2, False)
        assert "401" in refused.stderr
        assert (await alice.types("login", typed="\n")).exit_code == 2
        done = await alice.types("login", typed=f"{token}\n")
        assert done.exit_code == 0, done.output
        assert token not in done.output
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        bare = {"LOADLEDGER_URL": None, "LOADLEDGER_TOKEN": None}
        assert "repository has no models" in await alice.gets("models", **bare)
        # What is meant for one server is shown to no other.
        other = server.url.replace("127.0.0.1", "localhost")
        assert "asks for a token" in await alice.is_refused(2, "models", "--url", other, **bare)
        done = await alice.types("login", "--profile=two", "--json", typed=token)
        assert json.loads(done.stdout) == {"url": server.url, "profile": str(kept.with_name("two.toml"))}
        assert "no models" in await alice.gets("models", "--profile", "two", **bare)
        assert "there is no" in await alice.is_refused(2, "models", "--profile", "three", **bare)
        kept.chmod(0o644)
        assert "chmod 600" in await alice.is_refused(2, "models", **bare)


async def test_models_and_jobs_of_the_server_complete(tmp_path: Path) -> None:
    root = repository(tmp_path)
    for name in ("first", "second"):
        save(models.add(), root, name)
    async with server_and_person(tmp_path) as (server, alice):
        await server.api.load("second")

        async def offered(words: str, **environment: str | None) -> list[str]:
            asked = {"_LOADLEDGER_COMPLETE": "bash_complete", "COMP_WORDS": words}
            asked["COMP_CWORD"] = str(len(words.split(" ")) - 1)
            result = await alice.types(**asked, **environment)
            assert result.stderr == ""
            return [line.partition(",")[2] for line in result.stdout.split("\n") if line]

        assert await offered("loadledger load ") == ["first", "second"]
        assert await offered("loadledger load f") == ["first"]
        assert await offered("loadledger unload ") == ["second"]
        (job_id,) = await offered("loadledger job ")
        assert JOB.fullmatch(job_id)
        assert await offered("loadledger load --str") == ["--strategy"]
        assert await offered("loadledger load ", LOADLEDGER_TOKEN="nonsense") == []
        assert await offered("loadledger load ", LOADLEDGER_URL="no url") == []
        assert {"load", "ps"} & set(await offered("loadledger ")) == {"load"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_what_makes_it_complete(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert "_LOADLEDGER_COMPLETE" in result.stdout
    assert f"{shell}_complete" in result.stdout
