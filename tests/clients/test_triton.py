"""What only Triton's clients ask: metadata, compression, statistics, the index, refusals, plugins."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from support import models
from support.clientmodels import CLIENT_MODELS, floats, tensor
from support.clients import Blocked
from support.process import Server
from support.standing import bearer
from tritonclient.utils import InferenceServerException


@pytest.fixture
def admin(server: Server) -> dict[str, str]:
    return bearer(server, "admin")


@pytest.fixture(params=["sync", "aio"])
def client(request: pytest.FixtureRequest, triton_clients: dict[str, Any]) -> Any:
    return triton_clients[request.param]


def refusal(call: Any, *arguments: Any, **named: Any) -> tuple[int, str]:
    """Return status and message of the exception that a call must raise."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **named)
    return int(raised.value.status()), raised.value.message()


def test_metadata_and_configuration_name_inputs_and_outputs(client: Any, admin: dict[str, str]) -> None:
    about = client.get_server_metadata(headers=admin)
    assert about["name"] == "loadledger"
    extensions = {"binary_tensor_data", "model_repository", "model_configuration", "statistics"}
    assert extensions <= set(about["extensions"])
    assert not [name for name in about["extensions"] if "shared_memory" in name]
    for version in ("", "1"):
        assert client.is_model_ready("subtract", version, headers=admin)
        about = client.get_model_metadata("subtract", version, headers=admin)
        assert (about["name"], about["versions"]) == ("subtract", ["1"])
        assert [item["name"] for item in about["inputs"]] == ["a", "b"]
        assert about["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1]}]
        config = client.get_model_config("subtract", version, headers=admin)
        assert (config["name"], config["backend"], config["max_batch_size"]) == ("subtract", "onnxruntime", 0)
        assert [item["data_type"] for item in config["input"]] == ["TYPE_FP32", "TYPE_FP32"]
    assert not client.is_model_ready("subtract", "2", headers=admin)


def test_encodings_mix_in_one_request(client: Any, admin: dict[str, str]) -> None:
    inputs = [floats("a", 5, 7), floats("b", 2, 3, binary=False)]
    result = client.infer("subtract", inputs, "1", request_id="seven", headers=dict(admin))
    assert result.as_numpy("y").tolist() == [3, 4]
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("seven", "subtract", "1")
    assert result.get_output("y")["parameters"] == {"binary_data_size": 8}  # all, and as bytes


@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
def test_bodies_may_be_compressed(
    client: Any, admin: dict[str, str], there: str | None, back: str | None
) -> None:
    array = np.arange(5000, dtype=np.float32).reshape(100, 50)
    result = client.infer(
        "identity-FP32",
        [tensor("x", array)],
        headers=dict(admin),
        request_compression_algorithm=there,
        response_compression_algorithm=back,
    )
    assert result.as_numpy("y").tolist() == array.tolist()


def test_concurrent_inferences_get_their_own_answers(
    triton_clients: dict[str, Any], runner: asyncio.Runner, admin: dict[str, str]
) -> None:
    async def gather() -> list[Any]:
        infer = triton_clients["aio"].client.infer
        return await asyncio.gather(*(infer(*each, headers=dict(admin)) for each in requests))

    requests = [("subtract", [floats("a", number), floats("b", 1)]) for number in range(20)]
    infer = triton_clients["sync"].async_infer
    pending = [infer(*each, headers=dict(admin)) for each in requests]
    for answers in ([each.get_result() for each in pending], runner.run(gather())):
        assert [answer.as_numpy("y")[0] for answer in answers] == [number - 1 for number in range(20)]


def test_generated_body_can_be_posted_by_others(
    triton_clients: dict[str, Any], admin: dict[str, str]
) -> None:
    client = triton_clients["sync"]
    body, length = client.generate_request_body([floats("a", 5), floats("b", 2)])
    answer = client._post(
        "v2/models/subtract/infer", body, admin | {"Inference-Header-Content-Length": str(length)}, None
    )
    header = int(answer.get("Inference-Header-Content-Length"))
    assert client.parse_response_body(answer.read(), header_length=header).as_numpy("y").tolist() == [3]


def test_statistics_count_inferences(client: Any, admin: dict[str, str]) -> None:
    def count(version: str = "") -> int:
        (stats,) = client.get_inference_statistics("subtract", version, headers=admin)["model_stats"]
        number: int = stats["inference_stats"]["success"]["count"]
        return number

    before = count()
    client.infer("subtract", [floats("a", 1), floats("b", 1)], headers=dict(admin))
    assert (count(), count("1")) == (before + 1, before + 1)
    every = client.get_inference_statistics(headers=admin)["model_stats"]
    assert {stats["name"] for stats in every} >= set(CLIENT_MODELS)


def index_entry(client: Any, name: str, admin: dict[str, str]) -> dict[str, str]:
    [entry] = [each for each in client.get_model_repository_index(headers=admin) if each["name"] == name]
    return dict(entry)


def test_repository_index_follows_load_and_unload(
    client: Any, server: Server, admin: dict[str, str], request: pytest.FixtureRequest
) -> None:
    name = f"indexed-{request.node.callspec.id}"
    models.save(models.identity(models.FLOAT, [None, 2]), server.api.config.repository, name)
    assert index_entry(client, name, admin) == {"name": name}
    config = {"max_batch_size": 4, "instance_group": [{"count": 2}], "dynamic_batching": {}}
    client.load_model(name, headers=admin, config=json.dumps(config))
    assert index_entry(client, name, admin) == {"name": name, "version": "1", "state": "READY"}
    found = client.get_model_config(name, headers=admin)
    assert (found["max_batch_size"], found["instance_group"][0]["count"]) == (4, 2)
    for _ in range(2):  # the second time there is nothing to do
        client.unload_model(name, headers=admin)
    unloaded = {"name": name, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index_entry(client, name, admin) == unloaded


@pytest.mark.parametrize(
    ("call", "arguments", "status", "words"),
    [
        ("load_model", {"model_name": "nothing"}, 404, "nothing"),
        ("load_model", {"model_name": "idle", "headers": None}, 401, "token"),
        ("load_model", {"model_name": "corrupt"}, 400, "load failed for model 'corrupt'"),
        ("load_model", {"model_name": "idle", "config": '{"optimization": {}}'}, 400, "optimization"),
        ("load_model", {"model_name": "idle", "config": "[]"}, 400, "JSON object"),
        ("load_model", {"model_name": "idle", "config": "{}", "files": {"file:1/m": b"x"}}, 400, "file:1/m"),
        ("get_model_metadata", {"model_name": "idle"}, 503, "not loaded"),
        ("get_model_config", {"model_name": "nothing"}, 404, "nothing"),
        ("get_inference_statistics", {"model_name": "nothing"}, 404, "nothing"),
        ("get_system_shared_memory_status", {}, 404, ""),
        ("register_system_shared_memory", {"name": "r", "key": "/k", "byte_size": 64}, 404, ""),
        ("unregister_system_shared_memory", {}, 404, ""),
        ("get_cuda_shared_memory_status", {}, 404, ""),
        (
            "register_cuda_shared_memory",
            {"name": "r", "raw_handle": b"h", "device_id": 0, "byte_size": 64},
            404,
            "",
        ),
        ("unregister_cuda_shared_memory", {}, 404, ""),
        ("get_trace_settings", {}, 404, ""),
        ("update_trace_settings", {}, 404, ""),
        ("get_log_settings", {}, 404, ""),
        ("update_log_settings", {"settings": {}}, 404, ""),
    ],
)
def test_refused_call_names_reason(
    client: Any, *, server: Server, call: str, arguments: dict[str, Any], status: int, words: str
) -> None:
    found, message = refusal(getattr(client, call), **{"headers": bearer(server, "admin")} | arguments)
    assert found == status
    assert message
    assert words in message


def test_failed_load_repeats_runtime_message(client: Any, admin: dict[str, str]) -> None:
    assert "protobuf" in refusal(client.load_model, "corrupt", headers=admin)[1].lower()
    assert index_entry(client, "corrupt", admin)["state"] == "UNAVAILABLE"


@pytest.mark.parametrize("option", [{"priority": 1}, {"sequence_id": 3}], ids=str)
def test_unsupported_option_is_refused(client: Any, admin: dict[str, str], option: dict[str, int]) -> None:
    inputs = [floats("a", 1), floats("b", 1)]
    status, message = refusal(client.infer, "subtract", inputs, headers=admin, **option)
    assert (status, next(iter(option)) in message) == (400, True)


def test_shared_memory_input_is_refused(client: Any, admin: dict[str, str]) -> None:
    shared = triton.InferInput("a", [1], "FP32")
    shared.set_shared_memory("region", 4)
    status, message = refusal(client.infer, "subtract", [shared, floats("b", 1)], headers=admin)
    assert (status, "shared memory" in message) == (400, True)


def test_plugin_sends_token_with_every_call(client: Any, server: Server) -> None:
    class Bearer(triton.InferenceServerClientPlugin):  # type: ignore[misc]
        def __call__(self, request: Any) -> None:
            request.headers.update(bearer(server, "predict"))

    target = client.client if isinstance(client, Blocked) else client
    target.register_plugin(Bearer())
    try:
        assert client.get_server_metadata()["name"] == "loadledger"
        result = client.infer("subtract", [floats("a", 2), floats("b", 1)])
        assert result.as_numpy("y").tolist() == [1]
    finally:
        target.unregister_plugin()
