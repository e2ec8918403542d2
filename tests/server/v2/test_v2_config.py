"""What the protocol tells of the server, and of how a model is configured, as perf_analyzer reads both."""

from importlib.metadata import version
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi
from support.models import FLOAT, save

from events.jobs import LoadParameters
from runtime.wire import DATATYPES, TensorSpec
from server.v2.tritonconfig import data_type, model_config

ROW = (None, 4)
"""A batch of any size, of four numbers each."""


async def test_the_server_says_who_it_is_and_what_it_can(api: LocalApi) -> None:
    for path in ("/v2", "/v2/"):
        answer = await api.get(path, roles=("audit",))
        assert answer.json == {
            "name": "loadledger",
            "version": version("loadledger"),
            "extensions": [
                "model_repository",
                "model_configuration",
                "binary_tensor_data",
                "parameters",
                "statistics",
            ],
        }


async def test_a_loaded_model_s_configuration_is_what_it_runs_with(api: LocalApi, repository: Path) -> None:
    save(models.identity(FLOAT, ROW), repository, "m", 7)
    await api.load("m")
    expected = {
        "name": "m",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [7]}},
        "max_batch_size": 0,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4], "optional": False}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
        "instance_group": [{"name": "m_0", "kind": "KIND_CPU", "count": 1}],
        "default_model_filename": "model.onnx",
        "model_transaction_policy": {"decoupled": False},
    }
    for path in ("/v2/models/m/config", "/v2/models/m/versions/7/config"):
        assert (await api.get(path, roles=("predict",))).json == expected


async def test_a_batched_model_s_dimensions_are_without_the_batch_while_metadata_has_it(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(FLOAT, ROW), repository, "m")
    await api.load("m", max_batch_size=8, max_queue_delay_us=100, instances=2)
    config = (await api.get("/v2/models/m/config")).json
    assert (config["max_batch_size"], config["input"][0]["dims"], config["output"][0]["dims"]) == (
        8,
        [4],
        [4],
    )
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 100}
    assert config["instance_group"][0]["count"] == 2
    metadata = (await api.get("/v2/models/m")).json
    assert metadata["inputs"][0]["shape"] == [-1, 4]


async def test_only_what_is_loaded_has_a_configuration(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    for rest in ("config", "stats"):
        assert (await api.get(f"/v2/models/m/{rest}")).refusal == (503, "model_not_loaded")
        assert (await api.get(f"/v2/models/m/versions/1/{rest}")).refusal == (503, "model_not_loaded")
        assert (await api.get(f"/v2/models/none/{rest}")).refusal == (404, "unknown_model")
        assert (await api.get(f"/v2/models/m/versions/x/{rest}")).refusal == (400, "invalid_parameter")
    await api.load("m")
    for rest in ("config", "stats"):
        assert (await api.get(f"/v2/models/m/versions/2/{rest}")).refusal == (503, "model_not_loaded")


def test_every_datatype_has_a_name_in_the_configuration() -> None:
    named = {datatype: data_type(datatype) for datatype in DATATYPES}
    assert named.pop("BYTES") == "TYPE_STRING"
    assert named == {datatype: f"TYPE_{datatype}" for datatype in named}
    assert data_type("seq(tensor(float))") == "TYPE_INVALID"


@pytest.mark.parametrize(
    ("max_batch_size", "shape", "expected"),
    [
        (0, (), {"dims": [1], "reshape": {"shape": []}}),
        (0, (3, -1), {"dims": [3, -1]}),
        (4, (-1,), {"dims": [1], "reshape": {"shape": []}}),
        (4, (-1, 3), {"dims": [3]}),
    ],
)
def test_dimensions_are_never_empty(
    max_batch_size: int, shape: tuple[int, ...], expected: dict[str, object]
) -> None:
    spec = TensorSpec("x", "INT64", shape, optional=True)
    config = model_config("m", 1, [spec], [], LoadParameters(max_batch_size=max_batch_size))
    assert config["input"] == [{"name": "x", "data_type": "TYPE_INT64", **expected, "optional": True}]
    assert ("dynamic_batching" in config) == (max_batch_size > 0)
