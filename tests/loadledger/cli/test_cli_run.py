"""`run` with files, on a real server: how it names a model, when it asks, and the commands that it prints."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from onnx import ModelProto, TensorProto, helper
from support import models
from support.clients import lost_output, printed_json, run_command
from support.http import LocalApi
from support.models import FLOAT, model, save, value
from support.servers import CTRL_C, at_terminal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def alice(server: LocalApi) -> dict[str, Any]:
    """The variables of an admin's commands."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
    return {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": server.token("admin"), "PATH": path}


def write(path: Path, onnx_model: ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(onnx_model.SerializeToString())
    return path


def halves(*also: int) -> ModelProto:
    """`y = x` in FP16, and the same in other types beside it."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    nodes += [helper.make_node("Cast", ["x"], [f"y{at}"], to=element) for at, element in enumerate(also)]
    outputs = [value(f"y{at}", element, [None]) for at, element in enumerate(also)]
    half = TensorProto.FLOAT16
    return model(nodes, [value("x", half, [None])], [value("y", half, [None]), *outputs])


def oddly_named(length: int) -> ModelProto:
    """`y = a=b + @x`."""
    inputs = [value(name, FLOAT, [length]) for name in ("a=b", "@x")]
    return model([helper.make_node("Add", ["a=b", "@x"], ["y"])], inputs, [value("y", FLOAT, [length])])


def names_in(ran: Result) -> str:
    assert ran.exit_code == 0, ran.output
    return ran.stdout.partition(":")[0]


def test_a_file_that_is_run_again_adds_nothing(alice: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "again.onnx", models.add())
    assert names_in(run_command("run", file, **alice)) == "again version 1"
    assert run_command("run", file, **alice).stdout.startswith("again version 1: loaded\n")
    write(file, models.add(2))  # another version, whose file says its name, with the same inputs and outputs
    assert names_in(run_command("run", file, **alice)) == "again version 2"
    write(file, models.add())
    assert run_command("run", file, **alice).stdout.startswith("again version 1: loaded\n")


def test_no_other_model_is_replaced_without_asking(alice: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "cars"
    for name in ("best.onnx", "weights/best.onnx", "model_quantized.onnx", "1.onnx", "分類器.onnx"):
        write(folder / name, models.add(len(name)))
    assert names_in(run_command("run", folder / "best.onnx", **alice)) == "cars version 1"
    for name in ("weights/best.onnx", "model_quantized.onnx", "1.onnx", "分類器.onnx"):
        refused = run_command("run", folder / name, **alice)
        assert (refused.exit_code, refused.stdout) == (1, ""), name
        assert "only that of a folder" in refused.stderr
        assert "--name cars to add it as version 2" in refused.stderr
    ran = run_command("run", folder / "1.onnx", "--name", "cars", **alice)
    assert names_in(ran) == "cars version 2"
    other = write(tmp_path / "cars.onnx", models.subtract())
    refused = run_command("run", other, **alice)
    assert (refused.exit_code, "with other inputs or outputs" in refused.stderr) == (1, True)
    assert names_in(run_command("run", other, "--name", "bikes", **alice)) == "bikes version 1"


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("sizes.onnx", models.identity(shape=[1, 10]), models.identity(shape=[1, 1000])),
        ("types.onnx", models.identity(), models.identity(TensorProto.DOUBLE)),
        ("berts/decoder_model.onnx", models.add(1), models.add(2)),
        ("分類器-bird.onnx", models.add(1), models.add(2)),
    ],
)
def test_name_alone_makes_no_version_of_another_model(
    alice: dict[str, Any], tmp_path: Path, name: str, first: ModelProto, second: ModelProto
) -> None:
    file = write(tmp_path / name, first)
    added = names_in(run_command("run", file, **alice))
    assert added.endswith(" version 1")
    write(file, second)
    refused = run_command("run", file, **alice)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"there is a model {added.removesuffix(' version 1')} already" in refused.stderr


async def test_a_person_at_a_terminal_is_asked(alice: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "trains" / "best.onnx", models.add())
    write(tmp_path / "trains" / "last.onnx", models.add(2))
    await asyncio.to_thread(run_command, "run", tmp_path / "trains" / "best.onnx", **alice)
    for answer, code, words in (("n\r", 1, "give this one a name"), ("y\r", 0, "trains version 2: loaded")):
        with at_terminal("run", str(tmp_path / "trains" / "last.onnx"), environment=alice) as terminal:
            await terminal.until(r"add this as its version 2\?")
            terminal.press(answer.encode())
            assert await terminal.end() == code
            assert words in terminal.plain


async def test_ctrl_c_at_the_question_stops_the_server(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    save(models.add(), repository, "boats")
    file = str(write(tmp_path / "boats" / "best.onnx", models.add(2)))
    places = {"LOADLEDGER_REPOSITORY": str(repository), "LOADLEDGER_DATA": str(tmp_path / "data")}
    settings = {"HOME": str(tmp_path), "LOADLEDGER_PORT": "0", "LOADLEDGER_VISIBLE_DEVICES": "none"}
    with at_terminal("run", file, environment=places | settings) as terminal:
        await terminal.until(r"add this as its version 2\?")
        terminal.press(CTRL_C)
        assert await terminal.end() == 0
    assert sorted(each.name for each in (repository / "boats").iterdir()) == ["1"]


def test_a_link_has_the_name_that_was_typed(alice: dict[str, Any], tmp_path: Path) -> None:
    blob = write(tmp_path / "models--org--tiny-bert" / "blobs" / "0123456789abcdef", models.add())
    link = tmp_path / "models--org--tiny-bert" / "snapshots" / COMMIT / "onnx" / "model.onnx"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert names_in(run_command("run", link, **alice)) == "tiny-bert version 1"


def test_a_version_that_lies_in_the_repository_is_used(alice: dict[str, Any], server: LocalApi) -> None:
    repository = server.config.repository
    for name in ("laid", "best"):  # the second says nothing
        for number in (1, 2):
            save(models.add(number), repository, name, number)
        ran = run_command("run", repository / name / "1" / "model.onnx", **alice)
        assert (names_in(ran), "added" in ran.stdout) == (f"{name} version 1", False)
        assert names_in(run_command("run", repository / name / "2", **alice)) == f"{name} version 2"
        assert sorted(each.name for each in (repository / name).iterdir()) == ["1", "2"]


CURLS = {
    "halves": halves(),
    "halves-beside": halves(FLOAT, TensorProto.INT64),
    "bfloats": models.identity(TensorProto.BFLOAT16, (2,)),
    "equals": oddly_named(2),
    "equals-long": oddly_named(64),
}


@pytest.mark.parametrize("name", CURLS)
def test_printed_commands_answer(alice: dict[str, Any], tmp_path: Path, name: str) -> None:
    ran = run_command("run", write(tmp_path / f"{name}.onnx", CURLS[name]), **alice)
    [infer, *_] = [line for line in ran.stdout.splitlines() if line.startswith("loadledger infer")]
    command = ran.stdout.strip().split("\n\n")[-1]
    is_binary = not name.startswith("equals")
    assert ("--output answer.bin" in command) is command.startswith("# answer.bin gets ") is is_binary
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=alice, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    answered = (tmp_path / "answer.bin").read_bytes() if is_binary else done.stdout
    head, _ = json.JSONDecoder().raw_decode(answered.decode("latin-1"))  # binary outputs follow
    assert {each["name"] for each in head["outputs"]} >= {"y"}
    _, *words = shlex.split(infer)
    assert {each["name"] for each in printed_json(*words, **alice)["outputs"]} >= {"y"}


# Output that nobody reads


@pytest.mark.parametrize(("place", "code"), [("pipe", 141), ("/dev/full", 1)])
@pytest.mark.parametrize(
    "typed", ["models", "models --json", "jobs", "events", "events --json", "resources", "run kept.onnx"]
)
def test_lost_output_ends_a_list_as_cat(
    alice: dict[str, Any], tmp_path: Path, typed: str, place: str, code: int
) -> None:
    write(tmp_path / "kept.onnx", models.add())
    done = end_without_output(typed, place, tmp_path, **alice)
    said = b"loadledger: write error: No space left on device\n" if code == 1 else b""
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(("place", "code"), [("pipe", 141), ("/dev/full", 1)])
def test_lost_output_stops_the_server_of_run(tmp_path: Path, place: str, code: int) -> None:
    write(tmp_path / "own.onnx", models.add())
    done = end_without_output("run own.onnx", place, tmp_path, HOME=str(tmp_path), LOADLEDGER_PORT="0")
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def end_without_output(
    typed: str, place: str, folder: Path, **environment: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a folder whose output cannot be written; it ends by itself."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("LOADLEDGER_")}
    with lost_output(place) as output:
        return subprocess.run(
            [sys.executable, "-P", "-m", "loadledger", *typed.split()],
            env={**kept, **environment},
            cwd=folder,
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
