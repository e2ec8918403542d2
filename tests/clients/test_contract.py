"""One contract for all clients: Triton's (sync, aio) and KServe's over HTTP and gRPC, unchanged, and ours."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from support import models
from support.clients import KINDS, connected
from support.dialects import (
    ELEMENTS,
    FLOATS,
    Dialect,
    Inference,
    KServe,
    KServeGrpc,
    Ours,
    Triton,
    TritonGrpc,
    floats,
    tensor,
    triton_client,
)
from support.servers import Server
from tritonclient.utils import InferenceServerException

THEIRS = ("Triton sync", "Triton aio", "KServe")
NOT_IN_JSON = ("FP16", "BF16")
A, B = np.array([5, 7], np.float32), np.array([2, 3], np.float32)


@pytest.fixture(scope="module", params=[*THEIRS, *(f"{name} gRPC" for name in THEIRS), *KINDS])
def dialect(request: pytest.FixtureRequest, server: Server) -> Iterator[Dialect]:
    """A client of each kind, as the contract uses it."""
    with ExitStack() as resources:
        match request.param.split():
            case "KServe", *protocol:
                yield (KServeGrpc if protocol else KServe)(server, resources)
            case "Triton", kind, *protocol:
                yield (TritonGrpc if protocol else Triton)(server, resources, kind)
            case [kind]:
                yield Ours(server, resources, kind)


# The contract


def test_health_needs_no_token_and_readiness_follows_state(dialect: Dialect) -> None:
    assert dialect.is_live()
    assert [dialect.is_model_ready(name, "admin") for name in ("subtract", "idle")] == [True, False]
    assert not dialect.is_model_ready("subtract", None)


@pytest.mark.parametrize("datatype", ELEMENTS)
def test_datatype_round_trips_in_each_encoding(dialect: Dialect, datatype: str) -> None:
    for binary in dialect.encodings:
        if datatype not in dialect.datatypes or (datatype in NOT_IN_JSON and not all(binary)):
            continue
        array = extremes(datatype)
        if "FP" in datatype and isinstance(dialect, KServe) and not all(binary):
            array[~np.isfinite(array)] = 7  # its client reads JSON that has no infinity
        answer = dialect.infer(
            Inference(f"identity-{datatype}", {"x": array}, datatype=datatype, binary=binary)
        )
        assert text(answer) == text(array), binary
        assert answer.shape == (2, 3)


def extremes(datatype: str) -> Any:
    """Return a matrix of 2 by 3 with the datatype's extremes, as Triton's client takes it."""
    if datatype == "BYTES":
        return np.array([["", "a", "ü€"], ["\n", "0", "long " * 100]], object)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if datatype in FLOATS:
        return np.array([[0, -0.0, 1.5], [-2, np.inf, -np.inf]], FLOATS[datatype])
    limits = np.iinfo(datatype.lower())
    return np.array([[0, 1, 2], [limits.min, limits.max, 3]], datatype.lower())


def text(array: Any) -> list[Any]:
    """List the elements; Triton's client gives texts as bytes."""
    return [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (Inference("nothing", {"x": A}), 404, "nothing"),
        (Inference("idle", {"x": A}), 503, "not loaded"),
        (Inference("subtract", {"a": A, "b": B}, role=None), 401, "token"),
        (Inference("subtract", {"a": A, "b": B}, role="audit"), 403, "infer"),
        (Inference("subtract", {"a": A}), 400, "'b'"),
        (Inference("subtract", {"a": A, "b": B, "c": A}), 400, "'c'"),
    ],
    ids=["unknown", "not loaded", "no token", "wrong role", "missing input", "unknown input"],
)
def test_refused_inference_names_reason(
    dialect: Dialect, request_: Inference, status: int, words: str
) -> None:
    with pytest.raises(dialect.error) as raised:
        dialect.infer(request_)
    assert dialect.status(raised.value) == status
    assert words in str(raised.value)


def test_inference_past_timeout_is_stopped(dialect: Dialect) -> None:
    endless, three = np.array(models.ENDLESS, np.int64), np.array(3, np.int64)
    with pytest.raises(dialect.error, match="did not end within") as raised:
        dialect.infer(Inference("loop", {"trips": endless}, datatype="INT64", timeout_us=100_000))
    assert dialect.status(raised.value) == 504
    assert dialect.infer(Inference("loop", {"trips": three}, datatype="INT64")).tolist() == 3


def test_model_is_loaded_inferred_and_unloaded(dialect: Dialect, server: Server) -> None:
    if not isinstance(dialect, Triton | Ours):
        pytest.skip("KServe's client has no call for it")
    models.save(models.add(1), server.api.config.repository, "again")
    for _ in range(2):
        dialect.load("again")
        assert dialect.infer(Inference("again", {"x": A})).tolist() == [6, 8]
        dialect.unload("again")
        with pytest.raises(dialect.error, match="not loaded"):
            dialect.infer(Inference("again", {"x": A}))


# Triton's client of HTTP beyond the contract


