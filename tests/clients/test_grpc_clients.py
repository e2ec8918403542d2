"""gRPC beyond the contract: Triton's client (sync, aio), KServe's, and one of health checks, unchanged."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from queue import Queue
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from support import models
from support.clients import LIMIT_S
from support.dialects import (
    Inference,
    KServeGrpc,
    grpc_tensor,
    headers,
    triton_grpc_client,
)
from support.servers import Server, grpc_address
from support.tritongrpc import triton_grpc, triton_grpc_aio
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module", params=["sync", "aio"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with triton_grpc_client(server, request.param) as client:
        yield client


@pytest.fixture
def kserve(server: Server) -> Iterator[KServeGrpc]:
    with ExitStack() as resources:
        yield KServeGrpc(server, resources)


def trips(count: int) -> list[Any]:
    """Return the input of `models.counting_loop`."""
    return [grpc_tensor("trips", np.array(count), "INT64")]


def described(tensors: Any) -> list[tuple[str, str, list[int]]]:
    return [(each.name, each.datatype, [*each.shape]) for each in tensors]


def test_metadata_and_config_name_inputs_and_outputs(client: Any, admin: dict[str, str]) -> None:
    server = client.get_server_metadata(headers=admin)
    assert (server.name, "model_repository" in server.extensions) == ("loadledger", True)
    for version in ("", "1"):
        about = client.get_model_metadata("subtract", version, headers=admin)
        assert (about.name, about.versions, about.platform) == ("subtract", ["1"], "onnxruntime_onnx")
        assert described(about.inputs) == [("a", "FP32", [-1]), ("b", "FP32", [-1])]
        assert described(about.outputs) == [("y", "FP32", [-1])]
        config = client.get_model_config("subtract", version, headers=admin).config
        assert (config.name, config.backend, config.max_batch_size) == ("subtract", "onnxruntime", 0)
        float32 = triton_grpc_aio.model_config_pb2.TYPE_FP32
        assert [(each.name, each.data_type) for each in config.input] == [("a", float32), ("b", float32)]
    assert not client.is_model_ready("subtract", "2", headers=admin)


def test_inference_returns_requested_outputs_and_is_counted(
    client: Any, server: Server, admin: dict[str, str]
) -> None:
    def count() -> int:
        [found] = client.get_inference_statistics("totals", "1", headers=admin).model_stats
        times = found.inference_stats
        parts = (times.queue, times.compute_input, times.compute_infer, times.compute_output)
        assert 0 <= sum(part.ns for part in parts) <= times.success.ns
        return int(times.success.count)

    models.save(models.running_total(), server.api.config.repository, "totals")
    client.load_model("totals", headers=admin)
    before, ones = count(), np.ones((3, 2), np.float32)
    inputs = [grpc_tensor("state", ones[0]), grpc_tensor("x", ones)]
    requested = {None: ["new_state", "totals"], "gzip": ["totals", "new_state"], "deflate": ["totals"]}
    for algorithm, names in requested.items():
        outputs = [triton_grpc.InferRequestedOutput(name) for name in names] if algorithm else None
        options = {"outputs": outputs, "request_id": "seven", "compression_algorithm": algorithm}
        result = client.infer("totals", inputs, "1", headers=admin, **options)
        assert result.as_numpy("totals").tolist() == [[2, 2], [3, 3], [4, 4]]
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("seven", "totals", "1")
        assert [output.name for output in response.outputs] == names
    assert count() == before + len(requested)


@pytest.mark.parametrize("shape", [(0, 3), (4000, 1000)], ids=["empty", "large"])
def test_tensor_of_any_size_is_returned(client: Any, admin: dict[str, str], shape: tuple[int, int]) -> None:
    array = np.random.default_rng(1).random(shape, np.float32)
    answer = client.infer("identity-FP32", [grpc_tensor("x", array)], headers=admin).as_numpy("y")
    assert answer.shape == shape
    assert np.array_equal(answer, array)


def test_index_follows_load_with_config_and_unload(
    client: Any, server: Server, admin: dict[str, str], request: pytest.FixtureRequest
) -> None:
    def indexed() -> tuple[str, str, str]:
        index = client.get_model_repository_index(headers=admin).models
        return next((each.version, each.state, each.reason) for each in index if each.name == name)

    name = f"indexed-{request.node.callspec.id}"
    models.save(models.identity(models.FLOAT, [None, 2]), server.api.config.repository, name)
    assert indexed() == ("", "", "")
    config = {"max_batch_size": 4, "instance_group": [{"count": 2}], "dynamic_batching": {}}
    client.load_model(name, headers=admin, config=json.dumps(config))
    assert indexed() == ("1", "READY", "")
    found = client.get_model_config(name, headers=admin).config
    assert (found.max_batch_size, found.instance_group[0].count) == (4, 2)
    for _ in range(2):  # the second time there is nothing to do
        client.unload_model(name, headers=admin)
    assert indexed() == ("1", "UNAVAILABLE", "unloaded")


IDLE = {"model_name": "idle"}
NOTHING = {"model_name": "nothing"}
HALF = {"model_name": "subtract", "inputs": [grpc_tensor("a", np.ones(1, np.float32))]}
SHARED = {**HALF, "inputs": [triton_grpc.InferInput("a", [1], "FP32").set_shared_memory("region", 4)]}
MALFORMED = {"authorization": "Bearer x"}
REGION = {"name": "region", "raw_handle": b"", "device_id": 0, "byte_size": 4}


@pytest.mark.parametrize(
    ("role", "call", "arguments", "status", "words"),
    [
        (None, "load_model", IDLE, "UNAUTHENTICATED", "token"),
        (None, "load_model", {**IDLE, "headers": MALFORMED}, "UNAUTHENTICATED", "JWT"),
        ("infer", "load_model", IDLE, "PERMISSION_DENIED", "admin"),
        ("admin", "load_model", {**IDLE, "config": '{"backend": 1}'}, "INVALID_ARGUMENT", "backend"),
        (
            "admin",
            "load_model",
            {**IDLE, "config": "{}", "files": {"f": b""}},
            "INVALID_ARGUMENT",
            "f is not",
        ),
        ("admin", "load_model", {"model_name": "corrupt"}, "INVALID_ARGUMENT", "model.onnx ends after"),
        ("admin", "load_model", NOTHING, "NOT_FOUND", "nothing"),
        ("infer", "get_model_metadata", {"model_name": ""}, "INVALID_ARGUMENT", "name is empty"),
        ("infer", "get_model_config", IDLE, "UNAVAILABLE", "not loaded"),
        ("infer", "get_inference_statistics", NOTHING, "NOT_FOUND", "nothing"),
        ("infer", "infer", {**HALF, "model_version": "best"}, "NOT_FOUND", "best"),
        ("infer", "infer", {**HALF, "sequence_id": 7}, "INVALID_ARGUMENT", "sequence_id"),
        ("infer", "infer", SHARED, "INVALID_ARGUMENT", "shared memory"),
        ("admin", "get_system_shared_memory_status", {}, "UNIMPLEMENTED", "SystemSharedMemoryStatus"),
        ("admin", "register_cuda_shared_memory", REGION, "UNIMPLEMENTED", "CudaSharedMemoryRegister"),
        ("admin", "get_trace_settings", {}, "UNIMPLEMENTED", "TraceSetting"),
        ("admin", "update_log_settings", {"settings": {}}, "UNIMPLEMENTED", "LogSettings"),
    ],
)
def test_refused_call_names_reason(
    client: Any,
    *,
    server: Server,
    role: str | None,
    call: str,
    arguments: dict[str, Any],
    status: str,
    words: str,
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        getattr(client, call)(**{"headers": headers(server, role), **arguments})
    assert raised.value.status() == f"StatusCode.{status}"
    assert words in raised.value.message()


def test_inference_is_stopped_at_deadline_of_client(client: Any, admin: dict[str, str]) -> None:
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer("loop", trips(models.ENDLESS), headers=admin, client_timeout=0.5)
    answer = client.infer("loop", trips(3), headers=admin, client_timeout=LIMIT_S)
    assert answer.as_numpy("count") == 3


def test_stream_is_unimplemented(server: Server, admin: dict[str, str]) -> None:
    received = Queue[Any]()
    with triton_grpc_client(server, "sync") as client:
        client.start_stream(lambda result, error: received.put((result, error)), headers=admin)
        result, error = received.get(timeout=LIMIT_S)
    assert (result, error.status()) == (None, "StatusCode.UNIMPLEMENTED")
    assert error.message() == "ModelStreamInfer is not supported"


def test_long_typed_tensor_of_kserve_is_returned(kserve: KServeGrpc) -> None:
    array = np.arange(-20_000, 20_000).reshape(400, 100)
    asked = Inference("identity-INT64", {"x": array}, datatype="INT64", binary=(False, False))
    assert np.array_equal(kserve.infer(asked), array)


def test_error_has_stable_code_in_its_trailing_metadata(kserve: KServeGrpc) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        kserve.infer(Inference("nothing", {"x": np.ones(1, np.float32)}))
    metadata: Any = raised.value.trailing_metadata()
    assert metadata["loadledger-code"] == "unknown_model"


def test_health_is_checked_without_token(server: Server) -> None:
    with grpc.insecure_channel(grpc_address(server)) as channel:
        stub = HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            assert stub.Check(HealthCheckRequest(service=service)).status == HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            stub.Check(HealthCheckRequest(service="inference.Other"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as raised:
            next(stub.Watch(HealthCheckRequest()))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
