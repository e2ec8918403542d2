"""The commands that talk to a server, against a real one: what they do, print and end with."""

import asyncio
import json
import re
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from onnx import ModelProto
from support import models
from support.models import save
from support.servers import APART, CTRL_C, Server, at_terminal, serving

from loadledger.cli.main import main
from server.config import Config

JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Shell:
    """Runs commands with a token and a home, and nothing of ours beside them in the environment."""

    def __init__(self, server: Server, home: Path, *roles: str) -> None:
        self.environment = {
            "LOADLEDGER_URL": server.url,
            "LOADLEDGER_TOKEN": server.api.token(*roles),
            "HOME": str(home),
        }

    async def run(self, *arguments: str, typed: str | None = None, **environment: str | None) -> Result:
        """Run a command in this process, while the server's client goes on."""
        unset = {"XDG_CONFIG_HOME": None, "LOADLEDGER_DATA": None, "LOADLEDGER_PROFILE": None}
        env = {**unset, **self.environment, **environment}
        return await asyncio.to_thread(
            CliRunner().invoke, main, arguments, input=typed, env=env, prog_name="loadledger"
        )

    async def prints(self, command: str, **environment: str | None) -> str:
        """Run a command that must succeed, and return what it printed."""
        result = await self.run(*command.split(), **environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def json(self, command: str) -> Any:
        """Run a command that must succeed, and return the JSON that it printed."""
        return json.loads(await self.prints(f"{command} --json"))

    async def refused(self, code: int, command: str, **environment: str | None) -> str:
        """Run a command that must end with this code, and return its reason."""
        result = await self.run(*command.split(), **environment)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert "Traceback" not in result.stderr
        return result.stderr


@asynccontextmanager
async def server_and_shell(
    tmp_path: Path, *arguments: str, roles: Sequence[str] = ("admin",), **repository: ModelProto
) -> AsyncIterator[tuple[Server, Shell]]:
    root = tmp_path / "repository"
    root.mkdir()
    for name, model in repository.items():
        save(model, root, name)
    async with serving(Config(repository=root, data=tmp_path / "data"), *arguments) as server:
        yield server, Shell(server, tmp_path, *roles)


async def test_each_command_prints_a_models_life(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path, m=models.add(1), other=models.add(3)) as (server, alice):
        save(models.add(2), server.api.config.repository, "m", 2)
        assert "no model is loaded" in await alice.prints("ps")
        loaded = await alice.prints("load m --wait --pin --keep-alive-s 60")
        assert re.fullmatch(r"m version 2: load completed in \d+(\.\d)?s\n", loaded)
        assert "nothing to do" in await alice.prints("load m --version 2")

        listed = (await alice.prints("models")).splitlines()
        assert listed[0].split()[:3] == ["MODEL", "STATE", "VERSION"]
        assert listed[1].split()[:6] == ["m", "*", "loaded", "2", "1,", "2"]
        assert listed[2].split()[:2] == ["other", "unloaded"]
        assert [line.split()[0] for line in (await alice.prints("ps")).splitlines()] == ["MODEL", "m"]
        assert [each["id"] for each in (await alice.json("ls"))["models"]] == ["m", "other"]
        assert (await alice.json("models m"))["files"][0]["sha256"] in await alice.prints("models m")
        assert "m: loading" in await alice.prints("models m --at 3")
        past = (await alice.json("models --at=3"))["models"]
        assert [(each["id"], each["state"]) for each in past] == [("m", "loading")]

        answer = await alice.run("infer", "m", "-i", "x=[1, 2.5]")
        assert re.search(r"y +FP32 +\[2\] +\[3\.0, 4\.5\]", answer.stdout)
        assert (await alice.json("infer m -i x=[1]"))["outputs"][0]["data"] == [3.0]
        (tmp_path / "x.json").write_text("[7]")
        assert "[9.0]" in await alice.prints(f"infer m -i x=@{tmp_path / 'x.json'}")
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
        body = json.dumps({"inputs": [tensor], "outputs": [{"name": "y"}]})
        assert "[3.0]" in (await alice.run("infer", "m", "-f", "-", typed=body)).stdout
        assert "no input 'z'; it has x" in await alice.refused(2, "infer m -i z=[1]")

        taken = await alice.prints("resources")
        assert re.search(r"^budget .+: used .+ MB, reserved .+, free .+ GB$", taken, re.MULTILINE)
        assert re.search(r"^m +2 +serving +1 .* pinned$", taken, re.MULTILINE)
        assert (await alice.json("resources"))["models"][0]["pinned"] is True
        assert re.search(r"^m +2 +serving", await alice.prints("top --once"), re.MULTILINE)

        events = (await alice.prints("logs --model m")).splitlines()
        assert [line.split()[2] for line in events] == ["LoadRequested", "LoadStarted", "ModelLoaded"]
        assert [len((await alice.prints(f"events -n {n}")).splitlines()) for n in (2, 1000)] == [2, 4]

        assert re.search("m version 2: unload (completed|pending|in_progress)", await alice.prints("unload"))
        jobs = (await alice.prints("jobs")).splitlines()
        assert [line.split()[1:3] for line in jobs[1:]] == [["unload", "m/2"], ["load", "m/2"]]
        (unload, load) = (await alice.json("jobs --model=m"))["jobs"]
        assert (await alice.json(f"job {load['id']}"))["parameters"]["keep_alive_s"] == 60
        assert "unload completed" in await alice.prints(f"job {unload['id']} --wait")
        assert "cause request" in await alice.prints(f"job {load['id']}")
        assert "no jobs" in await alice.prints("jobs --status failed")


async def test_failed_commands_print_reason_and_advice(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path, bad=models.unknown_operator(), m=models.add()) as (server, alice):
        reason = await alice.refused(1, "load bad -w")
        for words in ("the load of bad version 1 failed", "Frobnicate"):
            assert words in reason
        assert re.search(f"more: loadledger events --job {JOB.pattern}", reason)
        failed = await alice.run("load", "bad", "--wait", "--json")
        job = json.loads(failed.stdout)
        assert (failed.exit_code, job["error"]["code"]) == (1, "invalid_model")
        assert "failed" in await alice.refused(1, f"job {job['id']} --wait")
        assert "invalid_model" in await alice.prints("jobs")
        assert "bad" in await alice.prints("ps")
        assert re.search(r"^bad +failed +invalid_model", await alice.prints("top --once"), re.MULTILINE)
        assert [model["id"] for model in (await alice.json("top"))["wrong"]] == ["bad"]

        for command, words in (
            ("load nope", "`loadledger models` lists them"),
            ("load m -v 7", "no version 7"),
            ("unload", "`loadledger ps`"),
            ("infer m -i x=[1]", "not loaded"),
            ("job nope", "`loadledger jobs`"),
            (f"cancel {job['id']}", "already"),
            ("load ..", "no id of a model"),
            ("load m --timeout-s 99999", "timeout_s"),
            ("ps --url localhost:1", "does not begin with http://"),
        ):
            assert words in await alice.refused(2, command), command
        nobody = await alice.refused(2, "models", LOADLEDGER_TOKEN=None)
        assert "set LOADLEDGER_TOKEN" in nobody
        assert "loadledger login" in nobody
        for command in ("ps", "events", "events --follow"):
            assert "answered 401" in await alice.refused(2, command, LOADLEDGER_TOKEN="nonsense")
        for command, role in (("load m", "audit"), ("events", "predict"), ("events -f", "predict")):
            assert "403" in await alice.refused(2, command, LOADLEDGER_TOKEN=server.api.token(role))
    assert "is the server running, and is this its URL?" in await alice.refused(2, "models")


async def test_infer_loads_model_on_demand(tmp_path: Path) -> None:
    added = {name: models.add() for name in ("guessed", "other", "wrong", "shape")}
    async with server_and_shell(
        tmp_path, "--on-demand=on", roles=["predict"], bad=models.unknown_operator(), **added
    ) as (_, bob):
        assert "[2.0]" in await bob.prints("infer guessed -i x=[1.0]")
        # It takes no whole numbers as such, and says so when it is loaded.
        assert "[2.0]" in await bob.prints("infer other -i x=[1]")
        file = tmp_path / "request.json"
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
        file.write_text(json.dumps({"inputs": [tensor], "parameters": {"sequence_id": 1}}))
        for command, words in (
            ("infer wrong -i z=[1]", "no input 'z'; it has x"),
            ("infer shape -i x=[[1],[2,3]]", "same length"),
            ("infer bad -i x=[1]", "Frobnicate"),
            (f"infer shape -f {file}", "sequence_id"),
        ):
            assert words in await bob.refused(2, command)
        loaded = [each["id"] for each in (await bob.json("ps"))["models"]]
        assert loaded == ["bad", "guessed", "other", "wrong"]


async def test_serve_warns_once_of_unknown_variables(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    variables = {"LOADLEDGER_LOG_LEVEL": "info", "LOADLEDGER_LOG_FORMAT": "json"}
    mistyped = {"LOADLEDGER_PROT": "secret", "LOADLEDGER_ZZZZZZZZ\n": "secret"}
    config = Config(repository=root, data=tmp_path / "data")
    async with serving(config, environment=variables | mistyped) as server:
        assert await server.stop() == 0
    logged = [json.loads(line) for line in server.output.read_text(encoding="utf-8").splitlines()]
    (warning,) = (line for line in logged if line["level"] == "warning")
    assert "LOADLEDGER_PROT: did you mean LOADLEDGER_PORT?; LOADLEDGER_ZZZZZZZZ\n: " in warning["message"]
    assert "secret" not in str(logged)


# At a terminal


async def test_wait_shows_stages_and_ctrl_c_detaches(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path, endless=models.endless()) as (server, alice):
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
            assert "endless" in await alice.prints(f"cancel {again[1]}")
            assert await terminal.end() == 1
        assert "was cancelled" in terminal.plain


async def test_top_survives_restart_and_colours_obey_no_color(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path, APART, m=models.add()) as (server, alice):
        await server.api.load("m")
        assert "\x1b" not in await alice.prints("models")
        for no_color, colour in (({}, "\x1b[32mloaded\x1b[0m"), ({"NO_COLOR": "1"}, "")):
            with at_terminal("models", environment={**alice.environment, **no_color}) as terminal:
                assert await terminal.end() == 0
            assert colour in terminal.shown
            assert ("\x1b" in terminal.shown) is bool(colour)
        port = server.url.rpartition(":")[2]
        with at_terminal("top", "--interval=0.2", environment=alice.environment) as terminal:
            await terminal.until(r"m +1 +serving")
            assert await server.stop() == 0
            await terminal.until("unreachable, retrying")
            terminal.shown = ""
            async with serving(server.api.config, APART, f"--port={port}"):
                await terminal.until(r"Z  position \d+\s+memory")
                terminal.press(CTRL_C)
                assert await terminal.end() == 0
        assert "Traceback" not in terminal.plain


# Profiles and completion


async def test_login_keeps_accepted_token_in_private_profile(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path) as (server, alice):
        token, kept = server.api.token("predict"), tmp_path / ".config" / "loadledger" / "profile.toml"
        refused = await alice.run("login", typed="nonsense\n")
        assert (refused.exit_code, kept.exists(), "401" in refused.stderr) == (2, False, True)
        assert (await alice.run("login", typed="\n")).exit_code == 2
        untrusted = await alice.run("login", typed="token\n", LOADLEDGER_CA=str(tmp_path / "none.pem"))
        assert (untrusted.exit_code, "none.pem" in untrusted.stderr) == (2, True)
        done = await alice.run("login", typed=f"{token}\n")
        assert done.exit_code == 0, done.output
        assert token not in done.output
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        bare = {"LOADLEDGER_URL": None, "LOADLEDGER_TOKEN": None}
        assert "repository has no models" in await alice.prints("models", **bare)
        other = server.url.replace("127.0.0.1", "localhost")  # the token is for one server only
        assert "asks for a token" in await alice.refused(2, f"models --url {other}", **bare)
        done = await alice.run("login", "--profile=two", "--json", typed=token)
        assert json.loads(done.stdout) == {"url": server.url, "profile": str(kept.with_name("two.toml"))}
        assert "no models" in await alice.prints("models --profile two", **bare)
        assert "there is no" in await alice.refused(2, "models --profile three", **bare)
        kept.chmod(0o644)
        assert "chmod 600" in await alice.refused(2, "models", **bare)


async def test_completion_offers_models_and_jobs_of_server(tmp_path: Path) -> None:
    async with server_and_shell(tmp_path, first=models.add(), second=models.add()) as (server, alice):
        await server.api.load("second")

        async def offered(words: str, **environment: str | None) -> list[str]:
            asked = {"_LOADLEDGER_COMPLETE": "bash_complete", "COMP_WORDS": words}
            asked["COMP_CWORD"] = str(len(words.split(" ")) - 1)
            result = await alice.run(**asked, **environment)
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
