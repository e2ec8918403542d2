"""What the repository extension's requests may carry, from plain values."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from server.v2.tritonconfig import NotSupported, asked_load, asked_ready, check_unload
from server.validation import InvalidBody

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
MEMBERS = (
    "name", "platform", "backend", "input", "max_batch_size", "dynamic_batching", "instance_group",
    "version_policy",
)  # fmt: skip


def asked(config: object) -> dict[str, Any]:
    """Return what a load with this configuration asks for."""
    return asked_load({"parameters": {"config": json.dumps(config)}}, "m")


def test_no_configuration_and_an_empty_one_ask_for_nothing() -> None:
    assert asked_load({}, "m") == asked_load({"parameters": {}}, "m") == asked({}) == {}


def test_what_is_so_anyway_may_be_said() -> None:
    so = {
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
    assert asked(so) == asked({"name": "", "platform": "", "version_policy": {"latest": {}}}) == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_batch_size": 0}, {"max_batch_size": 0}),
        ({"max_batch_size": "8"}, {"max_batch_size": 8}),
        ({"max_batch_size": 8, "dynamic_batching": {}}, {"max_batch_size": 8, "max_queue_delay_us": 0}),
        (
            {"max_batch_size": 8, "dynamic_batching": {"max_queue_delay_microseconds": "50"}},
            {"max_batch_size": 8, "max_queue_delay_us": 50},
        ),
        ({"instance_group": [{}]}, {"instances": 1}),
        ({"instance_group": [{"name": "a", "count": 3, "kind": "KIND_CPU"}]}, {"instances": 3}),
        ({"version_policy": {"specific": {"versions": ["2"]}}}, {"version": 2}),
    ],
)
def test_what_is_chosen_is_asked_for(config: dict[str, Any], expected: dict[str, int]) -> None:
    assert asked(config) == expected


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"name": "other"}, "name"),
        ({"platform": "tensorrt_plan"}, "platform"),
        ({"backend": "python"}, "backend"),
        ({"input": [{"name": "x"}]}, "input"),
        ({"output": [{"name": "y"}]}, "output"),
        ({"model_transaction_policy": {"decoupled": True}}, "model_transaction_policy"),
        ({"sequence_batching": {}}, "sequence_batching"),
        ({"optimization": {}}, "optimization"),
        ({"instance_group": [{"count": 1, "kind": "KIND_GPU"}]}, "KIND_CPU"),
        ({"instance_group": [{"count": 1}, {"count": 1}]}, "one group"),
        ({"instance_group": [{"gpus": [0]}]}, "gpus"),
        ({"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [4]}}, "preferred_batch_size"),
        ({"version_policy": {}}, "version_policy"),
        ({"version_policy": {"all": {}}}, "all"),
        ({"version_policy": {"latest": {"num_versions": 2}}}, "version_policy"),
        ({"version_policy": {"specific": {"versions": [1, 2]}}}, "version_policy"),
        ({"version_policy": {"specific": {"versions": [1]}, "latest": {}}}, "version_policy"),
        ({"x" * 1000: 1}, "x…"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(config: dict[str, Any], told: str) -> None:
    with pytest.raises(NotSupported, match=told):
        asked(config)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"max_batch_size": True}, "max_batch_size"),
        ({"max_batch_size": 1.5}, "max_batch_size"),
        ({"max_batch_size": "x"}, "max_batch_size"),
        ({"dynamic_batching": {}}, "max_batch_size"),
        ({"max_batch_size": 0, "dynamic_batching": {}}, "max_batch_size"),
        ({"max_batch_size": 4, "dynamic_batching": []}, "dynamic_batching"),
        ({"instance_group": {}}, "instance_group"),
        ({"instance_group": [1]}, "instance_group"),
        ({"version_policy": {"specific": {}}}, "versions"),
        ([], "JSON object"),
    ],
)
def test_what_no_configuration_can_be_is_refused(config: object, told: str) -> None:
    with pytest.raises(InvalidBody, match=told):
        asked(config)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "config: not JSON"),
        ("{", "config: not JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 40 + "]" * 40, "deep"),
    ],
)
def test_a_configuration_is_strict_json_in_a_string(text: str, told: str) -> None:
    with pytest.raises(InvalidBody, match=told):
        asked_load({"parameters": {"config": text}}, "m")
    with pytest.raises(InvalidBody, match="string"):
        asked_load({"parameters": {"config": {}}}, "m")
    with pytest.raises(InvalidBody, match="string"):
        asked_load({"parameters": {"config": None}}, "m")


@pytest.mark.parametrize("known", [asked_load, lambda body, _: check_unload(body)])
def test_other_members_and_parameters_are_refused_by_name(known: Any) -> None:
    with pytest.raises(InvalidBody, match="config"):
        known({"config": "{}"}, "m")
    with pytest.raises(InvalidBody, match="parameters"):
        known({"parameters": []}, "m")
    for name in ("file:1/model.onnx", "priority", "pinned"):
        with pytest.raises(NotSupported, match=name):
            known({"parameters": {name: "eA=="}}, "m")


def test_an_unload_takes_no_dependents() -> None:
    for parameters in ({}, {"unload_dependents": False}):
        check_unload({"parameters": parameters})
    with pytest.raises(NotSupported, match="unload_dependents"):
        check_unload({"parameters": {"unload_dependents": True}})
    with pytest.raises(InvalidBody, match="unload_dependents"):
        check_unload({"parameters": {"unload_dependents": 0}})


def test_an_index_takes_ready_and_nothing_else() -> None:
    assert [asked_ready(body) for body in ({}, {"ready": False}, {"ready": True})] == [False, False, True]
    for body in ({"ready": 1}, {"ready": None}, {"x": True}):
        with pytest.raises(InvalidBody):
            asked_ready(body)


@PLAIN
@given(st.dictionaries(st.sampled_from(MEMBERS), JSON))
def test_any_configuration_is_taken_as_numbers_or_refused(config: dict[str, Any]) -> None:
    try:
        taken = asked(config)
    except (InvalidBody, NotSupported):
        return
    assert all(type(number) is int for number in taken.values())
