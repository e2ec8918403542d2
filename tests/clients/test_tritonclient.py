"""Triton's client for HTTP, unchanged, through all of its calls, against the server as a process."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from support import models
from support.clientmodels import CLIENT_MODELS, ELEMENTS, sample, serving_client_models
from support.process import Server
from support.standing import address, bearer
from tritonclient.utils import InferenceServerException

FORMS = [
    (datatype, binary_in, binary_out)
    for datatype in ELEMENTS
    for binary_in in (True, False)
    for binary_out in (True, False)
    if datatype not in ("FP16", "BF16") or (binary_in and binary_out)  # these have no form in JSON
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_client_models(tmp_path_factory.mktemp("clients")) as server:
        yield server


@pytest.fixture
def admin(server: Server) -> dict[str, str]:
    return bearer(server, "admin")


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(server), concurrency=4) as client:
        yield client


def an_input(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def floats(name: str, *values: float, binary: bool = True) -> triton.InferInput:
    return an_input(name, np.array(values, np.float32), binary=binary)


def elements(array: Any) -> list[Any]:
    """Return what an array holds; text as text, since the client gives it as bytes."""
    return [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]


def test_health_needs_no_token(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()


def test_a_model_is_ready_when_it_is_loaded(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    assert client.is_model_ready("subtract", headers=admin)
    assert client.is_model_ready("subtract", "1", headers=admin)
    assert not client.is_model_ready("subtract", "2", headers=admin)
    assert not client.is_model_ready("idle", headers=admin)
    assert not client.is_model_ready("nothing", headers=admin)


def test_the_server_says_who_it_is_and_which_extensions_it_has(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    about = client.get_server_metadata(headers=admin)
    assert about["name"] == "loadledger"
    assert {"binary_tensor_data", "model_repository", "model_configuration", "statistics"} <= set(
        about["extensions"]
    )
    assert not [name for name in about["extensions"] if "shared_memory" in name]


@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_says_what_it_takes_and_gives(
    client: triton.InferenceServerClient, admin: dict[str, str], version: str
) -> None:
    about = client.get_model_metadata("subtract", version, headers=admin)
    assert (about["name"], about["versions"]) == ("subtract", ["1"])
    assert [item["name"] for item in about["inputs"]] == ["a", "b"]
    assert about["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1]}]
    config = client.get_model_config("subtract", version, headers=admin)
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("subtract", "onnxruntime", 0)
    assert [item["data_type"] for item in config["input"]] == ["TYPE_FP32", "TYPE_FP32"]


@pytest.mark.parametrize(("datatype", "binary_in", "binary_out"), FORMS)
def test_every_datatype_comes_back_as_it_went(
    client: triton.InferenceServerClient,
    admin: dict[str, str],
    datatype: str,
    *,
    binary_in: bool,
    binary_out: bool,
) -> None:
    array = sample(datatype)
    if "FP" in datatype and not (binary_in and binary_out):
        array[~np.isfinite(array)] = 7  # JSON has no infinity
    given = an_input("x", array, datatype, binary=binary_in)
    wanted = triton.InferRequestedOutput("y", binary_data=binary_out)
    result = client.infer(f"identity-{datatype}", [given], outputs=[wanted], headers=admin)
    assert elements(result.as_numpy("y")) == elements(array)
    assert result.as_numpy("y").shape == (2, 3)
    assert ("data" in result.get_output("y")) is not binary_out


def test_inputs_and_outputs_may_be_bytes_and_json_in_one_request(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    for first, second, binary in ((True, False, False), (False, True, True), (False, False, True)):
        inputs = [floats("a", 5, 7, binary=first), floats("b", 2, 3, binary=second)]
        outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
        headers = dict(admin)  # the client writes what it sends into it, and a length stays there
        result = client.infer("subtract", inputs, outputs=outputs, headers=headers)
        assert result.as_numpy("y").tolist() == [3, 4]


def test_without_outputs_all_come_and_as_bytes(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    result = client.infer("subtract", [floats("b", 1), floats("a", 3)], headers=admin)
    assert result.as_numpy("y").tolist() == [2]
    assert result.get_output("y")["parameters"] == {"binary_data_size": 4}


def test_the_request_id_and_what_answered_come_with_the_answer(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    result = client.infer(
        "subtract", [floats("a", 1), floats("b", 1)], model_version="1", request_id="seven", headers=admin
    )
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("seven", "subtract", "1")


@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
def test_requests_and_answers_may_be_compressed(
    client: triton.InferenceServerClient, admin: dict[str, str], there: str | None, back: str | None
) -> None:
    array = np.arange(5000, dtype=np.float32).reshape(100, 50)
    result = client.infer(
        "identity-FP32",
        [an_input("x", array)],
        headers=admin,
        request_compression_algorithm=there,
        response_compression_algorithm=back,
    )
    assert result.as_numpy("y").tolist() == array.tolist()


def test_many_can_be_asked_at_once(client: triton.InferenceServerClient, admin: dict[str, str]) -> None:
    asked = [
        client.async_infer("subtract", [floats("a", number), floats("b", 1)], headers=admin)
        for number in range(20)
    ]
    assert [one.get_result().as_numpy("y")[0] for one in asked] == [number - 1 for number in range(20)]


def test_a_body_made_by_the_client_can_be_sent_by_anything(
    client: triton.InferenceServerClient, server: Server, admin: dict[str, str]
) -> None:
    body, length = triton.InferenceServerClient.generate_request_body([floats("a", 5), floats("b", 2)])
    headers = admin | {"Inference-Header-Content-Length": str(length)}
    answer = client._post("v2/models/subtract/infer", body, headers, None)
    assert answer.get("Loadledger-Model", "").startswith("subtract/1;position=")
    header = int(answer.get("Inference-Header-Content-Length"))
    result = triton.InferenceServerClient.parse_response_body(answer.read(), header_length=header)
    assert result.as_numpy("y").tolist() == [3]
    assert server.process.returncode is None


def test_a_run_past_its_timeout_is_stopped_and_the_next_is_answered(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    endless = an_input("trips", np.array(models.ENDLESS, np.int64), "INT64")
    with pytest.raises(InferenceServerException, match="did not end within"):
        client.infer("loop", [endless], timeout=100_000, headers=admin)
    result = client.infer("loop", [an_input("trips", np.array(3, np.int64), "INT64")], headers=admin)
    assert result.as_numpy("count").tolist() == 3


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient, admin: dict[str, str]) -> None:
    def count(version: str = "") -> int:
        (stats,) = client.get_inference_statistics("subtract", version, headers=admin)["model_stats"]
        number: int = stats["inference_stats"]["success"]["count"]
        return number

    before = count()
    client.infer("subtract", [floats("a", 1), floats("b", 1)], headers=admin)
    assert (count(), count("1")) == (before + 1, before + 1)
    every = client.get_inference_statistics(headers=admin)["model_stats"]
    assert {stats["name"] for stats in every} >= set(CLIENT_MODELS)


def state_of(client: triton.InferenceServerClient, name: str, headers: dict[str, str]) -> dict[str, str]:
    index = client.get_model_repository_index(headers=headers)
    (found,) = [entry for entry in index if entry["name"] == name]
    entry: dict[str, str] = found
    return entry


def test_a_model_is_loaded_unloaded_and_loaded_again(
    client: triton.InferenceServerClient, server: Server, admin: dict[str, str]
) -> None:
    models.save(models.add(1), server.api.config.repository, "again")
    assert state_of(client, "again", admin) == {"name": "again"}
    for _ in range(2):
        client.load_model("again", headers=admin)
        assert state_of(client, "again", admin) == {"name": "again", "version": "1", "state": "READY"}
        assert client.infer("again", [floats("x", 1)], headers=admin).as_numpy("y").tolist() == [2]
        client.unload_model("again", headers=admin)
        entry = {"name": "again", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        assert state_of(client, "again", admin) == entry
    client.unload_model("again", headers=admin)  # there is nothing to do
    with pytest.raises(InferenceServerException, match="not loaded"):
        client.infer("again", [floats("x", 1)], headers=admin)


def test_a_load_may_bring_a_configuration(
    client: triton.InferenceServerClient, server: Server, admin: dict[str, str]
) -> None:
    models.save(models.identity(models.FLOAT, [None, 2]), server.api.config.repository, "batched")
    config = {"max_batch_size": 4, "instance_group": [{"count": 2}], "dynamic_batching": {}}
    client.load_model("batched", headers=admin, config=json.dumps(config))
    found = client.get_model_config("batched", headers=admin)
    assert (found["max_batch_size"], found["instance_group"][0]["count"]) == (4, 2)
    array = np.ones((3, 2), np.float32)
    assert client.infer("batched", [an_input("x", array)], headers=admin).as_numpy("y").shape == (3, 2)
    client.unload_model("batched", headers=admin)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": '{"optimization": {}}'}, "optimization"),
        ({"config": "{}", "files": {"file:1/model.onnx": b"x"}}, "file:1/model.onnx"),
        ({"config": "[]"}, "JSON object"),
    ],
    ids=["a member that is not ours", "files", "no object"],
)
def test_what_a_load_cannot_do_is_refused_by_its_name(
    client: triton.InferenceServerClient, admin: dict[str, str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InferenceServerException, match=words):
        client.load_model("idle", headers=admin, **options)


def test_a_failed_load_says_what_the_runtime_said(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    with pytest.raises(InferenceServerException, match="load failed for model 'corrupt'") as raised:
        client.load_model("corrupt", headers=admin)
    assert raised.value.status() == "400"
    assert "protobuf" in raised.value.message().lower()
    assert state_of(client, "corrupt", admin)["state"] == "UNAVAILABLE"


def refused(call: Any, *arguments: Any, **named: Any) -> tuple[str | None, str]:
    """Call, and return status and message of the exception that has to come."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **named)
    return raised.value.status(), raised.value.message()


