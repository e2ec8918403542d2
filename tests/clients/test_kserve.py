"""KServe's client for REST, unchanged, against the server as a process."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from support.clientmodels import ELEMENTS, sample, serving_client_models
from support.process import Server
from support.standing import bearer

pytest.importorskip("kserve", reason="KServe's client is not made for this Python")
import httpx
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.errors import UnsupportedProtocol
from kserve.protocol.infer_type import RequestedOutput

BY_KSERVE = [datatype for datatype in ELEMENTS if datatype != "BF16"]
"""It knows no BF16."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_client_models(tmp_path_factory.mktemp("clients")) as server:
        yield server


@pytest.fixture
def token(server: Server) -> dict[str, str]:
    return bearer(server, "predict")


@pytest.fixture
async def client() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        yield client


def an_input(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> InferInput:
    given = InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def subtraction(*, binary_in: bool = True, **options: Any) -> InferRequest:
    a, b = np.array([5, 7], np.float32), np.array([2, 3], np.float32)
    inputs = [an_input("a", a, binary=binary_in), an_input("b", b, binary=binary_in)]
    return InferRequest("subtract", inputs, **options)


async def test_health_needs_no_token(client: InferenceRESTClient, server: Server) -> None:
    assert await client.is_server_live(server.url) is True
    assert await client.is_server_ready(server.url) is True


async def test_a_model_is_ready_when_it_is_loaded(
    client: InferenceRESTClient, server: Server, token: dict[str, str]
) -> None:
    assert await client.is_model_ready(server.url, "subtract", headers=token)
    assert not await client.is_model_ready(server.url, "idle", headers=token)
    assert not await client.is_model_ready(server.url, "subtract")  # who asks without a token is not told


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
async def test_tensors_go_as_bytes_or_json_each_way(
    client: InferenceRESTClient, server: Server, token: dict[str, str], *, binary_in: bool, binary_out: bool
) -> None:
    asked = subtraction(
        binary_in=binary_in,
        request_id="seven",
        request_outputs=[RequestedOutput("y", {"binary_data": binary_out})],
    )
    told: dict[str, str] = {}
    answer = await client.infer(server.url, asked, "subtract", headers=dict(token), response_headers=told)
    assert (answer.id, answer.model_name) == ("seven", "subtract")
    assert answer.outputs[0].as_numpy().tolist() == [3, 4]
    assert ("inference-header-content-length" in told) is binary_out
    assert told["loadledger-model"].startswith("subtract/1;position=")


@pytest.mark.parametrize("datatype", BY_KSERVE)
async def test_every_datatype_comes_back_as_it_went(
    client: InferenceRESTClient, server: Server, token: dict[str, str], datatype: str
) -> None:
    array = sample(datatype)
    asked = InferRequest(
        "", [an_input("x", array, datatype)], parameters={"binary_data_output": True}, request_id="1"
    )
    name = f"identity-{datatype}"
    answer = await client.infer(server.url, asked, name, headers=dict(token))
    assert answer.outputs[0].as_numpy().tolist() == array.tolist()


async def test_a_dictionary_is_sent_as_it_is(
    client: InferenceRESTClient, server: Server, token: dict[str, str]
) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "ü"]}
    answer = await client.infer(server.url, {"inputs": [tensor]}, "identity-BYTES", headers=token)
    assert answer.outputs[0].data == ["a", "ü"]


@pytest.mark.parametrize(
    ("model", "role", "status", "words"),
    [
        ("nothing", "predict", 404, "nothing"),
        ("idle", "predict", 503, "not loaded"),
        ("subtract", "audit", 403, "predict"),
        ("identity-INT8", "predict", 400, "'a'"),
    ],
    ids=["not there", "not loaded", "another role", "wrong input"],
)
async def test_errors_say_what_and_why(
    server: Server, *, model: str, role: str, status: int, words: str
) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        with pytest.raises(httpx.HTTPStatusError, match=words) as raised:
            await client.infer(server.url, subtraction(), model, headers=bearer(server, role))
        assert raised.value.response.status_code == status


async def test_without_a_token_nothing_is_answered(client: InferenceRESTClient, server: Server) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        await client.infer(server.url, subtraction(), "subtract")


async def test_explanations_are_no_part_of_the_protocol(
    client: InferenceRESTClient, server: Server, token: dict[str, str]
) -> None:
    with pytest.raises(UnsupportedProtocol):
        await client.explain(server.url, "subtract", {"instances": []}, headers=token)
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as older:
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            await older.explain(server.url, "subtract", {"instances": []}, headers=token)
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            await older.infer(server.url, {"instances": []}, "subtract", headers=token)


async def test_the_token_can_be_given_once(server: Server, token: dict[str, str]) -> None:
    class Bearer(httpx.Auth):
        def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
            request.headers.update(token)
            yield request

    async with InferenceRESTClient(RESTConfig(protocol="v2", auth=Bearer())) as client:
        assert await client.is_model_ready(server.url, "subtract")
        answer = await client.infer(server.url, subtraction(), "subtract")
        assert answer.outputs[0].data == [3, 4]
