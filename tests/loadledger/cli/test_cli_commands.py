"""The commands that talk to a server, against a real one: what they do, print and end with."""

import json
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from support import models
from support.answers import fill
from support.clients import Shell
from support.http import LocalApi, local_server
from support.models import save
from support.servers import CTRL_C, at_terminal
from support.sources import in_thread
from support.workers import until

from answers.health import NotReady
from answers.models import BatchRowsInfo, ModelInfo
from answers.resources import Reloads, Resources
from answers.tensors import ModelTensor, TensorExample
from loadledger.cli.inputs import GivenInput, parse_input
from loadledger.cli.models import describe_batching, reloads_line, status_line
from loadledger.cli.snippets import describe_guess, format_infer

COUNT = f"trips={models.ENDLESS}"
JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """A server that loads on demand."""
    folder = tmp_path_factory.mktemp("commands")
    root = folder / "repository"
    for model_id in ("guessed", "other", "ready", "whole", "wrong"):
        save(models.add(), root, model_id)
    for version in (1, 2):
        save(models.add(version), root, "m", version)
    save(models.unknown_operator(), root, "bad")
    save(models.endless(), root, "endless")
    save(models.counting_loop(), root, "counting")
    save(models.picture_of_one_size(), root, "sized")
    with in_thread(local_server(folder, on_demand="on")) as server:
        yield server


@pytest.fixture
def alice(server: LocalApi) -> Shell:
    return Shell(server, "admin")


