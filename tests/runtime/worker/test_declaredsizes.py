"""Models that no request can ask, by their declared inputs and outputs."""

from collections.abc import Sequence

import pytest

from runtime.wire import MAX_PAYLOAD_BYTES, TensorSpec
from runtime.worker.declaredsizes import explain_uselessness

LIMIT = 64 * 2**20
X = TensorSpec("x", "FP32", (1,))
MAPS = TensorSpec("m", "seq(map(int64,tensor(float)))", ())
SEQUENCE = TensorSpec("s", "seq(tensor(float))", ())
FLOAT8 = TensorSpec("f", "tensor(float8e4m3fn)", (1,))
PICTURE = TensorSpec("p", "FP32", (-1, 3, 2160, 3840))
PAST = TensorSpec("past", "FP16", (-1, 8, -1, 64), dimensions=("batch", "", "past", ""))
HUGE = TensorSpec("h", "FP32", (-1, MAX_PAYLOAD_BYTES))
FIXED = TensorSpec("h", "FP32", (1, MAX_PAYLOAD_BYTES))


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([X], [X, MAPS], None),
        ([X], [SEQUENCE, FLOAT8, X], None),
        ([X], [MAPS], "no answer can have output 'm', which is a seq(map(int64,tensor(float))): convert"),
        ([X], [SEQUENCE], "SequenceAt"),
        ([X], [FLOAT8], "end the graph with a Cast"),
        ([X], [TensorSpec("y", "FP32", (1,) * 65)], "output 'y' its 65 dimensions, of at most 64"),
        ([X, TensorSpec("o", "optional(seq(tensor(float)))", (), optional=True)], [X], None),
        ([X, SEQUENCE], [X], "no request can give input 's'"),
        ([PICTURE], [X], "99532800 bytes, and a request may have 67108864: start the server with --max-req"),
        ([X, PAST], [X], None),
        ([TensorSpec("x", "BYTES", (2**24 + 1,))], [X], "--max-request-size=65MiB"),
        ([TensorSpec("x", "FP32", (2**29,))], [X], "let it take less at once"),
        ([X], [HUGE], None),  # it may be empty
        ([X], [FIXED, X], None),
        ([X], [FIXED], "its smallest output has 1073741824 bytes, and an answer may have 268435456: let"),
    ],
)
def test_model_that_no_request_can_ask_is_explained(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], words: str | None
) -> None:
    reason = explain_uselessness(inputs, outputs, LIMIT)
    assert (reason is None) if words is None else (reason is not None and words in reason)
