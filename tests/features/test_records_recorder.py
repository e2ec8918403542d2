"""The recorder on the event loop: which inferences it takes, how they wait, and what finds no room."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import DIGESTS, HERE, make_answer
from support.history import FEWER

from features.records.lines import Candidate, encode_inference, encode_or_drop
from features.records.recorder import (
    BATCH,
    ENTRY_BYTES,
    LONG_BYTES,
    Entry,
    InferenceRecorder,
)
from features.records.rules import Failures, RecordRule, is_chosen
from runtime.errors import InferenceTimeout, InvalidInput, ModelNotLoaded
from runtime.memoryplan import OBSERVED_BYTES
from runtime.router import InferenceRequest
from runtime.statistics import InferenceTimes
from runtime.wire import Tensor
from server.errors import ServerProblem

LIMIT_S = 60
KNOWN = {"digits"}
"""The models that the ledger knows."""
ANSWER = make_answer()
ABC_SHARE = 0.7283949
"""Nearly that of the id `abc`: a larger share has it."""


def observe(
    recorder: InferenceRecorder, model_id: str = "digits", request_id: str = "abc"
) -> Candidate | None:
    rule = recorder.find_rule(model_id)
    return None if rule is None else recorder.begin(rule, request_id, model_id, "alice", InferenceTimes(0))


def end(
    recorder: InferenceRecorder,
    data: bytes | memoryview = b"",
    result: Any = ANSWER,
    model_id: str = "digits",
) -> None:
    candidate = observe(recorder, model_id)
    assert candidate is not None
    candidate.here = HERE
    candidate.question = InferenceRequest(None, None, (Tensor("x", "UINT8", (len(data),), data),))
    candidate.end(result)


def lines_of(queue: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the lines of the queue, made as the thread makes them."""
    found = []
    for entry in queue:
        content = entry.content if isinstance(entry.content, bytes) else encode_inference(entry.content, "")
        assert content is not None
        lines = [json.loads(line) for line in content.splitlines()]
        assert len(lines) == entry.records
        assert {line["model"] for line in lines} == {entry.model_id}
        found += lines
    return found


@pytest.mark.parametrize("failures", Failures)
@pytest.mark.parametrize("has_failed", [False, True])
@pytest.mark.parametrize(
    ("share", "is_in_share"), [(ABC_SHARE, False), (ABC_SHARE + 1e-6, True), (1.0, True)]
)
async def test_inference_is_recorded_by_share_or_failure(
    failures: Failures, share: float, *, has_failed: bool, is_in_share: bool
) -> None:
    rule = RecordRule(models=("dig*",), share=share, failures=failures)
    recorder = InferenceRecorder((rule,), "", lambda: None, lambda: KNOWN)
    assert observe(recorder, "other") is None
    assert is_chosen("abc", share) == is_in_share
    candidate = observe(recorder)
    assert (candidate is not None) == (is_in_share or failures is Failures.ALL)
    if candidate is not None:
        candidate.end(InvalidInput("x") if has_failed else ANSWER)
    queue, missing = recorder.take()
    is_recorded = is_in_share or (has_failed and failures is Failures.ALL)
    assert [line["id"] for line in lines_of(queue)] == ["abc"] * is_recorded
    assert not missing


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInput("x"), 400, "invalid_input"),
        (InferenceTimeout("x"), 504, "inference_timeout"),
        (ModelNotLoaded("x"), 503, "model_not_loaded"),
        (web.RequestPayloadError("x"), 400, "invalid_request"),
        (ZeroDivisionError("x"), 500, "internal"),
        (ConnectionResetError("x"), None, "aborted"),
        (asyncio.CancelledError(), None, "aborted"),
    ],
)
async def test_failed_inference_has_status_and_code(
    error: BaseException, status: int | None, code: str
) -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    end(recorder, result=error)
    [line] = lines_of(recorder.take()[0])
    assert (line["status"], line["code"]) == (status, code)


async def test_inference_of_unknown_model_is_not_recorded() -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    for model_id in ("invented", "digits"):
        candidate = observe(recorder, model_id)
        assert candidate is not None
        candidate.end(ServerProblem("malformed", code="invalid_request"))
    [line] = lines_of(recorder.take()[0])
    assert (line["model"], line["version"], line["position"]) == ("digits", None, None)
    assert not recorder.dropped