def test_add_puts_a_version_in_and_rm_takes_it_out(alice: Shell, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(models.add().SerializeToString())
    (tmp_path / "onnx" / "model_q4.onnx").write_bytes(b"another")
    added = alice.run("add", "added", str(tmp_path))
    assert re.fullmatch(
        r"added version 1: added, 1 file, \d+ bytes\n  model\.onnx: \d+ bytes, sha256 [0-9a-f]{64}\n"
        r"to load it: loadledger load added --version 1\n",
        added.stdout,
    )
    assert "left out, as other models: model_q4.onnx" in added.stderr
    file = tmp_path / "onnx" / "model.onnx"
    assert alice.json(f"add added {file}")["version"] == 2
    assert "added version 3: load completed" in alice.prints(f"add added {file} --load")
    (tmp_path / "net.sig").write_bytes(b"{}")
    signed = alice.json(f"add signed {file} --signature {tmp_path / 'net.sig'}")
    assert [each["path"] for each in signed["files"]] == ["model.onnx", "net.sig"]
    assert alice.prints("rm added --version 1") == "added version 1: removed\n"
    assert alice.prints("rm added --version 3 --force") == "added version 3: removed\n"


def test_load_says_which_version_it_passed_over(alice: Shell, server: LocalApi) -> None:
    save(models.add(), server.config.repository, "newest")
    (server.config.repository / "newest" / "2").mkdir()
    reason = "version 2 of model 'newest' is not complete: its model.onnx cannot be looked at"
    for outcome in ("load completed", "nothing to do"):
        loaded = alice.run("load", "newest", "--wait")
        assert f"newest version 1: {outcome}" in loaded.stdout
        assert f"loadledger: passed over: {reason}" in loaded.stderr
    (job,) = alice.json("jobs --model newest")["jobs"]
    assert re.search(rf"^ +passed over: +{reason}", alice.prints(f"job {job['id']}"), re.MULTILINE)
    assert re.search(rf"^ +not served: +{reason}", alice.prints("show newest"), re.MULTILINE)
    assert re.search(r"^newest .* version 2 of model 'newest' is not", alice.prints("models"), re.MULTILINE)
    assert "version 2 of model 'newest' is not complete" in alice.refused(2, "load newest --version 2")
    alice.prints("unload newest --wait")


def test_label_names_a_version_in_lists_and_requests(alice: Shell, server: LocalApi) -> None:
    for number in (1, 2):
        save(models.add(number), server.config.repository, "labelled", number)
    assert alice.prints("label labelled") == "no labels\n"
    assert "version 1: load completed" in alice.prints("load labelled -v 1 --label champion --wait")
    assert "champion" in alice.prints("jobs --model labelled --json")
    assert re.search(r"^ +labels: +champion 1$", alice.prints("show labelled"), re.MULTILINE)
    assert re.search(r"^labelled .* 1, 2 \(champion 1\) ", alice.prints("models"), re.MULTILINE)
    assert "[2.0]" in alice.run("infer", "labelled", "x=[1]", "-v", "champion").stdout
    assert alice.json("label labelled latest 2") == {"labels": {"champion": 1, "latest": 2}}
    assert alice.json("label labelled/2") == {"labels": {"latest": 2}}
    assert alice.json("label labelled champion --remove") == {"labels": {"latest": 2}}
    alice.prints("unload labelled --wait")


def test_each_command_prints_a_models_life(alice: Shell, tmp_path: Path) -> None:
    loaded = alice.prints(
        "load m --wait --pin --keep-alive-s 60 --threads 2 --node-attributes zone=a,disk=fast"
        " --memory-limit-bytes 2GB"
    )
    assert re.fullmatch(r"m version 2: load completed in \d+(\.\d)?s\n", loaded)
    assert "nothing to do" in alice.prints("load m --version 2")

    listed = [line.split() for line in alice.prints("models").splitlines()]
    assert listed[0][:3] == ["MODEL", "STATE", "VERSION"]
    assert ["m", "*", "loaded", "2", "1,", "2"] in [words[:6] for words in listed]
    assert ["other", "unloaded"] in [words[:2] for words in listed]
    assert re.search(r"^m \*", alice.prints("ps"), re.MULTILINE)
    assert "other" not in alice.prints("ps")
    assert "other" in alice.prints("ps -a")
    assert {"m", "other"} <= {each["id"] for each in alice.json("ls")["models"]}
    model = alice.json("show m")
    assert model["files"][0]["sha256"] in alice.prints("show m")
    at = model["position"] - 1
    assert "m: loading" in alice.prints(f"show m --at {at}")
    past = {each["id"]: each["state"] for each in alice.json(f"models --at={at}")["models"]}
    assert past["m"] == "loading"

    answer = alice.run("infer", "m", "x=[1, 2.5]")
    assert re.search(r"y +FP32 +\[2\] +\[3\.0, 4\.5\]", answer.stdout)
    assert alice.json("infer m x=[1]")["outputs"][0]["data"] == [3.0]
    assert alice.json("infer m x=[NaN,-Infinity]")["outputs"][0]["data"] == ["NaN", "-Infinity"]
    (tmp_path / "x.json").write_text("[7]")
    assert "[9.0]" in alice.prints(f"infer m x=@{tmp_path / 'x.json'}")
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "y"}]})
    assert "[3.0]" in alice.run("infer", "m", "@-", typed=body).stdout

    taken = alice.prints("resources")
    assert re.search(r"^ +threads: +2$", alice.prints("show m"), re.MULTILINE)
    assert "node_attributes disk=fast zone=a, pinned True" in alice.prints("show m")
    assert re.search(r"^threads of each worker: \d+,", taken, re.MULTILINE)
    assert re.search(r"^budget .+: used .+ MB, reserved .+, free .+ GB$", taken, re.MULTILINE)
    for shown in (taken, alice.prints("top")):
        assert re.search(r"^m +2 +serving +1 .* pinned$", shown, re.MULTILINE)
    pinned = {each["model_id"]: each["pinned"] for each in alice.json("resources")["models"]}
    assert pinned["m"] is True

    events = alice.prints("logs --model m").splitlines()
    story = ["LoadRequested", "LoadStarted", "ModelLoaded"]
    assert [line.split()[2] for line in events] == [*story, "LoadJoined"]  # "nothing to do"
    assert len(alice.prints("events -n 2").splitlines()) == 2
    assert len(alice.prints("events -n 1000").splitlines()) == len(alice.prints("events").splitlines())

    assert re.search("m version 2: unload (completed|pending|in_progress)", alice.prints("unload --active"))
    jobs = alice.prints("jobs --model=m").splitlines()
    assert [line.split()[1:3] for line in jobs[1:]] == [["unload", "m/2"], ["load", "m/2"]]
    (unload, load) = alice.json("jobs --model=m")["jobs"]
    parameters = alice.json(f"job {load['id']}")["parameters"]
    assert (parameters["keep_alive_s"], parameters["memory_limit_bytes"]) == (60, 2 * 10**9)
    assert "unload completed" in alice.prints(f"job {unload['id']} --wait")
    assert "cause request" in alice.prints(f"job {load['id']}")
    assert "no jobs" in alice.prints("jobs --status failed --model=m")


