"""Loading a model in a worker: what the load reports, what it refuses, and its memory limit."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from onnx import ModelProto, helper
from support import models
from support.models import save, save_bytes
from support.workers import (
    TAKE_ALL_MEMORY,
    Serve,
    answer,
    ask,
    floats,
    load,
    loaded_memory,
    order_of,
    refusal,
    running_pool,
    threads,
)

from runtime import wire
from runtime.process.pool import WorkerPool
from runtime.wire import MAX_PAYLOAD_BYTES, Example, TensorSpec
from runtime.worker.declaredsizes import explain_uselessness


async def test_load_reports_shapes_memory_and_durations(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.weights(8), tmp_path, "m")
    stages: list[str] = []
    worker, report = await load(pool, order_of(tmp_path), on_stage=stages.append)
    assert report.inputs == (TensorSpec("x", "FP32", (-1, 500), example=Example((1, 500), "zeros")),)
    assert report.outputs == (TensorSpec("y", "FP32", (-1, 500)),)
    seen_by_server = loaded_memory(worker)
    assert min(report.loading_us, report.warming_up_us or 0) > 0
    assert stages == ["loading", "warming_up", "measuring"]
    assert seen_by_server.peak_memory_bytes >= seen_by_server.memory_bytes > 8_000_000
    assert seen_by_server.measuring_us > 0
    assert abs(await worker.measure() - seen_by_server.memory_bytes) < 4 * 2**20


async def test_external_data_is_loaded(pool: WorkerPool, tmp_path: Path) -> None:
    """Of the version that was resolved, which need not be the highest."""
    folder = save(models.external("data/w.bin"), tmp_path, "m")
    (folder / "data").mkdir()
    (folder / "data" / "w.bin").write_bytes(models.external_bytes())
    save(models.add(), tmp_path, "m", 2)
    worker, _ = await load(pool, order_of(tmp_path, version=1))
    assert await answer(worker, floats("x", 1, 1, 1, 1)) == [1, 2, 3, 4]


def with_long_name() -> ModelProto:
    model = models.identity()
    model.graph.input[0].name = model.graph.node[0].input[0] = "x" * (wire.MAX_NAME_CHARACTERS + 1)
    return model


def with_long_names() -> ModelProto:
    """Return a model whose inputs take more than a message to describe; it uses one of them."""
    model = models.identity()
    names = (f"{'x' * 4000}{number}" for number in range(wire.MAX_REPORT_BYTES // 4000))
    model.graph.input.extend(models.value(name, models.FLOAT, [1]) for name in names)
    return model


def with_outputs(count: int) -> ModelProto:
    names = [f"y{number}" for number in range(count)]
    split = helper.make_node("Split", ["x"], names, num_outputs=count)
    outputs = [models.value(name, models.FLOAT, [1]) for name in names]
    return models.model([split], [models.value("x", models.FLOAT, [count])], outputs)


def not_utf8() -> bytes:
    data: bytes = models.identity().SerializeToString()
    return data.replace(b"\x01x", b"\x01\xff")


def of_operator(operator: str, domain: str = "", element: int = models.FLOAT) -> ModelProto:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    made = models.model([node], [models.value("x", element, [1])], [models.value("y", element, [1])])
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def versioned(*, ir_version: int = models.IR_VERSION, opset: int = models.OPSET) -> ModelProto:
    made = models.identity()
    made.ir_version = ir_version
    made.opset_import[0].version = opset
    return made


REFUSED: dict[str, tuple[Callable[[], ModelProto | bytes], int | None, str, str]] = {
    "text": (lambda: models.TEXT, None, "invalid_model", "model.onnx is a text and no model"),
    "long tag": (
        lambda: models.behind_a_long_tag(models.identity()), None, "invalid_model", "is not an ONNX file",
    ),
    "name not UTF-8": (not_utf8, None, "invalid_model", "not UTF-8"),
    "name too long": (with_long_name, None, "invalid_model", "characters"),
    "names too long": (with_long_names, None, "invalid_model", "bytes are supported"),
    "outputs": (lambda: with_outputs(wire.MAX_OUTPUTS + 1), None, "invalid_model", "at most 4096 outputs"),
    "data outside": (lambda: models.external("../../secret"), None, "unsafe_file", "secret"),
    "missing data": (lambda: models.external("missing"), None, "invalid_model", "data 'missing' is missing"),
    "sequence": (models.sequence_input, None, "invalid_model", "by SequenceConstruct"),
    "too large a request": (
        lambda: models.identity(shape=(None, 2**20, 600)), None, "invalid_model", "let it take less at once",
    ),
    "memory bomb": (models.memory_bomb_on_load, 200_000_000, "out_of_memory", "limit_bytes are 200000000"),
    "limit 0": (lambda: models.weights(8), 0, "out_of_memory", ""),
    "limit below the worker": (lambda: models.weights(8), 100_000, "out_of_memory", ""),
    "limit below the model": (lambda: models.weights(8), 2_000_000, "out_of_memory", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_load_is_refused_with_code_and_reason(pool: WorkerPool, tmp_path: Path, case: str) -> None:
    model, limit_bytes, code, words = REFUSED[case]
    built, root = model(), tmp_path / "root"
    save_bytes(built if isinstance(built, bytes) else built.SerializeToString(), root, "m")
    (root / "secret").write_bytes(models.external_bytes())
    refused = await refusal(pool, order_of(root, memory_limit_bytes=limit_bytes))
    assert refused.code == code
    assert words in str(refused)


BY_ONNX_RUNTIME = {
    "IR version": (versioned(ir_version=99), "the file has IR version 99", "or update onnxruntime"),
    "opset": (versioned(opset=99), "opset 99 of ai.onnx", "or lower, or update onnxruntime"),
    "no operator": (of_operator("Frobnicate"), "has no operator Frobnicate", "with a newer opset"),
    "later operator": (of_operator("Swish"), "opset 18, which", "with a newer opset"),
    "custom operator": (of_operator("Foo", "com.acme"), "the operator Foo of com.acme", "standard operators"),
    "datatype": (of_operator("Erf", element=models.BOOL), "tensor(bool) to the operator Erf", "FP32"),
}


@pytest.mark.parametrize(("model", "wrong", "cure"), BY_ONNX_RUNTIME.values(), ids=list(BY_ONNX_RUNTIME))
async def test_refused_model_says_what_is_wrong_and_the_cure_first(
    pool: WorkerPool, tmp_path: Path, model: ModelProto, wrong: str, cure: str
) -> None:
    save(model, tmp_path, "m")
    refused = await refusal(pool, order_of(tmp_path))
    plain, says, original = str(refused).partition(" ONNX Runtime says: ")
    assert wrong in plain
    assert cure in plain
    assert (refused.code, says != "") == ("invalid_model", True)
    for noise in ("[ONNXRuntimeError]", "onnxruntime_src", str(tmp_path), "Load model from"):
        assert noise not in original


WITHOUT_MEMORY = f"""
import sys
from runtime.errors import LoadRefused
from runtime.wire import Load
from runtime.worker import loading
from runtime.worker.warmup import SearchLimit