@pytest.mark.parametrize(
    ("error", "is_recorded"),
    [(ServerProblem("gone", code="node_unreachable"), True), (asyncio.CancelledError(), False)],
)
async def test_inference_sent_to_another_server_is_recorded_there(
    error: BaseException, *, is_recorded: bool
) -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    candidate = observe(recorder)
    assert candidate is not None
    candidate.was_sent = True
    candidate.end(error)
    assert bool(recorder.take()[0]) is is_recorded


async def test_full_queue_drops_and_counts_until_memory_returns() -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    room, data = 16, memoryview(bytes(OBSERVED_BYTES // 16 - 2 * ENTRY_BYTES))
    for _ in range(room + 5):
        end(recorder, data)
    end(recorder, data, InvalidInput("x"), model_id="other")
    assert recorder.queued_bytes <= OBSERVED_BYTES
    queue, missing = recorder.take()
    end(recorder, data)  # what was taken counts until the thread has written it
    assert [entry.records for entry in queue] == [1] * room
    assert missing == {("digits", "queue_full"): 5, ("other", "queue_full"): 1}
    recorder.give_back(queue)
    assert recorder.queued_bytes == 0
    end(recorder, data)
    queue, missing = recorder.take()
    assert (len(queue), missing) == (1, {("digits", "queue_full"): 1})
    assert recorder.dropped == {"queue_full": 7}


async def test_line_too_long_is_none() -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    candidate = observe(recorder)
    assert candidate is not None
    long = Tensor("n" * 300_000, "UINT8", (0,), b"")
    candidate.end(make_answer(*[long] * 60))
    [entry] = recorder.take()[0]
    assert isinstance(entry.content, Candidate)
    assert encode_or_drop(entry.content, "") == "too_long"


async def test_short_tensors_make_lines_in_batches_by_model() -> None:
    recorder = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN)
    for number in range(2 * BATCH + 1):
        end(recorder, model_id="ab"[number % 2])
    queue, _ = recorder.take()
    assert [(entry.model_id, entry.records) for entry in queue] == [
        *[("a", BATCH // 2), ("b", BATCH // 2)] * 2,
        ("a", 1),
    ]
    assert all(isinstance(entry.content, bytes) and entry.size == len(entry.content) for entry in queue)
    assert recorder.queued_bytes == sum(entry.size for entry in queue)
    assert len(lines_of(queue)) == 2 * BATCH + 1


async def test_long_tensors_go_to_the_thread_at_once() -> None:
    wakes = list[None]()
    recorder = InferenceRecorder((DIGESTS,), "", lambda: wakes.append(None), lambda: KNOWN)
    end(recorder, bytes(LONG_BYTES // 2))
    assert not wakes
    end(recorder, bytes(LONG_BYTES))
    assert len(wakes) == 1
    long, short = recorder.take()[0]
    assert isinstance(long.content, Candidate)
    assert isinstance(short.content, bytes)


async def test_single_line_wakes_the_thread_after_a_while() -> None:
    woken = asyncio.Event()
    recorder = InferenceRecorder((DIGESTS,), "", woken.set, lambda: KNOWN)
    end(recorder)
    await asyncio.wait_for(woken.wait(), LIMIT_S)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0, 100, LONG_BYTES, OBSERVED_BYTES // 5, OBSERVED_BYTES]), st.integers(1, 2 * BATCH)
    )
    | st.sampled_from(["take", "give_back"]),
    max_size=20,
)
MEMORY = memoryview(bytes(OBSERVED_BYTES))


@FEWER
@given(STEPS)
def test_any_traffic_is_queued_within_bounds_or_counted(steps: list[Any]) -> None:
    async def play() -> None:
        recorder, ended, seen = InferenceRecorder((DIGESTS,), "", lambda: None, lambda: KNOWN), 0, 0
        taken, missing = list[Sequence[Entry]](), Counter[Any]()
        for step in [*steps, "take", *["give_back"] * len(steps), "give_back"]:
            if step == "take":
                queue, lost = recorder.take()
                taken.append(queue)
                missing += lost
                seen += sum(entry.records for entry in queue)
            elif step == "give_back":
                if taken:
                    recorder.give_back(taken.pop(0))
            else:
                size, number = step
                ended += number
                for _ in range(number):
                    end(recorder, MEMORY[:size])
            assert 0 <= recorder.queued_bytes <= OBSERVED_BYTES + 2 * ENTRY_BYTES  # or one inference
        assert recorder.queued_bytes == 0
        assert seen + missing.total() == ended
        assert missing.total() == recorder.dropped.total()

    asyncio.run(play())