def test_past_lists_have_the_ages_of_their_moment(alice: Shell) -> None:
    alice.prints("load other --wait")
    model = alice.json("show other")
    job = alice.json(f"job {model['job_id']}")
    for command, at in (
        ("models", model["position"]),
        ("models", model["loaded_at"]),
        ("jobs --model other", job["created_at"]),
    ):
        found = alice.run(*command.split(), "--at", str(at))
        assert re.search(r"^loadledger: as of 2\d{3}-.*Z, position \d+$", found.stderr, re.MULTILINE)
        [line] = [each for each in found.stdout.splitlines() if re.search(r"other\b.*(loaded|pending)", each)]
        assert " 0.0s " in line
    alice.prints("unload other --wait")


def test_status_says_whether_the_server_is_ready_and_why_not(alice: Shell) -> None:
    url = alice.environment["LOADLEDGER_URL"]
    ready, budget, *_ = alice.prints("status").splitlines()
    assert re.fullmatch(rf"{url}: ready, \d+ loads? with processes, 0 waiting", ready)
    assert budget.startswith("budget ")
    failed = NotReady(check="writer", cause="the disk is full", cure="free some of it")
    found = fill(Resources, models=[], waiting=[], not_ready=[failed])
    assert status_line("http://h", found) == "http://h: NOT ready, 0 loads with processes, 0 waiting"


def test_reloads_are_shown_with_their_share_and_the_limit() -> None:
    reloads = Reloads(last_hour=34, waited_s=120.5, share=0.414, limits=["memory", "max_loaded"])
    assert reloads_line(fill(Resources, reloads=reloads)) == (
        "reloads after evictions in the last hour: 34; inferences spent 41% of their time waiting for loads; "
        "no room by memory, max_loaded"
    )
    assert reloads_line(fill(Resources)) is None


@pytest.mark.parametrize(
    ("verdict", "joined", "expected"),
    [
        ("independent", True, "are joined: rows are independent"),
        ("dependent", True, "are joined, as dependent_rows allows: ReduceMean"),
        ("unknown", False, "are not joined: ReduceMean"),
    ],
)
def test_show_says_whether_requests_are_joined(verdict: str, *, joined: bool, expected: str) -> None:
    reason = "" if verdict == "independent" else "ReduceMean"
    said = describe_batching(BatchRowsInfo(verdict=verdict, reason=reason, joined=joined))
    assert said == f"requests of several clients {expected}"


def test_dependent_rows_are_refused_or_allowed(alice: Shell, server: LocalApi) -> None:
    save(models.quantised(), server.config.repository, "quantised")
    assert "(rows_depend)" in alice.refused(1, "load quantised --max-batch-size 8 --wait")
    alice.prints("load quantised --max-batch-size 8 --dependent-rows allow --wait")
    assert "are joined, as dependent_rows allows: DynamicQuantizeLinear" in alice.prints("show quantised")
    alice.prints("unload quantised --wait")


def test_whoami_prints_what_the_token_says(alice: Shell) -> None:
    url = alice.environment["LOADLEDGER_URL"]
    assert re.fullmatch(
        rf"  server: +{url}\n  subject: +alice\n  roles: +admin\n  expires: +2[-\d]+ [:\d]+Z\n",
        alice.prints("whoami"),
    )
    for token, subject in ((None, "no token"), ("opaque", "unknown to this command")):
        shown = alice.prints("whoami", LOADLEDGER_TOKEN=token)
        assert [line.split(maxsplit=1)[1] for line in shown.splitlines()] == [url, subject]


