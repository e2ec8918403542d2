"""Triton's client for asyncio, unchanged, through all of its calls, against the server as a process."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio as triton
from support import models
from support.clientmodels import ELEMENTS, sample, serving_client_models
from support.process import Server
from support.standing import address, bearer
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_client_models(tmp_path_factory.mktemp("clients")) as server:
        yield server


@pytest.fixture
def admin(server: Server) -> dict[str, str]:
    return bearer(server, "admin")


@pytest.fixture
async def client(server: Server) -> AsyncIterator[triton.InferenceServerClient]:
    async with triton.InferenceServerClient(address(server)) as client:
        yield client


def an_input(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> InferInput:
    given = InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def floats(name: str, *values: float) -> InferInput:
    return an_input(name, np.array(values, np.float32))


async def test_health_and_metadata(client: triton.InferenceServerClient, admin: dict[str, str]) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("subtract", headers=admin)
    assert await client.is_model_ready("subtract", "1", headers=admin)
    assert not await client.is_model_ready("idle", headers=admin)
    assert (await client.get_server_metadata(headers=admin))["name"] == "loadledger"
    assert (await client.get_model_metadata("subtract", headers=admin))["versions"] == ["1"]
    assert (await client.get_model_config("subtract", "1", headers=admin))["name"] == "subtract"


@pytest.mark.parametrize("datatype", ELEMENTS)
async def test_every_datatype_comes_back_as_it_went(
    client: triton.InferenceServerClient, admin: dict[str, str], datatype: str
) -> None:
    array = sample(datatype)
    result = await client.infer(f"identity-{datatype}", [an_input("x", array, datatype)], headers=admin)
    found = result.as_numpy("y").tolist()
    expected = np.char.encode(array.astype(str)).tolist() if datatype == "BYTES" else array.tolist()
    assert found == expected


async def test_a_request_has_its_id_its_outputs_and_its_compression(
    client: triton.InferenceServerClient, admin: dict[str, str]
) -> None:
    for algorithm in (None, "gzip", "deflate"):
        result = await client.infer(
            "subtract",
            [an_input("a", np.array([3], np.float32), binary=False), floats("b", 1)],
            model_version="1",
            outputs=[InferRequestedOutput("y", binary_data=False)],
            request_id="seven",
            headers=admin,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert result.get_response()["id"] == "seven"
        assert result.get_output("y")["data"] == [2]


async def test_many_can_be_asked_at_once(client: triton.InferenceServerClient, admin: dict[str, str]) -> None:
    asked = [
        client.infer("subtract", [floats("a", number), floats("b", 1)], headers=admin) for number in range(50)
    ]
    answers = await asyncio.gather(*asked)
    assert [answer.as_numpy("y")[0] for answer in answers] == [number - 1 for number in range(50)]


async def test_a_model_is_loaded_with_a_configuration_counted_and_unloaded(
    client: triton.InferenceServerClient, server: Server, admin: dict[str, str]
) -> None:
    models.save(models.add(1), server.api.config.repository, "again")
    await client.load_model("again", headers=admin, config=json.dumps({"instance_group": [{"count": 2}]}))
    await client.infer("again", [floats("x", 1)], headers=admin)
    (stats,) = (await client.get_inference_statistics("again", headers=admin))["model_stats"]
    assert stats["inference_count"] == 1
    assert len((await client.get_inference_statistics(headers=admin))["model_stats"]) > 1
    await client.unload_model("again", headers=admin)
    index = await client.get_model_repository_index(headers=admin)
    (entry,) = [entry for entry in index if entry["name"] == "again"]
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "unloaded")


async def refused(call: Any, *arguments: Any, **named: Any) -> tuple[str | None, str]:
    """Call, and return status and message of the exception that has to come."""
    with pytest.raises(InferenceServerException) as raised:
        await call(*arguments, **named)
    return raised.value.status(), raised.value.message()


async def test_errors_say_what_and_why(
    client: triton.InferenceServerClient, server: Server, admin: dict[str, str]
) -> None:
    inputs = [floats("a", 1), floats("b", 1)]
    assert (await refused(client.infer, "nothing", inputs, headers=admin))[0] == "404"
    assert (await refused(client.infer, "subtract", inputs))[0] == "401"
    assert (await refused(client.load_model, "idle", headers=bearer(server, "predict")))[0] == "403"
    status, message = await refused(client.load_model, "corrupt", headers=admin)
    assert status == "400"
    assert "protobuf" in message.lower()
    endless = an_input("trips", np.array(models.ENDLESS, np.int64), "INT64")
    assert (await refused(client.infer, "loop", [endless], timeout=100_000, headers=admin))[0] == "504"


async def test_a_plugin_sends_the_token_with_every_call(
    client: triton.InferenceServerClient, server: Server
) -> None:
    class Bearer(triton.InferenceServerClientPlugin):  # type: ignore[misc]
        def __call__(self, request: Any) -> None:
            request.headers.update(bearer(server, "predict"))

    client.register_plugin(Bearer())
    assert (await client.get_server_metadata())["name"] == "loadledger"
    assert (await client.infer("subtract", [floats("a", 2), floats("b", 1)])).as_numpy("y").tolist() == [1]
