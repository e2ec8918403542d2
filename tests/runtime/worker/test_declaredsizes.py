"""What a model declares of its inputs and outputs: what no request can ask, and sizes of outputs."""

from collections.abc import Sequence

import numpy as np
import pytest

from runtime.wire import MAX_PAYLOAD_BYTES, TensorSpec
from runtime.worker.declaredsizes import OBSERVED_RUNS, OutputSizes, explain_uselessness

LIMIT = 64 * 2**20
X = TensorSpec("x", "FP32", (1,))
MAPS = TensorSpec("m", "seq(map(int64,tensor(float)))", ())
SEQUENCE = TensorSpec("s", "seq(tensor(float))", ())
FLOAT8 = TensorSpec("f", "tensor(float8e4m3fn)", (1,))
PICTURE = TensorSpec("p", "FP32", (-1, 3, 2160, 3840))
PAST = TensorSpec("past", "FP16", (-1, 8, -1, 64), dimensions=("batch", "", "past", ""))
HUGE = TensorSpec("h", "FP32", (-1, MAX_PAYLOAD_BYTES), dimensions=("n", ""))
OF_N = TensorSpec("x", "FP32", (-1,), dimensions=("n",))


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
        ([OF_N], [HUGE, X], None),
        ([OF_N], [HUGE], "its smallest output has 1073741824 bytes, and an answer may have 268435456: let"),
    ],
)
def test_model_that_no_request_can_ask_is_explained(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], words: str | None
) -> None:
    reason = explain_uselessness(inputs, outputs, LIMIT)
    assert (reason is None) if words is None else (reason is not None and words in reason)


IMAGE = TensorSpec("x", "UINT8", (-1, -1, 3), dimensions=("height", "width", ""))
MASK = TensorSpec("y", "FP32", (-1, -1), dimensions=("height", "width"))


@pytest.mark.parametrize(
    ("output", "seen", "answered", "told"),
    [
        pytest.param(MASK, (4, 6, 3), (4, 6), 4 * 10 * 20, id="kept"),
        pytest.param(MASK, (4, 6, 3), (2, 3), 0, id="not kept"),
        pytest.param(MASK, (4, 1, 3), (4, 1), 0, id="length 1 shows nothing"),
        pytest.param(MASK, (1, 6, 3), (1, 6), 4 * 10 * 20, id="but of a first dimension"),
        pytest.param(TensorSpec("y", "FP32", (-1, -1)), (4, 6, 3), (4, 6), 0, id="no names"),
        pytest.param(TensorSpec("y", "FP32", (2**20,)), (4, 6, 3), (2**20,), 2**22, id="fixed"),
        pytest.param(TensorSpec("y", "BYTES", (-1,), dimensions=("width",)), (4, 6, 3), (6,), 0, id="texts"),
    ],
)
def test_declared_shape_counts_once_a_run_keeps_it(
    output: TensorSpec, seen: tuple[int, ...], answered: tuple[int, ...], told: int
) -> None:
    sizes, feed = OutputSizes([IMAGE], [output], is_batched=False), {"x": np.zeros((10, 20, 3), np.uint8)}
    assert sizes.tell("y", feed) == 0
    sizes.observe(["y"], {"x": np.zeros(seen, np.uint8)}, [np.zeros(answered, np.float32)])
    assert sizes.tell("y", feed) == told


def test_first_dimensions_are_one_in_batches() -> None:
    rows = [TensorSpec(name, "FP32", (-1, 8)) for name in "xy"]
    feed = {"x": np.zeros((5, 8), np.float32)}
    for is_batched, told in ((True, 160), (False, 0)):
        sizes = OutputSizes(rows[:1], rows[1:], is_batched=is_batched)
        assert sizes.runs_to_observe == OBSERVED_RUNS * is_batched
        sizes.observe(["y"], feed, [feed["x"]])
        assert sizes.tell("y", feed) == told