def test_show_prints_inputs_and_a_command_that_works(alice: Shell) -> None:
    shown = alice.prints("show whole")
    assert re.search(r"^INPUT +DATATYPE +SHAPE\nx +FP32 +\[-1\]$", shown, re.MULTILINE)
    assert re.search(r"^OUTPUT +DATATYPE +SHAPE\ny +FP32 +\[-1\]$", shown, re.MULTILINE)
    *_, load, infer = shown.splitlines()
    assert (load, infer) == ("loadledger load whole --wait", "loadledger infer whole")
    alice.prints(load.removeprefix("loadledger "))
    assert alice.prints("load whole --pin --wait") == "whole version 1: settings changed\n"
    listed = alice.prints(infer.removeprefix("loadledger "))
    *_, command, with_file = listed.splitlines()
    assert (command, with_file[:1]) == ("loadledger infer whole x=random:16", "#")
    assert alice.prints("show whole").endswith(listed)
    assert re.search(r"y +FP32 +\[16\] ", alice.run(*shlex.split(command)[1:]).stdout)
    assert re.search(r"^ +chosen: +version 1 by alice ", alice.prints("show whole"), re.MULTILINE)
    alice.prints("unload whole --wait")
    assert re.search(
        r"^ +chosen: +unloaded by alice .*; no inference loads it$", alice.prints("show whole"), re.MULTILINE
    )
    refused = alice.refused(2, "infer whole x=[1]")
    assert "whole' is out of service: unloaded by alice at " in refused
    assert "`loadledger load whole --wait` loads it" in refused
    alice.prints("load whole --wait")
    alice.prints("unload whole --until-asked --wait")
    assert alice.prints("inspect whole") == alice.prints("show whole")


def tensor(name: str, datatype: str, *shape: int, values: str = "zeros", open_to: int = 0) -> ModelTensor:
    """Make an input whose example has this length for open dimensions; 0 makes none."""
    example = [open_to if length < 0 else length for length in shape]
    made = ModelTensor(name=name, datatype=datatype, shape=list(shape))
    return replace(made, example=TensorExample(shape=example, values=values)) if open_to else made


PICTURE = tensor("in/x", "FP32", 1, 3, -1, -1, open_to=224)


@pytest.mark.parametrize(
    ("tensors", "values"),
    [
        ([tensor("a b", "INT64", -1, 2)], "'a b=[[0, 0]]'"),
        ([tensor("x", "BYTES", 1), tensor("y", "BOOL")], "'x=[\"\"]' y=false"),
        ([tensor("x", "INT32", -1, values="ones", open_to=2)], "'x=[1, 1]'"),
        ([PICTURE], "in/x=random:1x3x224x224"),
        ([tensor("x", "FP32", 1, 768)], "x=random"),
        ([tensor("ids", "INT64", 1, -1, open_to=16), tensor("n", "INT64")], "ids=zeros:1x16 n=0"),
        ([tensor("mask", "BOOL", 1, -1, values="ones", open_to=16)], "mask=ones:1x16"),
        ([tensor("past", "FP16", 1, 0, 64)], "past=random"),
    ],
)
def test_command_for_an_inference_runs_without_files(tensors: list[ModelTensor], values: str) -> None:
    optional = ModelTensor(name="o", datatype="FP32", shape=[1], optional=True)
    first, *_ = format_infer(
        fill(ModelInfo, id="m", state="loaded", inputs=[*tensors, optional]), ["--url", "http://h"]
    )
    assert first == f"loadledger infer --url http://h m {values}"


@pytest.mark.parametrize("name", ["a=b", "@x", "\x1b", "-o", "[", '"', 'it\'s "a"=\\', '"a"=', "\xe8=\xe8"])
def test_input_whose_name_cannot_be_typed_is_quoted(name: str) -> None:
    inputs = [tensor(name, "FP32", 1), tensor("many", "FP32", 99)]
    first, _ = format_infer(fill(ModelInfo, id="m", state="loaded", inputs=inputs))
    quoted, plain = shlex.split(first)[-2:]
    assert parse_input(quoted) == GivenInput(name, [0.0])
    assert plain == "many=random"


def test_input_that_cannot_be_sent_has_no_command() -> None:
    refused = tensor("s", "seq(tensor(float))")
    assert list(format_infer(fill(ModelInfo, id="m", state="loaded", inputs=[refused]))) == []


@pytest.mark.parametrize(("has_pillow", "file"), [(True, "@image.jpg"), (False, "@FILE.npy")])
def test_picture_is_proposed_where_pillow_is_installed(
    monkeypatch: pytest.MonkeyPatch, *, has_pillow: bool, file: str
) -> None:
    if not has_pillow:
        monkeypatch.setitem(sys.modules, "PIL", None)
    *_, second = format_infer(fill(ModelInfo, id="m", state="loaded", inputs=[PICTURE]))
    assert second == f"loadledger infer m in/x={file}"


