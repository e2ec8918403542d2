"""Ended inferences, as a recorder gets them."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from events.types import LoadParameters
from features.records.lines import Candidate
from features.records.rules import RecordRule, What
from runtime.consumer.running import RunningLoad
from runtime.router import Answered, Here, InferenceRequest
from runtime.statistics import InferenceTimes
from runtime.wire import DATATYPES, Outcome, Tensor

MODEL = "digits"
DIGESTS = RecordRule(models=("*",))
TENSORS = RecordRule(models=("*",), what=What.TENSORS)
HERE = Here(MODEL, 3, 42, (), (), RunningLoad("job", MODEL, 3, LoadParameters(timeout_s=1), lambda: None), 1)
"""The load that answers: version 3, whose `ModelLoaded` is at position 42."""
TOOK_NS = 5_000_000
OUTCOME = Outcome(1, queue_ns=1_000_000, input_ns=100_000, infer_ns=2_000_000, output_ns=100_000)


def make_tensor(array: np.ndarray[Any, Any], datatype: str = "FP32", name: str = "x") -> Tensor:
    """Return an array as a binary tensor."""
    return Tensor(name, datatype, array.shape, array.astype(DATATYPES[datatype].numpy).tobytes())


def make_answer(*outputs: Tensor, outcome: Outcome = OUTCOME) -> Answered:
    return Answered(HERE, outcome, outputs)


def make_candidate(
    *inputs: Tensor,
    outputs: Sequence[Tensor] | None = (),
    rule: RecordRule = DIGESTS,
    request_id: str = "r1",
    model_id: str = MODEL,
    **more: Any,
) -> Candidate:
    """Return an inference that has ended; without `outputs`, it has failed."""
    arrived_ns = time.monotonic_ns()
    times = InferenceTimes(arrived_ns, 0, arrived_ns + 500_000, arrived_ns + 4_500_000)
    answered = None if outputs is None else make_answer(*outputs)
    ended = {"ended_ns": arrived_ns + TOOK_NS, "at_ns": 1_767_225_600_000_001_000}
    return Candidate(
        request_id,
        model_id,
        "alice",
        times,
        HERE,
        InferenceRequest("mine", None, inputs),
        take=lambda *_: None,
        rule=rule,
        is_chosen=True,
        answered=answered,
        **ended | {"status": None if outputs is None else 200} | more,
    )
