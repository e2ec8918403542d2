"""The line of an inference: its members, its tensors, and its limits."""

import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.candidates import (
    DIGESTS,
    HERE,
    OUTCOME,
    TENSORS,
    TOOK_NS,
    make_answer,
    make_candidate,
    make_tensor,
)
from support.history import PLAIN

from features.records.lines import (
    MAX_DATA_BYTES,
    MAX_LINE_BYTES,
    TENSOR_BYTES,
    Candidate,
    DroppedRecords,
    encode_dropped,
    encode_inference,
)
from features.records.rules import Failures, RecordRule
from runtime.wire import Tensor

INPUT = make_tensor(np.arange(6).reshape(2, 3))
OUTPUT = Tensor("label", "INT64", (2,), b"[7, 1]", text=True)
OF_INPUT = {
    "name": "x",
    "datatype": "FP32",
    "shape": [2, 3],
    "form": "binary",
    "bytes": 24,
    "sha256": hashlib.sha256(INPUT.data).hexdigest(),
}


def decode(ended: Candidate, source: str = "") -> dict[str, Any]:
    line = encode_inference(ended, source)
    assert line is not None
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    found: dict[str, Any] = json.loads(line)
    return found


def test_line_of_answered_inference_has_all_members() -> None:
    assert decode(make_candidate(INPUT, outputs=(OUTPUT,)), "node-a") == {
        "type": "loadledger.inference",
        "id": "r1",
        "source": "node-a",
        "time": "2026-01-01T00:00:00.000001Z",
        "model": "digits",
        "version": 3,
        "position": 42,
        "subject": "alice",
        "request": "mine",
        "status": 200,
        "code": None,
        "share": 1.0,
        "total_us": TOOK_NS // 1000,
        "waited_us": 0,
        "queue_us": 1000,
        "compute_us": 2200,
        "inputs": [OF_INPUT],
        "outputs": [
            {
                "name": "label",
                "datatype": "INT64",
                "shape": [2],
                "form": "json",
                "bytes": 6,
                "sha256": hashlib.sha256(b"[7, 1]").hexdigest(),
            }
        ],
    }


@pytest.mark.parametrize(
    ("here", "status", "code"),
    [(HERE, 504, "inference_timeout"), (None, None, "aborted"), (HERE, None, "aborted")],
)
def test_line_of_failed_inference_has_its_question(here: Any, status: int | None, code: str) -> None:
    ended = make_candidate(INPUT, outputs=None, status=status, code=code)
    ended.here = here
    line = decode(ended)
    assert (line["status"], line["code"], line["outputs"]) == (status, code, [])
    assert (line["version"], line["position"]) == ((None, None) if here is None else (3, 42))
    assert (line["queue_us"], line["compute_us"]) == (None, None)
    assert line["inputs"] == [OF_INPUT]


def test_line_without_question_has_no_tensors() -> None:
    ended = make_candidate(outputs=None, status=400, code="invalid_input")
    ended.question = ended.here = None
    line = decode(ended)
    assert (line["request"], line["inputs"], line["version"]) == (None, [], None)


@pytest.mark.parametrize(
    ("failures", "has_failed", "share"),
    [(Failures.ALL, True, 1.0), (Failures.ALL, False, 0.25), (Failures.SHARE, True, 0.25)],
)
def test_share_in_line_is_the_probability(failures: Failures, *, has_failed: bool, share: float) -> None:
    rule = RecordRule(models=("*",), share=0.25, failures=failures)
    assert decode(make_candidate(outputs=None if has_failed else (), rule=rule))["share"] == share


def test_durations_beyond_measured_time_are_cut() -> None:
    most = 2**63 - 1
    for outcome in (replace(OUTCOME, queue_ns=most), replace(OUTCOME, infer_ns=most, input_ns=most)):
        ended = make_candidate()
        ended.answered = make_answer(outcome=outcome)
        line = decode(ended)
        assert line["queue_us"] + line["compute_us"] == 4000


BUFFERS = st.binary(max_size=64).flatmap(
    lambda data: st.sampled_from([data, bytearray(data), memoryview(b"-" + data)[1:]])
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
TENSOR = st.builds(
    Tensor,
    TEXTS,
    st.sampled_from(["FP32", "BYTES"]),
    st.lists(st.integers(0, 2**63 - 1), max_size=64).map(tuple),
    BUFFERS,
    st.booleans(),
)


@PLAIN
@given(st.lists(TENSOR, max_size=3), st.lists(TENSOR, max_size=3), TEXTS)
@example([Tensor('\n"\\\u2028\x00', "BYTES", (), b"\n\xff")], [], "\n")
def test_tensors_return_from_json_and_base64(inputs: list[Tensor], outputs: list[Tensor], text: str) -> None:
    ended = make_candidate(*inputs, outputs=outputs, rule=TENSORS, request_id=text)
    line = decode(ended)
    assert line["id"] == text
    for sent, found in zip([*inputs, *outputs], [*line["inputs"], *line["outputs"]], strict=True):
        data = base64.b64decode(found["data"], validate=True)
        assert data == sent.data
        assert found["bytes"] == len(data)
        assert found["sha256"] == hashlib.sha256(data).hexdigest()
        assert (found["name"], found["datatype"], tuple(found["shape"]), found["form"]) == (
            *(sent.name, sent.datatype, sent.shape),
            "json" if sent.text else "binary",
        )
    ended.rule = DIGESTS
    without = decode(ended)
    for tensor in [*line["inputs"], *line["outputs"]]:
        del tensor["data"]
    assert without == line


@pytest.mark.parametrize("beyond", [0, 1])
def test_data_is_left_out_above_its_limit(beyond: int) -> None:
    half = MAX_DATA_BYTES // 2 - TENSOR_BYTES - len("x")
    question, answer = (Tensor("x", "UINT8", (size,), bytes(size)) for size in (half, half + beyond))
    line = encode_inference(make_candidate(question, outputs=(answer,), rule=TENSORS), "")
    assert line is not None
    assert len(line) <= MAX_LINE_BYTES
    found = json.loads(line)
    for tensor, sent in ((found["inputs"][0], question), (found["outputs"][0], answer)):
        assert ("data" in tensor) is not bool(beyond)
        assert (tensor["bytes"], tensor["sha256"]) == (len(sent.data), hashlib.sha256(sent.data).hexdigest())


def test_line_with_too_many_long_names_is_none() -> None:
    name_bytes = 4096
    outputs = [Tensor("n" * name_bytes, "UINT8", (0,), b"")] * (MAX_LINE_BYTES // name_bytes)
    assert encode_inference(make_candidate(outputs=outputs), "") is None
    assert encode_inference(make_candidate(outputs=outputs[: len(outputs) // 2]), "") is not None


def test_line_of_missing_inferences_has_their_number() -> None:
    lost = DroppedRecords(id="d1", source="a", time="t", model="digits", dropped=7, reason="queue_full")
    line = encode_dropped(lost)
    assert line.endswith(b"}\n")
    assert json.loads(line) == {
        "type": "loadledger.dropped",
        "id": "d1",
        "source": "a",
        "time": "t",
        "model": "digits",
        "dropped": 7,
        "reason": "queue_full",
    }