def test_guessed_sizes_are_named_with_the_reason() -> None:
    guess = TensorExample(shape=[1, 16], values="zeros", refusal="it wants 7")
    guessed = ModelTensor(
        name="x", datatype="FP32", shape=[-1, -1, 0], dimensions=["batch", "", "n"], example=guess
    )
    said = describe_guess(fill(ModelInfo, id="m", state="loaded", inputs=[guessed, PICTURE]))
    assert said == "the answer may be a refusal (sizes are guesses: x [batch, -1, 0]): it wants 7"
    assert describe_guess(fill(ModelInfo, id="m", state="loaded", inputs=[PICTURE])) is None


def test_failed_commands_print_reason_and_advice(alice: Shell) -> None:
    reason = alice.refused(1, "load bad -w")
    assert "the load of bad version 1 failed" in reason
    assert "Frobnicate" in reason
    assert re.search(f"more: loadledger events --job {JOB.pattern}", reason)
    failed = alice.run("load", "bad", "--wait", "--json")
    job = json.loads(failed.stdout)
    assert (failed.exit_code, job["error"]["code"]) == (1, "invalid_model")
    assert "failed" in alice.refused(1, f"job {job['id']} --wait")
    assert "invalid_model" in alice.prints("jobs")
    assert "None" not in alice.prints(f"job {job['id']}")
    assert re.search(r"^bad +failed", alice.prints("models"), re.MULTILINE)
    assert "bad" not in alice.prints("ps")
    assert re.search(r"^bad +failed +invalid_model", alice.prints("top"), re.MULTILINE)
    assert [model["id"] for model in alice.json("top")["wrong"]] == ["bad"]


def test_infer_loads_model_on_demand(server: LocalApi) -> None:
    bob = Shell(server, "infer")
    assert "[2.0]" in bob.prints("infer guessed x=[1.0]")
    # The datatype comes from the model's file: of their own, whole numbers would be INT64.
    assert "[2.0]" in bob.prints("infer whole x=[1]")
    assert "no input 'z'" in bob.refused(2, "infer wrong z=[1]")
    assert "Frobnicate" in bob.refused(2, "infer bad x=[1]")
    loaded = {each["id"] for each in bob.json("ps")["models"]}
    assert {"guessed", "whole"} <= loaded
    assert "wrong" not in loaded


def test_infer_reads_and_writes_files_of_numpy(alice: Shell, tmp_path: Path) -> None:
    alice.prints("load ready --wait")
    file, out = tmp_path / "x.npy", tmp_path / "y.npz"
    np.save(file, np.array([1, 2]))
    done = alice.run("infer", "ready", f"@{file}", "--out", str(out))
    assert done.stderr == f"loadledger: x.npy: int64 [2] -> FP32 [2]\nloadledger: the outputs are in {out}\n"
    assert np.load(out)["y"].tolist() == [2.0, 3.0]
    refused = alice.refused(2, f"infer ready @{file} --out {tmp_path}/no/y.npy")
    assert "cannot be written" in refused.replace("\n", " ")


def test_infer_offers_the_size_that_worked_at_load(alice: Shell, tmp_path: Path) -> None:
    alice.prints("load sized --wait")
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.png")
    command = f"infer sized @{tmp_path / 'photo.png'}"
    offer = "it worked with 224x224 when it was loaded: for photo.png, add --size 224x224\n"
    for size in ("", "--size 30x30"):
        assert alice.refused(2, f"{command} {size}").endswith(offer)
    assert "[1, 3, 224, 224]" in alice.prints(f"{command} --size 224x224")
    assert "it worked with" not in alice.refused(2, "infer sized x=zeros:1x3x4x4")
    assert "model 'sized' has no version 9" in alice.refused(2, "infer sized/9")


# At a terminal


async def test_unload_behind_a_long_inference_offers_force(alice: Shell) -> None:
    alice.prints("load counting --wait")
    assert "no answer came within 1 s; see what it does (`loadledger top`), or wait longer" in alice.refused(
        2, f"infer counting/1 {COUNT} --timeout 1"
    )

    def is_busy() -> bool:
        return any(each["in_flight"] for each in alice.json("resources")["models"])

    await until(lambda: not is_busy())  # the first one is cancelled
    run, offer = ("infer", "counting", COUNT, "--timeout", "600"), "loadledger unload counting --force"
    with at_terminal(*run, environment=alice.environment) as inference:
        await until(is_busy)
        with at_terminal("unload", "counting/1", "--wait", environment=alice.environment) as terminal:
            await terminal.until(f"version 1 waits for 1 running inference; to end them: {offer}")
            alice.prints("unload counting --force")
            assert await terminal.end() == 0
        assert "counting version 1: unload completed" in terminal.plain
        assert await inference.end() == 2