def test_what_is_not_there_is_said(client: triton.InferenceServerClient, admin: dict[str, str]) -> None:
    inputs = [floats("x", 1)]
    assert refused(client.load_model, "nothing", headers=admin)[0] == "404"
    assert refused(client.infer, "nothing", inputs, headers=admin)[0] == "404"
    assert refused(client.infer, "idle", inputs, headers=admin)[0] == "503"
    assert refused(client.get_model_metadata, "idle", headers=admin)[0] == "503"
    assert refused(client.get_model_config, "nothing", headers=admin)[0] == "404"
    assert refused(client.get_inference_statistics, "nothing", headers=admin)[0] == "404"


def test_a_wrong_request_is_told_from_a_wrong_server(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    status, message = refused(client.infer, "subtract", [floats("a", 1)], headers=admin)
    assert status == "400"
    assert "'b'" in message
    status, message = refused(client.infer, "subtract", [floats("c", 1)], headers=admin)
    assert status == "400"
    assert "'c'" in message


@pytest.mark.parametrize(
    ("option", "value", "word"), [("priority", 1, "priority"), ("sequence_id", 3, "sequence_id")]
)
def test_what_is_not_done_is_refused_and_not_ignored(
    client: triton.InferenceServerClient, admin: dict[str, str], option: str, value: int, word: str
) -> None:
    inputs = [floats("a", 1), floats("b", 1)]
    status, message = refused(client.infer, "subtract", inputs, headers=admin, **{option: value})
    assert status == "400"
    assert word in message


def test_extensions_that_are_not_there_give_clean_errors(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    for call, arguments in (
        (client.get_system_shared_memory_status, ()),
        (client.register_system_shared_memory, ("region", "/key", 64)),
        (client.unregister_system_shared_memory, ()),
        (client.get_cuda_shared_memory_status, ()),
        (client.register_cuda_shared_memory, ("region", b"handle", 0, 64)),
        (client.unregister_cuda_shared_memory, ()),
        (client.get_trace_settings, ()),
        (client.update_trace_settings, ()),
        (client.get_log_settings, ()),
        (client.update_log_settings, ({},)),
    ):
        status, message = refused(call, *arguments, headers=admin)
        assert status == "404"
        assert message
    shared = triton.InferInput("a", [1], "FP32")
    shared.set_shared_memory("region", 4)
    status, message = refused(client.infer, "subtract", [shared, floats("b", 1)], headers=admin)
    assert status == "400"
    assert "shared memory" in message


def test_a_token_is_asked_for_and_its_roles_are_held_to(
    client: triton.InferenceServerClient, server: Server
) -> None:
    inputs = [floats("a", 1), floats("b", 1)]
    assert refused(client.infer, "subtract", inputs)[0] == "401"
    assert refused(client.load_model, "idle")[0] == "401"
    assert refused(client.load_model, "idle", headers=bearer(server, "predict"))[0] == "403"
    assert refused(client.infer, "subtract", inputs, headers=bearer(server, "audit"))[0] == "403"
    assert client.infer("subtract", inputs, headers=bearer(server, "predict")).as_numpy("y").tolist() == [0]


def test_a_plugin_sends_the_token_with_every_call(
    client: triton.InferenceServerClient, server: Server
) -> None:
    class Bearer(triton.InferenceServerClientPlugin):  # type: ignore[misc]
        def __call__(self, request: Any) -> None:
            request.headers.update(bearer(server, "predict"))

    client.register_plugin(Bearer())
    assert client.get_server_metadata()["name"] == "loadledger"
    assert client.infer("subtract", [floats("a", 2), floats("b", 1)]).as_numpy("y").tolist() == [1]