load = Load(sys.argv[1], sys.argv[1], 1, threads=1)
limit = SearchLimit()
{TAKE_ALL_MEMORY}
try:
    loading.load(load, (), limit, lambda _: None)
except LoadRefused as refused:
    print(refused.code, refused)
"""


def test_folder_that_cannot_be_listed_for_lack_of_memory_is_no_change(tmp_path: Path) -> None:
    """Whatever the heap has left decides which call lacks memory first; this one leaves nothing."""
    folder = save(models.add(), tmp_path / "root", "m")
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, str(folder)],
        check=True, capture_output=True, text=True, timeout=120,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    codes = [line.split()[0] for line in ran.stdout.splitlines()]
    assert codes == ["out_of_memory"], ran.stdout


async def test_most_outputs_are_answered(serve: Serve) -> None:
    worker = await serve(with_outputs(wire.MAX_OUTPUTS))
    assert len(await ask(worker, [floats("x", *range(wire.MAX_OUTPUTS))])) == wire.MAX_OUTPUTS


async def test_external_data_hidden_from_our_parser_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    """Neither from the model's folder nor, as ONNX Runtime does by default, from the working directory."""
    folder = save(models.add(), tmp_path, "m")
    for place in (folder, tmp_path):
        (place / "w.bin").write_bytes(models.external_bytes())
    monkeypatch.chdir(folder)
    async with running_pool() as pool:  # a worker has the fork server's working directory
        for location in ("w.bin", "../../w.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*"):
            with subtests.test(location):
                save_bytes(models.behind_a_long_tag(models.external(location)), tmp_path, "m")
                refused = await refusal(pool, order_of(tmp_path))
                assert refused.code == "invalid_model"
                assert "external" in str(refused).lower()


async def test_memory_limit_leaves_room_for_threads(serve: Serve) -> None:
    """A session that cannot start all of its threads would never be created."""
    worker = await serve(models.add(), threads=40, memory_limit_bytes=20 * 2**20)
    assert threads(worker.pid) == 41
    assert await answer(worker, floats("x", 1)) == [2]


# Models that no request can ask, by their declared inputs and outputs


LIMIT = 64 * 2**20
X = TensorSpec("x", "FP32", (1,))
MAPS = TensorSpec("m", "seq(map(int64,tensor(float)))", ())
SEQUENCE = TensorSpec("s", "seq(tensor(float))", ())
FLOAT8 = TensorSpec("f", "tensor(float8e4m3fn)", (1,))
PICTURE = TensorSpec("p", "FP32", (-1, 3, 2160, 3840))
PAST = TensorSpec("past", "FP16", (-1, 8, -1, 64), dimensions=("batch", "", "past", ""))
HUGE = TensorSpec("h", "FP32", (-1, MAX_PAYLOAD_BYTES))
FIXED = TensorSpec("h", "FP32", (1, MAX_PAYLOAD_BYTES))


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([X], [X, MAPS], None),
        ([X], [SEQUENCE, FLOAT8, X], None),
        ([X], [MAPS], "no answer can have output 'm', which is a seq(map(int64,tensor(float))): convert"),
        ([X], [SEQUENCE], "SequenceAt"),
        ([X], [FLOAT8], "end the graph with a Cast"),
        ([X], [TensorSpec("y", "FP32", (1,) * 65)], "output 'y' its 65 dimensions, of at most 64"),
        ([X, TensorSpec("o", "optional(seq(tensor(float)))", (), optional=True)], [X], None),
        ([X, SEQUENCE], [X], "no request can give input 's'"),
        ([PICTURE], [X], "99532800 bytes, and a request may have 67108864: start the server with --max-req"),
        ([X, PAST], [X], None),
        ([TensorSpec("x", "BYTES", (2**24 + 1,))], [X], "--max-request-size=65MiB"),
        ([TensorSpec("x", "FP32", (2**29,))], [X], "let it take less at once"),
        ([X], [HUGE], None),  # it may be empty
        ([X], [FIXED, X], None),
        ([X], [FIXED], "its smallest output has 1073741824 bytes, and an answer may have 268435456: let"),
    ],
)
def test_model_that_no_request_can_ask_is_explained(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], words: str | None
) -> None:
    reason = explain_uselessness(inputs, outputs, LIMIT)
    assert (reason is None) if words is None else (reason is not None and words in reason)