@pytest.fixture(scope="module", params=["sync", "aio"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with triton_client(server, request.param) as client:
        yield client


def refusal(call: Any, *arguments: Any, **named: Any) -> tuple[int, str]:
    """Return status and message of the exception that a call must raise."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **named)
    return int(raised.value.status()), raised.value.message()


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # Triton's client does
def test_image_is_sent_as_json(client: Any, admin: dict[str, str]) -> None:
    image = np.random.default_rng(1).random((3 * 224, 224), np.float32)
    answer = client.infer("identity-FP32", [tensor("x", image, binary=False)], headers=dict(admin))
    assert np.array_equal(answer.as_numpy("y"), image)


def test_metadata_and_configuration_name_inputs_and_outputs(client: Any, admin: dict[str, str]) -> None:
    assert client.get_server_metadata(headers=admin)["name"] == "loadledger"
    for version in ("", "1"):
        about = client.get_model_metadata("subtract", version, headers=admin)
        assert (about["name"], about["versions"]) == ("subtract", ["1"])
        assert [item["name"] for item in about["inputs"]] == ["a", "b"]
        assert about["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1]}]
        config = client.get_model_config("subtract", version, headers=admin)
        assert (config["name"], config["backend"], config["max_batch_size"]) == ("subtract", "onnxruntime", 0)
        assert [item["data_type"] for item in config["input"]] == ["TYPE_FP32", "TYPE_FP32"]
    assert not client.is_model_ready("subtract", "2", headers=admin)


def test_label_is_a_version_to_the_client(server: Server, client: Any, admin: dict[str, str]) -> None:
    with connected(KINDS[0], server.url, server.api.token("admin")) as ours:
        ours.set_label("subtract", "champion", 1)
    assert client.is_model_ready("subtract", "champion", headers=admin)
    assert not client.is_model_ready("subtract", "nobody", headers=admin)
    about = (client.get_model_metadata, client.get_model_config, client.get_inference_statistics)
    for call in about:
        assert call("subtract", "champion", headers=admin) == call("subtract", "1", headers=admin)
        assert refusal(call, "subtract", "nobody", headers=admin)[0] == 404
    result = client.infer("subtract", [floats("a", 5), floats("b", 2)], "champion", headers=dict(admin))
    assert (result.as_numpy("y").tolist(), result.get_response()["model_version"]) == ([3], "1")


def test_encodings_mix_in_one_counted_request(client: Any, admin: dict[str, str]) -> None:
    def count() -> Any:
        (stats,) = client.get_inference_statistics("subtract", "1", headers=admin)["model_stats"]
        times = {name: each["ns"] for name, each in stats["inference_stats"].items()}
        parts = ("queue", "compute_input", "compute_infer", "compute_output", "transport")
        assert sum(times[name] for name in parts) == times["success"]
        return stats["inference_stats"]["success"]["count"]

    before, inputs = count(), [floats("a", 5, 7), floats("b", 2, 3, binary=False)]
    result = client.infer("subtract", inputs, "1", request_id="seven", headers=dict(admin))
    assert result.as_numpy("y").tolist() == [3, 4]
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("seven", "subtract", "1")
    assert result.get_output("y")["parameters"] == {"binary_data_size": 8}  # all, and as bytes
    assert count() == before + 1


@pytest.mark.parametrize(
    ("there", "back"), [("gzip", None), (None, "gzip"), ("deflate", "gzip"), ("gzip", "deflate")]
)
def test_bodies_may_be_compressed(
    client: Any, admin: dict[str, str], there: str | None, back: str | None
) -> None:
    array = np.arange(5000, dtype=np.float32).reshape(100, 50)
    algorithms = {"request_compression_algorithm": there, "response_compression_algorithm": back}
    result = client.infer("identity-FP32", [tensor("x", array)], headers=dict(admin), **algorithms)
    assert result.as_numpy("y").tolist() == array.tolist()


def test_repository_index_follows_load_and_unload(
    client: Any, server: Server, admin: dict[str, str], request: pytest.FixtureRequest
) -> None:
    def indexed() -> dict[str, str]:
        index = client.get_model_repository_index(headers=admin)
        return next(entry for entry in index if entry["name"] == name)

    name = f"indexed-{request.node.callspec.id}"
    models.save(models.identity(models.FLOAT, [None, 2]), server.api.config.repository, name)
    assert indexed() == {"name": name}
    config = {"max_batch_size": 4, "instance_group": [{"count": 2}], "dynamic_batching": {}}
    client.load_model(name, headers=admin, config=json.dumps(config))
    assert indexed() == {"name": name, "version": "1", "state": "READY"}
    found = client.get_model_config(name, headers=admin)
    assert (found["max_batch_size"], found["instance_group"][0]["count"]) == (4, 2)
    for _ in range(2):  # the second time there is nothing to do
        client.unload_model(name, headers=admin)
    assert indexed() == {"name": name, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}


IDLE = {"model_name": "idle"}


@pytest.mark.parametrize(
    ("call", "arguments", "status", "words"),
    [
        ("load_model", {**IDLE, "headers": None}, 401, "token"),
        ("load_model", {"model_name": "corrupt"}, 400, "model.onnx ends after"),
        ("get_model_config", IDLE, 503, "not loaded"),
        ("get_inference_statistics", {"model_name": "nothing"}, 404, "nothing"),
        ("register_system_shared_memory", {"name": "r", "key": "/k", "byte_size": 64}, 404, ""),
        ("update_log_settings", {"settings": {}}, 404, ""),
    ],
)
def test_refused_call_names_reason(
    client: Any, *, admin: dict[str, str], call: str, arguments: dict[str, Any], status: int, words: str
) -> None:
    found, message = refusal(getattr(client, call), **{"headers": admin, **arguments})
    assert found == status
    assert message
    assert words in message
