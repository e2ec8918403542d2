"""Requests of the repository extension, and the configuration that models report."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from events.types import LoadParameters
from runtime.onnxfile import ModelTensors
from runtime.wire import DATATYPES, TensorSpec
from server.http.validation import InvalidBody
from server.v2 import tritonconfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
MEMBERS = (
    "name", "platform", "backend", "input", "max_batch_size", "dynamic_batching", "instance_group",
    "version_policy",
)  # fmt: skip


def requested(config: object) -> dict[str, Any]:
    """Return the parameters of a load with this configuration."""
    return read(config)[0]


def read(config: object) -> tuple[dict[str, Any], tritonconfig.LoadConfig]:
    return tritonconfig.read_load({"parameters": {"config": json.dumps(config)}}, "m")


def test_configuration_may_repeat_what_is_fixed() -> None:
    fixed = {
        "name": "m",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "model_transaction_policy": {"decoupled": False},
        "input": [],
        "output": [],
        "instance_group": [],
        "version_policy": {"latest": {"num_versions": 1}},
    }
    assert requested(fixed) == requested({"name": "", "platform": "", "version_policy": {"latest": {}}}) == {}
    nothing: Any = ({}, tritonconfig.LoadConfig())
    assert tritonconfig.read_load({}, "m") == tritonconfig.read_load({"parameters": {}}, "m") == nothing


QUEUE = {
    "priority_levels": "3",
    "default_priority_level": "2",
    "default_queue_policy": {"max_queue_size": 50},
}
OF_QUEUE = {"priority_levels": 3, "default_priority_level": 2, "max_queue": 50}


def test_configuration_sets_parameters() -> None:
    delay = {"max_queue_delay_microseconds": "50"}
    configs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_batch_size": 0}, {"max_batch_size": 0}),
        ({"max_batch_size": "8"}, {"max_batch_size": 8}),
        ({"maxBatchSize": 8}, {"max_batch_size": 8}),
        ({"max_batch_size": 0, "dynamic_batching": delay}, {"max_batch_size": 0}),  # as in Triton
        (
            {"maxBatchSize": 8, "dynamicBatching": {"maxQueueDelayMicroseconds": "50"}},
            {"max_batch_size": 8, "max_queue_delay_us": 50},
        ),
        ({"versionPolicy": {"specific": {"versions": ["2"]}}, "modelTransactionPolicy": {}}, {"version": 2}),
        ({"max_batch_size": 8, "dynamic_batching": {}}, {"max_batch_size": 8, "max_queue_delay_us": 0}),
        ({"max_batch_size": 8, "dynamic_batching": delay}, {"max_batch_size": 8, "max_queue_delay_us": 50}),
        ({"max_batch_size": 0, "dynamic_batching": QUEUE}, {"max_batch_size": 0, **OF_QUEUE}),
        (
            {"max_batch_size": 8, "dynamic_batching": QUEUE},
            {"max_batch_size": 8, "max_queue_delay_us": 0, **OF_QUEUE},
        ),
        (
            {"max_batch_size": 0, "dynamic_batching": {"priority_levels": 0, "default_queue_policy": {}}},
            {"max_batch_size": 0, "priority_levels": 0},
        ),
        ({"instance_group": [{}]}, {"instances": 1}),
        (
            {"instance_group": [{"name": "a", "count": 3, "kind": "KIND_CPU"}]},
            {"instances": 3, "devices": ["cpu"]},
        ),
        ({"instance_group": [{"kind": "KIND_GPU"}]}, {"instances": 1, "devices": ["cuda:*"]}),
        (
            {"instance_group": [{"kind": "KIND_GPU", "gpus": [1, 0]}]},
            {"instances": 1, "devices": ["cuda:1", "cuda:0"]},
        ),
        ({"instance_group": [{"kind": "KIND_MODEL"}]}, {"instances": 1}),
        ({"version_policy": {"specific": {"versions": ["2"]}}}, {"version": 2}),
    ]
    for config, expected in configs:
        assert requested(config) == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"name": "other"}, "name"),
        ({"platform": "tensorrt_plan"}, "platform"),
        ({"backend": "python"}, "backend"),
        ({"input": [{"name": "x", "format": "FORMAT_NHWC"}]}, "input: format"),
        ({"input": [{"name": "x", "allowRaggedBatch": True}]}, "input: allow_ragged_batch"),
        ({"output": [{"name": "y", "label_filename": "labels.txt"}]}, "output: label_filename"),
        ({"model_transaction_policy": {"decoupled": True}}, "model_transaction_policy"),
        ({"sequence_batching": {}}, "sequence_batching"),
        ({"instance_group": [{"count": 1, "kind": "KIND_TPU"}]}, "KIND_CPU"),
        ({"instance_group": [{"count": 1}, {"count": 1}]}, "one group"),
        ({"instance_group": [{"profile": ["max"]}]}, "profile"),
        ({"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [4]}}, "preferred_batch_size"),
        (
            {"max_batch_size": 4, "dynamic_batching": {"default_queue_policy": {"timeout_action": "DELAY"}}},
            "default_queue_policy: timeout_action",
        ),
        ({"version_policy": {}}, "version_policy"),
        ({"version_policy": {"all": {}}}, "all"),
        ({"version_policy": {"latest": {"num_versions": 2}}}, "version_policy"),
        ({"version_policy": {"specific": {"versions": [1, 2]}}}, "version_policy"),
        ({"version_policy": {"specific": {"versions": [1]}, "latest": {}}}, "version_policy"),
        ({"x" * 1000: 1}, "x…"),
    ],
)
def test_unsupported_configuration_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(tritonconfig.NotSupported, match=reason):
        requested(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        *((f'{{"max_batch_size": {value}}}', "max_batch_size") for value in ("true", "1.5", '"x"')),
        ('{"dynamic_batching": {}}', "max_batch_size"),
        ('{"max_batch_size": 8, "maxBatchSize": 4}', "twice"),
        ('{"input": {}}', "input"),
        ('{"input": [1]}', "input"),
        ('{"input": [{"dims": [1]}]}', "name"),
        ('{"output": [{"name": "y", "dims": ["a"]}]}', "dims"),
        ('{"output": [{"name": "y", "dims": [-2]}]}', "dims"),
        ('{"max_batch_size": 4, "dynamic_batching": []}', "dynamic_batching"),
        ('{"instance_group": {}}', "instance_group"),
        ('{"instance_group": [1]}', "instance_group"),
        ('{"version_policy": {"specific": {}}}', "versions"),
        ("[]", "JSON object"),
        ("", "config: not JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 40 + "]" * 40, "deep"),
        ({}, "string"),
        (None, "string"),
    ],
)
def test_malformed_configuration_is_refused(config: object, reason: str) -> None:
    with pytest.raises(InvalidBody, match=reason):
        tritonconfig.read_load({"parameters": {"config": config}}, "m")


@pytest.mark.parametrize("check", [lambda body: tritonconfig.read_load(body, "m"), tritonconfig.check_unload])
def test_unknown_members_are_refused_by_name(check: Any) -> None:
    with pytest.raises(InvalidBody, match="config"):
        check({"config": "{}"})
    with pytest.raises(InvalidBody, match="parameters"):
        check({"parameters": []})
    for name in ("file:1/model.onnx", "priority", "pinned"):
        with pytest.raises(tritonconfig.NotSupported, match=name):
            check({"parameters": {name: "eA=="}})


def test_unload_of_dependents_is_refused() -> None:
    for parameters in ({}, {"unload_dependents": False}):
        tritonconfig.check_unload({"parameters": parameters})
    with pytest.raises(tritonconfig.NotSupported, match="unload_dependents"):
        tritonconfig.check_unload({"parameters": {"unload_dependents": True}})
    with pytest.raises(InvalidBody, match="unload_dependents"):
        tritonconfig.check_unload({"parameters": {"unload_dependents": 0}})


def test_index_request_has_only_ready() -> None:
    assert [tritonconfig.read_only_ready(body) for body in ({}, {"ready": False}, {"ready": True})] == [
        False,
        False,
        True,
    ]
    for body in ({"ready": 1}, {"ready": None}, {"x": True}):
        with pytest.raises(InvalidBody):
            tritonconfig.read_only_ready(body)


@PLAIN
@given(st.dictionaries(st.sampled_from(MEMBERS), JSON))
def test_any_configuration_is_read_or_refused(config: dict[str, Any]) -> None:
    try:
        taken = requested(config)
    except (InvalidBody, tritonconfig.NotSupported):
        return
    assert all(type(number) is int for number in taken.values())


TENSORS = ModelTensors(
    (
        TensorSpec("x", "FP32", (-1, 3)),
        TensorSpec("n", "INT64", ()),
        TensorSpec("o", "BYTES", (-1,), optional=True),
    ),
    (TensorSpec("y", "FP32", (-1, 5)), TensorSpec("z", "FP32", ())),
)
X: dict[str, Any] = {"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 3]}
N: dict[str, Any] = {"name": "n", "data_type": "TYPE_INT64", "dims": [1], "reshape": {}}
Y: dict[str, Any] = {"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 5]}


@pytest.mark.parametrize(
    "config",
    [
        {"input": [X, N], "output": [Y]},
        {"input": [N, X, {"name": "o", "data_type": "TYPE_STRING", "dims": ["-1"], "optional": True}]},
        {"input": [{**X, "dims": [3]}, N]},  # without the batch dimension
        {"input": [{**X, "dims": ["16", "3"]}, N]},
        {"input": [{"name": "n"}, {"name": "x"}]},
        {"output": [{"name": "z", "dataType": "TYPE_FP32", "dims": [7, -1]}]},  # no rank is declared
    ],
    ids=str,
)
def test_inputs_and_outputs_may_repeat_the_models(config: object) -> None:
    tritonconfig.check_tensors(read(config)[1], 2, TENSORS)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"input": [X]}, r"input: \['x'\] contradicts version 2 of the model, which has \['x', 'n'\]"),
        ({"input": [X, N, {"name": "w"}]}, r"input: 'w' contradicts .+ \['x', 'n', 'o'\]"),
        ({"output": [{"name": "x"}]}, r"output: 'x' contradicts .+ \['y', 'z'\]"),
        (
            {"input": [{**X, "data_type": "TYPE_FP64"}, N]},
            "input 'x': data_type: 'TYPE_FP64' contradicts .+ TYPE_FP32; leave it out",
        ),
        ({"input": [{**X, "dims": [4]}, N]}, r"input 'x': dims: \[4\] contradicts .+ \[-1, 3\]"),
        ({"input": [{**X, "dims": [-1, -1]}, N]}, r"dims: \[-1, -1\] contradicts .+ \[-1, 3\]"),
        ({"input": [{**X, "dims": [1, 2, 3]}, N]}, r"dims: \[1, 2, 3\] contradicts"),
        ({"input": [X, {**N, "dims": [2]}]}, "input 'n': reshape"),
        ({"input": [X, {"name": "n", "dims": [1]}]}, r"input 'n': dims: \[1\] contradicts .+ \[\]"),
        ({"input": [{**X, "dims": [9], "reshape": {"shape": [3, 3]}}, N]}, "input 'x': reshape"),
        ({"input": [{**X, "optional": True}, N]}, "input 'x': optional: True contradicts .+ False"),
        ({"output": [{**Y, "dims": [6]}]}, "output 'y': dims"),
        ({"input": [X, N, {"name": "w" * 1000}]}, "input: 'w{63} contradicts"),
    ],
)
def test_inputs_and_outputs_that_contradict_the_models_are_refused(config: object, reason: str) -> None:
    with pytest.raises(tritonconfig.NotSupported, match=reason):
        tritonconfig.check_tensors(read(config)[1], 2, TENSORS)


def test_every_datatype_has_a_triton_name() -> None:
    named = {datatype: tritonconfig.data_type(datatype) for datatype in DATATYPES}
    assert named.pop("BYTES") == "TYPE_STRING"
    assert named == {datatype: f"TYPE_{datatype}" for datatype in named}
    assert tritonconfig.data_type("seq(tensor(float))") == "TYPE_INVALID"


def test_reported_dimensions_are_never_empty() -> None:
    scalar = {"dims": [1], "reshape": {"shape": []}}
    for size, shape, expected in (
        (0, (), scalar), (0, (3, -1), {"dims": [3, -1]}), (4, (-1,), scalar), (4, (-1, 3), {"dims": [3]})
    ):  # fmt: skip
        specs = [TensorSpec("x", "INT64", shape, optional=True)]
        parameters = LoadParameters(max_batch_size=size, max_queue=5)
        config = tritonconfig.model_config("m", 1, specs, [], parameters, joins_requests=size > 0)
        assert msgspec.to_builtins(config.input) == [
            {"name": "x", "data_type": "TYPE_INT64", **expected, "optional": True}
        ]
        assert ("max_queue_delay_microseconds" in config.dynamic_batching) == (size > 0)
