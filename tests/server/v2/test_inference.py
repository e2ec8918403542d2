"""Asking models over HTTP by the Open Inference Protocol v2, and all that can be wrong with a question."""

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from onnx import TensorProto
from support import models
from support.http import Json, LocalApi, when
from support.models import save
from support.workers import computing, until

from events.types import ModelLoaded, WorkerExited

Start = Callable[..., Awaitable[LocalApi]]

MIB = 2**20
RANGES = {
    **{f"INT{bits}": [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": [0, 2**bits - 1] for bits in (8, 16, 32, 64)},
}
ELEMENTS: dict[str, tuple[int, list[Json]]] = {
    **{name: (getattr(TensorProto, name), values) for name, values in RANGES.items()},
    "BOOL": (TensorProto.BOOL, [True, False]),
    "BYTES": (TensorProto.STRING, ["", "é\u0000😀"]),
    "FP32": (TensorProto.FLOAT, [1.5, -0.25]),
    "FP64": (TensorProto.DOUBLE, [1e300, -0.1]),
}
TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [models.ENDLESS]}


def floats(*values: float, name: str = "x") -> Json:
    return {"name": name, "shape": [len(values)], "datatype": "FP32", "data": list(values)}


async def computed_by(api: LocalApi, model_id: str, *inputs: Json) -> asyncio.Task[Json]:
    """Ask something that takes long, and return when the worker is at it."""
    is_computing = computing(api.worker(model_id).pid)
    running = asyncio.create_task(api.infer(model_id, *inputs))
    await until(is_computing)
    return running


# Answers


async def test_every_datatype_comes_back_as_it_went_flat_and_nested(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    for datatype, (element, values) in ELEMENTS.items():
        with subtests.test(datatype):
            save(models.identity(element, [None, None]), repository, datatype)
            await api.load(datatype)
            for data in (values, [values]):
                question = {"name": "x", "shape": [1, 2], "datatype": datatype, "data": data}
                answer = await api.infer(datatype, question)
                assert answer.json == {
                    "model_name": datatype,
                    "model_version": "1",
                    "outputs": [{"name": "y", "shape": [1, 2], "datatype": datatype, "data": values}],
                }


async def test_empty_tensors_and_scalars_are_tensors_too(api: LocalApi, repository: Path) -> None:
    save(models.identity(shape=[None, None]), repository, "m")
    save(models.identity(shape=[]), repository, "scalar")
    for model_id, shape, data in (("m", [0, 3], []), ("m", [2, 0], [[], []]), ("scalar", [], [7.5])):
        await api.load(model_id)
        question = {"name": "x", "shape": shape, "datatype": "FP32", "data": data}
        [output] = (await api.infer(model_id, question)).json["outputs"]
        assert (output["shape"], output["data"]) == (shape, [] if 0 in shape else data)


async def test_the_id_is_echoed_if_there_is_one_and_named_outputs_come_alone_and_in_their_order(
    api: LocalApi, repository: Path
) -> None:
    save(models.zip_map(), repository, "m")
    await api.load("m")
    question = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    answer = (await api.infer("m", question)).json
    assert "id" not in answer
    assert [output["name"] for output in answer["outputs"]] == ["scores"]  # the other is no tensor
    answer = (await api.infer("m", question, id="é", outputs=[{"name": "scores", "parameters": {}}])).json
    assert answer["id"] == "é"
    assert [output["name"] for output in answer["outputs"]] == ["scores"]
    assert (await api.infer("m", question, outputs=[{"name": "named"}])).refusal == (400, "invalid_input")


async def test_inputs_are_told_apart_by_their_names(api: LocalApi, repository: Path) -> None:
    save(models.subtract(), repository, "m")
    await api.load("m")
    for inputs in ([floats(5, name="a"), floats(3, name="b")], [floats(3, name="b"), floats(5, name="a")]):
        assert (await api.infer("m", *inputs)).json["outputs"][0]["data"] == [2]


async def test_the_answer_names_the_load_behind_it(api: LocalApi, repository: Path) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
        await api.load("m", version=version)
        loaded = [event for event in await api.events("m") if isinstance(event.data, ModelLoaded)][-1]
        answer = await api.infer("m", floats(1))
        assert answer.headers["Loadledger-Model"] == f"m/{version};position={loaded.position}"
        assert answer.json["model_version"] == str(version)
        assert answer.json["outputs"][0]["data"] == [1 + version]
        assert (await api.infer("m", floats(1), version=version)).status == 200


async def test_inference_appends_nothing(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    head = api.position
    assert (await api.infer("m", floats(1))).status == 200
    assert (await api.infer("m", floats(1, name="z"))).status == 400
    assert (await api.infer("nope", floats(1))).status == 404
    assert api.position == head


async def test_metadata_and_readiness_of_a_loaded_model(api: LocalApi, repository: Path) -> None:
    save(models.identity(shape=[None, 3]), repository, "m", 7)
    await api.load("m")
    for path in ("/v2/models/m", "/v2/models/m/versions/7"):
        assert (await api.get(path)).json == {
            "name": "m", "versions": ["7"], "platform": "onnxruntime_onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        }  # fmt: skip
        assert (await api.get(f"{path}/ready")).json == {"name": "m", "ready": True}


# Who is not there


async def test_a_model_that_is_not_loaded_is_503_and_the_call_that_loads_it_is_named(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    for answer in (await api.infer("m", floats(1)), await api.get("/v2/models/m")):
        assert answer.refusal == (503, "model_not_loaded")
        assert "POST /api/v1/models/m/load" in answer.json["error"]
        assert "Retry-After" in answer.headers
        assert answer.media_type == "application/json"
    assert (await api.get("/v2/models/m/ready")).refusal == (400, "not_ready")


async def test_a_version_that_is_not_the_one_that_serves_is_503_and_names_both(
    api: LocalApi, repository: Path
) -> None:
    for version in (1, 2):
        save(models.identity(), repository, "m", version)
    await api.load("m", version=1)
    for version in (2, 3):
        for answer in (
            await api.infer("m", floats(1), version=version),
            await api.get(f"/v2/models/m/versions/{version}"),
        ):
            assert answer.refusal == (503, "model_not_loaded")
            assert f"version {version} of model 'm' is not loaded, version 1 is" in answer.json["error"]
        assert (await api.get(f"/v2/models/m/versions/{version}/ready")).refusal == (400, "not_ready")


async def test_a_model_that_does_not_exist_is_404_and_not_ready(api: LocalApi) -> None:
    assert (await api.infer("nope", floats(1))).refusal == (404, "unknown_model")
    assert (await api.infer("nope", floats(1), version=1)).refusal == (404, "unknown_model")
    assert (await api.get("/v2/models/nope")).refusal == (404, "unknown_model")
    assert (await api.get("/v2/models/nope/ready")).refusal == (400, "not_ready")


async def test_a_version_that_is_no_number_is_400(api: LocalApi) -> None:
    for version in ("0", "-1", "01x", "v1", "1.0", "99999999999", "%00", "+1", "%2B1"):
        for path in (f"/v2/models/m/versions/{version}", f"/v2/models/m/versions/{version}/ready"):
            assert (await api.get(path)).refusal == (400, "invalid_parameter"), version


# Questions that are wrong

ONE = '{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}'
BAD: tuple[tuple[str | bytes, str], ...] = (
    ("", "not an inference request"),
    ("null", "not an inference request"),
    ("[]", "not an inference request"),
    ("{}", "inputs"),
    ('{"inputs": {}}', "inputs"),
    ('{"inputs": [1]}', "inputs"),
    ('{"inputs": []}', "no value for input 'x'"),
    (f'{{"inputs": [{ONE}', "truncated"),
    (f'{{"inputs": [{ONE}]}} x', "malformed"),
    (f'\ufeff{{"inputs": [{ONE}]}}', "malformed"),
    (b'{"inputs": [{"name": "\xff", "shape": [1], "datatype": "FP32", "data": [1]}]}', "decode"),
    (b"\xff\xfe", "malformed"),
    ("[" * 100_000, "not an inference request"),
    ('{"x":' * 100_000 + "1" + "}" * 100_000, "not an inference request"),
    (f'{{"inputs": [{ONE}], "x": {"[" * 100_000}{"]" * 100_000}}}', "not an inference request"),
    (ONE.replace("[1, 2]", "[" * 100_000 + "]" * 100_000), "not an inference request"),
    (ONE.replace("[1, 2]", "[NaN, 2]"), "malformed"),
    (ONE.replace("[1, 2]", "[1e999, 2]"), "out of range"),
    (ONE.replace("[1, 2]", "[1e39, 2]"), "out of the range"),
    (ONE.replace("[1, 2]", "[1, 2, 3]"), "data has shape [3], declared is [2]"),
    (ONE.replace("[1, 2]", "[1]"), "data has shape [1], declared is [2]"),
    (ONE.replace("[1, 2]", "[[1, 2]]"), "nested as its shape"),
    (ONE.replace("[1, 2]", "[1, [2]]"), "Expected `float`, got `array`"),
    (ONE.replace("[1, 2]", '["1", "2"]'), "Expected `float`, got `str`"),
    (ONE.replace("[1, 2]", "[null, 2]"), "Expected `float`, got `null`"),
    (ONE.replace("[1, 2]", "[true, 2]"), "Expected `float`, got `bool`"),
    (ONE.replace("[1, 2]", "{}"), "flat list"),
    (ONE.replace("[1, 2]", "null"), "flat list"),
    (ONE.replace(', "data": [1, 2]', ""), "data is missing"),
    (ONE.replace("[2]", "[-1]"), "$.inputs[0].shape[0]"),
    (ONE.replace("[2]", "[1.5]"), "shape"),
    (ONE.replace("[2]", "[true]"), "shape"),
    (ONE.replace("[2]", "2"), "shape"),
    (ONE.replace("[2]", "[99999999999999999999]"), "shape"),
    (ONE.replace("[2]", "[1, 2]"), "Invalid rank"),
    (ONE.replace("FP32", "FP64"), "input 'x' is FP32, not FP64"),
    (ONE.replace("FP32", "INT32"), "input 'x' is FP32, not INT32"),
    (ONE.replace("FP32", "FP16"), "FP16 cannot be sent as JSON"),
    (ONE.replace("FP32", "fp32"), "no datatype"),
    (ONE.replace('"FP32"', "1"), "datatype"),
    (ONE.replace('"x"', '"z"'), "no input 'z'"),
    (ONE.replace('"x"', '""'), "no input ''"),
    (ONE.replace('"x"', "1"), "name"),
    (ONE.replace('"x"', '"\\ud800"'), "malformed"),
    (f"{ONE}, {ONE}", "given twice"),
    (f"{ONE}, {ONE.replace('x', 'z')}", "no input 'z'"),
    (f'{{"inputs": [{ONE}], "outputs": [{{"name": "z"}}]}}', "no output 'z'"),
    (f'{{"inputs": [{ONE}], "outputs": ["y"]}}', "outputs"),
    (f'{{"inputs": [{ONE}], "id": 1}}', "id"),
    (f'{{"inputs": [{ONE}], "parameters": {{"a": [1]}}}}', "$.parameters"),
    (f'{{"inputs": [{ONE}], "parameters": {{"sequence_id": 7}}}}', "sequence_id"),
    (f'{{"inputs": [{ONE}], "parameters": {{"timeout": -1}}}}', "timeout"),
    (
        f'{{"inputs": [{ONE}], "outputs": [{{"name": "y", "parameters": {{"binary_data": 1}}}}]}}',
        "binary_data",
    ),
)


def as_body(question: str | bytes) -> bytes:
    """Return the bytes to send; an input alone becomes a question with that input."""
    if isinstance(question, bytes):
        return question
    return (f'{{"inputs": [{question}]}}' if question.startswith('{"name"') else question).encode()


async def test_a_question_that_is_wrong_is_400_says_why_and_harms_nobody(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    pid = api.worker("m").pid
    for body, reason in BAD:
        with subtests.test(str(body[:80])):
            answer = await api.post("/v2/models/m/infer", data=io.BytesIO(as_body(body)))
            assert answer.refusal == (400, "invalid_input")
            assert reason in answer.json["error"]
            assert answer.json["error"] == answer.json["detail"]
            assert len(answer.body) < 20_000
    assert (await api.infer("m", floats(1, 2))).status == 200
    assert api.worker("m").pid == pid


async def test_integers_out_of_range_and_ragged_text_are_400(api: LocalApi, repository: Path) -> None:
    save(models.identity(TensorProto.INT8), repository, "i")
    save(models.identity(TensorProto.STRING, [None, None]), repository, "s")
    for model_id, datatype, shape, data in (
        ("i", "INT8", [1], [128]),
        ("i", "INT8", [1], [-129]),
        ("i", "INT8", [1], [1.0]),
        ("i", "INT8", [1], [2**64]),
        ("i", "INT8", [1], [10**4000]),
        ("s", "BYTES", [2, 1], [["a"], ["b", "c"]]),
        ("s", "BYTES", [2, 1], [[], ["a"]]),
        ("s", "BYTES", [1, 1], [[1]]),
    ):
        await api.load(model_id)
        question = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
        assert (await api.infer(model_id, question)).refusal == (400, "invalid_input")


async def test_a_question_of_more_than_64_mebibytes_is_413_however_it_is_sent(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * MIB

    for body in (io.BytesIO(b" " * (64 * MIB + 1)), chunks(65)):
        answer = await api.post("/v2/models/m/infer", data=body)
        assert answer.refusal == (413, "body_too_large")
    assert (await api.infer("m", floats(1))).status == 200


async def test_an_answer_that_json_cannot_carry_is_said_to_be_one(api: LocalApi, repository: Path) -> None:
    save(models.subtract(), repository, "m")
    await api.load("m")
    largest = 3.4e38
    answer = await api.infer("m", floats(largest, name="a"), floats(-largest, name="b"))
    assert answer.refusal == (400, "not_representable")
    assert "'y'" in answer.json["error"]


async def test_what_the_runtime_cannot_compute_is_400_in_its_own_words(
    api: LocalApi, repository: Path
) -> None:
    save(models.subtract(), repository, "m")
    await api.load("m")
    answer = await api.infer("m", floats(1, 2, name="a"), floats(1, 2, 3, name="b"))
    assert answer.refusal == (400, "inference_failed")
    assert "ONNXRuntimeError" in answer.json["error"]
    assert (await api.infer("m", floats(1, name="a"), floats(1, name="b"))).status == 200


# Time, death and change


async def test_an_endless_inference_is_stopped_when_its_time_is_up_and_the_worker_goes_on(
    start: Start, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    api = await start(inference_timeout_s=0.3)
    await api.load("m")
    pid = api.worker("m").pid
    answer = await api.infer("m", TRIPS)
    assert answer.refusal == (504, "inference_timeout")
    assert "0.3 s" in answer.json["error"]
    assert (await api.infer("m", {**TRIPS, "data": [5]})).json["outputs"][0]["data"] == [5]
    assert api.worker("m").pid == pid


async def test_a_worker_killed_amid_an_inference_is_503_and_is_replaced(
    api: LocalApi, repository: Path
) -> None:
    save(models.counting_loop(), repository, "m")
    save(models.add(1), repository, "other")
    await api.load("m")
    await api.load("other")
    running = await computed_by(api, "m", TRIPS)
    os.kill(api.worker("m").pid, signal.SIGKILL)
    answer = await running
    assert answer.refusal == (503, "worker_died")
    assert "signal 9" in answer.json["error"]
    assert (await api.infer("other", floats(1))).status == 200
    answer = await when(lambda: api.infer("m", {**TRIPS, "data": [3]}), lambda seen: seen.status == 200)
    assert answer.json["outputs"][0]["data"] == [3]
    [exited] = await api.data_of(WorkerExited)
    assert exited.signal == signal.SIGKILL
    assert (await api.jobs())[0]["cause"] == "recovery"


async def test_a_question_that_kills_its_worker_is_503_and_the_model_comes_back(
    api: LocalApi, repository: Path
) -> None:
    save(models.crash_on_run(), repository, "m")
    await api.load("m")
    pair = [
        {"name": n, "shape": [1], "datatype": "INT64", "data": [v]}
        for n, v in (("a", models.LOWEST), ("b", -1))
    ]
    assert (await api.infer("m", *pair)).refusal == (503, "worker_died")
    pair[0]["data"] = [8]
    answer = await when(lambda: api.infer("m", *pair), lambda seen: seen.status == 200)
    assert answer.json["outputs"][0]["data"] == [-8]


async def test_one_model_s_long_inference_holds_up_neither_other_models_nor_health(
    api: LocalApi, repository: Path
) -> None:
    save(models.counting_loop(), repository, "slow")
    save(models.identity(), repository, "quick")
    await api.load("slow")
    await api.load("quick")
    running = await computed_by(api, "slow", TRIPS)
    assert (await api.infer("quick", floats(1))).status == 200
    assert (await api.get("/health/ready")).status == 200
    assert not running.done()
    await api.unload("slow", force=True)
    assert (await running).status == 503


async def test_no_inference_fails_while_versions_are_swapped(api: LocalApi, repository: Path) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    await api.load("m", version=1)
    swapping = True
    seen = set()

    async def ask() -> None:
        while swapping:
            answer = await api.infer("m", floats(1))
            assert answer.status == 200, answer.body
            version = int(answer.json["model_version"])
            assert answer.json["outputs"][0]["data"] == [1 + version]
            seen.add(version)

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    for turn in range(20):
        await api.load("m", version=1 + (turn + 1) % 2)
    swapping = False
    await asyncio.gather(*asking)
    assert seen == {1, 2}


async def test_a_question_that_arrives_slowly_does_not_notice_that_the_version_was_swapped_meanwhile(
    api: LocalApi, repository: Path
) -> None:
    for version in (1, 2):
        save(models.add(version), repository, "m", version)
    await api.load("m", version=1)
    old, swapped = api.worker("m"), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"inputs": [{"name": "x", "shape": [1], '
        await swapped.wait()
        yield b'"datatype": "FP32", "data": [1]}]}'

    asking = asyncio.create_task(api.post("/v2/models/m/infer", data=slowly()))
    await api.load("m", version=2)
    await asyncio.wait({old.ended})
    swapped.set()
    answer = await asking
    assert answer.status == 200
    assert answer.json["outputs"][0]["data"] == [3]


async def test_many_questions_at_once_are_each_answered_with_their_own_answer(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(1), repository, "m")
    await api.load("m")
    answers = await asyncio.gather(*(api.infer("m", floats(i), id=str(i)) for i in range(100)))
    assert [(answer.json["id"], answer.json["outputs"][0]["data"]) for answer in answers] == [
        (str(i), [i + 1.0]) for i in range(100)
    ]