async def test_wait_shows_stages_and_ctrl_c_detaches(alice: Shell, server: LocalApi) -> None:
    with at_terminal("load", "endless", "--wait", environment=alice.environment) as terminal:
        await terminal.until(r"endless version 1 \S+ warming up 0:\d\d:\d?[1-9]")
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
    assert "Traceback" not in terminal.plain
    again = re.search(rf"detached: .* loadledger job ({JOB.pattern}) --wait", terminal.plain, re.DOTALL)
    assert again, terminal.plain
    assert alice.json(f"job {again[1]}")["status"] == "in_progress"
    assert alice.json("job endless")["id"] == alice.json("job endless/1")["id"] == again[1]
    save(models.add(), server.config.repository, "endless", 2)
    second = alice.json("load endless/2")["id"]
    several = alice.refused(2, "cancel endless")
    assert "endless has several open jobs:\n" in several
    assert f"loadledger cancel {again[1]}  (load of endless version 1)\n" in several
    assert f"loadledger cancel {second}  (load of endless version 2)" in several
    assert "endless version 2: load" in alice.prints("cancel endless/2")
    assert "was cancelled" in alice.refused(1, f"job {second} --wait").splitlines()[-2]
    with at_terminal("job", again[1], "-w", environment=alice.environment) as terminal:
        await terminal.until("warming up")
        assert "endless" in alice.prints("cancel endless")
        assert await terminal.end() == 1
    assert "was cancelled" in terminal.plain


# Profiles and completion


def test_login_keeps_accepted_token_in_private_profile(
    alice: Shell, server: LocalApi, tmp_path: Path
) -> None:
    token, kept = server.token("infer"), tmp_path / ".config" / "loadledger" / "profile.toml"
    alice.environment |= {"HOME": str(tmp_path)}
    refused = alice.run("login", typed="nonsense\n")
    assert (refused.exit_code, kept.exists(), "401" in refused.stderr) == (2, False, True)
    untrusted = alice.run("login", typed="token\n", LOADLEDGER_CA=str(tmp_path / "none.pem"))
    assert (untrusted.exit_code, "none.pem" in untrusted.stderr) == (2, True)
    done = alice.run("login", typed=f"{token}\n")
    assert done.exit_code == 0, done.output
    assert token not in done.output
    assert [stat.S_IMODE(path.stat().st_mode) for path in (kept, kept.parent)] == [0o600, 0o700]
    bare = {"LOADLEDGER_URL": None, "LOADLEDGER_TOKEN": None}
    assert "other" in alice.prints("models", **bare)
    done = alice.run("login", "--profile=two", "--json", typed=token)
    assert json.loads(done.stdout) == {"url": server.url, "profile": str(kept.with_name("two.toml"))}
    assert "other" in alice.prints("models --profile two", **bare)


def test_completion_offers_models_and_jobs_of_server(alice: Shell) -> None:
    def offered(words: str, **environment: Any) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        asked = {"_LOADLEDGER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        result = alice.run(**asked, **environment)
        assert result.stderr == ""
        return [line.partition(",")[2] for line in result.stdout.split("\n") if line]

    alice.prints("run ready")
    assert offered("loadledger load wh") == ["whole"]
    assert {"endless", "ready"} <= set(offered("loadledger load "))
    assert "ready" in offered("loadledger unload ")
    assert "endless" not in offered("loadledger unload ")
    assert all(map(JOB.fullmatch, offered("loadledger job ")))
    assert alice.json("jobs -n 1")["jobs"][0]["id"] == offered("loadledger job ")[0]
    assert offered("loadledger load --str") == ["--strategy"]
    assert offered("loadledger load ", LOADLEDGER_TOKEN="nonsense") == []
    assert offered("loadledger load ", LOADLEDGER_URL="no url") == []
    assert {"load", "ps"} & set(offered("loadledger ")) == {"load"}
    alice.prints("kill ready")
