"""Oracle by runs: whether a row of a batch gets another answer beside other rows.

`find_dependence` draws rows of very different values, and compares each element of each output of a row:

1. Beside other rows with the same position beside copies of itself. Both batches have the same shapes, so
   ONNX Runtime runs the same kernels in the same order, and the answers of independent rows are equal bit by
   bit. This finds whatever depends on the values of other rows.
2. Beside copies of itself with the row alone. This finds what depends on the number of rows or on the
   position. ONNX Runtime runs other kernels for more rows, which round differently: `_Rounding` says how far.

A row that runs alone and is refused in a batch depends on the other rows too. A row that is refused alone has
values that the model does not take, such as an id without an embedding, and is drawn again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

Feed = Mapping[str, Any]
"""Arrays by input; the first dimension is the batch's."""
Answer = Sequence[Any]
MakeRows = Callable[[np.random.Generator, int], Feed]
"""Makes this many rows of inputs."""

NOT_COMPARED: Final = "too few rows were compared: the model refused them, or answered all alike"

POOL = 6
"""Rows of a round."""
ROUNDS = 6
BATCHES: Final = {2: 10, 3: 6, 5: 4}
"""Batches of a round by number of rows: all positions of a pair, and some permutations of more."""
MIN_COMPARED = 30
"""Fewest comparisons of a row with itself beside rows that are answered differently."""
MAX_DRAWS = 40
"""Draws for a pool of which the model may refuse most, by ids out of range."""

RELATIVE = 1e-3
"""Part of an element's own magnitude: FP32 has 1e-7, which ten layers of long sums enlarge."""
RELATIVE_OF_HALVES = 2e-2
"""The same of FP16 and BF16, which have 1e-3."""
ABSOLUTE = 1e-5
"""Part of a row's largest element: a sum near zero keeps the rounding of its large terms."""
ROUNDING_FACTOR = 100.0
"""Factor of the differences in `_Rounding`, which are random. Those of a kernel may be systematic: it adds
2,048 equal terms one by one for one row, and in pairs for two. A published model enlarges that 50 times."""
PERTURBATION = 2.0**-22
"""Relative change of weights and inputs: two units in the last place of FP32."""
PERTURBED_SESSIONS = 2
WEIGHTS: Final = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
MIN_WEIGHTS = 8
"""Elements of a tensor that is changed: smaller ones may be the factors of a Resize, which give a shape."""

SIDES: Final = (32, 64, 48, 96, 128, 160, 224, 256, 320, 416, 640, 8, 16, 28, 112)
"""Lengths of the open sides of a picture."""
SEQUENCES: Final = (16, 8, 32, 4, 64, 1, 128, 80, 512, 2, 256, 1024, 16000, 224, 640, 43844)
"""Lengths of the other open dimensions: words, frames, samples."""
PICTURE_DIMENSIONS = 4
MAX_HINTS = 12
DTYPES: Final[Mapping[str, str]] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    "tensor(string)": "O",
    **{
        f"tensor({name})": name
        for name in (f"{sign}int{bits}" for sign, bits in product(("", "u"), (8, 16, 32, 64)))
    },
}
"""numpy's types by ONNX Runtime's names. Inputs of other types, such as BF16, need a `make_rows`."""


class Refused(Exception):
    """ONNX Runtime refuses inputs."""


def find_dependence(
    model: bytes | Path,
    make_rows: MakeRows | None = None,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    min_compared: int = MIN_COMPARED,
    limit_s: float = 60.0,
) -> str | None:
    """Return how the answer to a row depends on other rows of its batch, None if no run shows it.

    Args:
        model: an ONNX file, or its bytes.
        make_rows: makes rows for inputs with a structure; by default each input is drawn for itself.
        seed: of the draws.
        rounds: pools of rows.
        min_compared: with fewer comparisons the result is NOT_COMPARED.
        limit_s: no round begins later.

    Raises:
        Refused: ONNX Runtime does not load the model.
    """
    runner = _Runner(model)
    rng = np.random.default_rng(seed)
    draw = _Drawer(runner).draw if make_rows is None else _by_maker(make_rows)
    compared = 0
    deadline = time.monotonic() + limit_s
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        comparison = _Comparison(runner, _draw_pool(runner, draw, rng, number))
        defect = comparison.find_defect(rng, deadline)
        if defect is not None:
            return defect
        compared += comparison.compared
    return None if compared >= min_compared else NOT_COMPARED


class _Runner:
    """A session of one thread, which runs the same operators in the same order each time."""

    def __init__(self, model: bytes | Path) -> None:
        self._model = model if isinstance(model, bytes) else str(model)
        self._others: list[ort.InferenceSession] | None = None
        self._session = self._create(self._model)
        self.inputs = self._session.get_inputs()
        self.outputs = [each.name for each in self._session.get_outputs()]

    def run(self, feed: Feed) -> Answer:
        return self._run(self._session, feed)

    def run_others(self, feed: Feed) -> Iterator[Answer]:
        """Yield answers of models that are the same but for rounding; none where they refuse the inputs.

        The first has no fused operators and no blocked layouts. The others have other last bits of weights,
        since inputs of whole numbers have none.
        """
        if self._others is None:
            self._others = [self._create(self._model, is_optimized=False)]
            self._others += [
                self._create(_perturb_weights(self._model, seed)) for seed in range(PERTURBED_SESSIONS)
            ]
        for session in self._others:
            with suppress(Refused):
                yield self._run(session, feed)

    @staticmethod
    def _create(model: bytes | str, *, is_optimized: bool = True) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if not is_optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # noqa: BLE001 - ONNX Runtime's exceptions have no common base
            raise Refused(str(problem)) from None

    def _run(self, session: ort.InferenceSession, feed: Feed) -> Answer:
        try:
            answer: Answer = session.run(None, dict(feed))
        except Exception as problem:  # noqa: BLE001 - see above
            raise Refused(str(problem)) from None
        return answer


# --- Rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row that the model takes alone.

    Attributes:
        feed: the inputs, one row each.
        alone: the answer to the row alone.
        kinds: words for its values.
    """

    feed: Feed
    alone: Answer
    kinds: str

    @property
    def is_finite(self) -> bool:
        return all(map(_is_finite, chain(self.feed.values(), self.alone)))


Draw = Callable[[np.random.Generator, int, int], Iterator[tuple[Feed, str]]]


def _by_maker(make_rows: MakeRows) -> Draw:
    def draw(rng: np.random.Generator, _: int, count: int) -> Iterator[tuple[Feed, str]]:
        rows = make_rows(rng, count)
        for index in range(count):
            yield {name: array[index : index + 1] for name, array in rows.items()}, f"made {index}"

    return draw


def _draw_pool(runner: _Runner, draw: Draw, rng: np.random.Generator, number: int) -> list[_Row]:
    """Draw rows until the model has taken enough."""
    pool = list[_Row]()
    for feed, kinds in draw(rng, number, MAX_DRAWS):
        try:
            pool.append(_Row(feed, runner.run(feed), kinds))
        except Refused:
            continue
        if len(pool) == POOL:
            break
    return pool


Fill = Callable[[np.random.Generator, tuple[int, ...]], Any]


def _with_one(value: float) -> Fill:
    def fill(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        array = rng.uniform(-1, 1, shape)
        if array.size:
            array.reshape(-1)[rng.integers(array.size)] = value
        return array

    return fill


def _prefix(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return a mask of the first elements, as many as a row has words."""
    length = shape[-1] if shape else 1
    return np.broadcast_to(np.arange(length) < rng.integers(1, length + 1), shape)


def _up_to(most: int) -> Fill:
    return lambda rng, shape: rng.integers(0, most + 1, shape)


def _one_value(most: int) -> Fill:
    """Return a number for the whole row: its length, or its label."""
    return lambda rng, shape: np.full(shape, rng.integers(0, most + 1))


FLOATS: Final[dict[str, Fill]] = {
    "noise": lambda rng, shape: rng.uniform(-1, 1, shape),
    "loud": lambda rng, shape: rng.uniform(-1000, 1000, shape),
    "quiet": lambda rng, shape: rng.uniform(-1e-4, 1e-4, shape),
    "zero": lambda _, shape: np.zeros(shape),
    "constant": lambda rng, shape: np.full(shape, rng.uniform(0.1, 1)),
    "negative": lambda rng, shape: -rng.uniform(0.1, 2, shape),
    "positive": lambda rng, shape: rng.uniform(0, 1, shape),
    "pixels": lambda rng, shape: rng.integers(0, 256, shape),
    "saturating": lambda rng, shape: rng.uniform(-1e6, 1e6, shape),
}
NOT_FINITE: Final[dict[str, Fill]] = {
    "NaN": _with_one(np.nan),
    "infinity": _with_one(np.inf),
    "negative infinity": _with_one(-np.inf),
}
BOOLEANS: Final[dict[str, Fill]] = {
    "false": lambda _, shape: np.zeros(shape),
    "true": lambda _, shape: np.ones(shape),
    "mixed": _up_to(1),
    "prefix": _prefix,
    "one": lambda rng, shape: (
        np.eye(1, max(1, int(np.prod(shape))), int(rng.integers(0, max(1, int(np.prod(shape))))))
        .reshape(-1)[: int(np.prod(shape))]
        .reshape(shape)
    ),
}
PIXELS: Final[dict[str, Fill]] = {
    "dark": _up_to(3),
    "bright": lambda rng, shape: rng.integers(200, 256, shape),
    "pixels": _up_to(255),
    "constant": _one_value(255),
    "zero": lambda _, shape: np.zeros(shape),
}
WORDS = ("", "a", "be", "batch of rows", "Größe", "one two three four five six seven", "x" * 40, "a.b-c")


def _words(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.array(WORDS, np.object_)[rng.integers(0, len(WORDS), shape)]


def _word(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.full(shape, WORDS[rng.integers(0, len(WORDS))], np.object_)


def _whole_numbers(longest: int) -> dict[str, Fill]:
    """Return draws of ids, of masks, of positions, and of lengths up to the row's longest dimension."""
    return {
        "length": _one_value(longest),
        "prefix": _prefix,
        "mask": _up_to(1),
        "ones": lambda _, shape: np.ones(shape),
        "zeros": lambda _, shape: np.zeros(shape),
        "small ids": _up_to(3),
        "ids": _up_to(20),
        "large ids": _up_to(1000),
        "longest": lambda _, shape: np.full(shape, longest),
        "positions": lambda _, shape: np.arange(int(np.prod(shape))).reshape(shape),
        "id": _one_value(2),
    }


class _Drawer:
    """Draws each input for itself, in lengths on which the model runs."""

    def __init__(self, runner: _Runner) -> None:
        self._runner = runner
        self._lengths: dict[str, tuple[int, ...]] | None = None

    def draw(self, rng: np.random.Generator, number: int, count: int) -> Iterator[tuple[Feed, str]]:
        """Yield rows: by round their floats differ much, differ little, or are not all finite."""
        if self._lengths is None and all(spec.type in DTYPES for spec in self._runner.inputs):
            self._lengths = self._find_lengths(rng)
        if self._lengths is None:
            return
        for index in range(count):
            floats: Mapping[str, Fill] = FLOATS
            if number % 3 == 1:
                floats = {name: FLOATS[name] for name in ("noise", "positive", "negative")}
            elif number % 3 == 2 and index % 2:
                name = [*NOT_FINITE][index // 2 % len(NOT_FINITE)]
                floats = {name: NOT_FINITE[name]}
            yield self._draw_row(rng, self._lengths, floats)

    def _draw_row(
        self, rng: np.random.Generator, lengths: Mapping[str, tuple[int, ...]], floats: Mapping[str, Fill]
    ) -> tuple[Feed, str]:
        feed, kinds = dict[str, Any](), list[str]()
        longest = max(chain.from_iterable(lengths.values()), default=1)
        for spec in self._runner.inputs:
            dtype, shape = np.dtype(DTYPES[spec.type]), lengths[spec.name]
            fills: Mapping[str, Fill] = {
                "f": floats,
                "b": BOOLEANS,
                "O": {"words": _words, "word": _word},
                "u": PIXELS if dtype.itemsize == 1 else _whole_numbers(longest),
                "i": _whole_numbers(longest),
            }[dtype.kind]
            name = [*fills][rng.integers(len(fills))]
            feed[spec.name] = fills[name](rng, (1, *shape)).astype(dtype)
            kinds.append(name)
        return feed, ", ".join(kinds)

    def _find_lengths(self, rng: np.random.Generator) -> dict[str, tuple[int, ...]] | None:
        """Return the lengths of each input's dimensions after the batch's, None if the model takes none."""
        hints = list[int]()
        for known in self._guess_lengths(hints):
            lengths = {
                spec.name: tuple(known[each] for each in _dimensions(spec)) for spec in self._runner.inputs
            }
            for floats in (FLOATS, FLOATS, {"noise": FLOATS["noise"]}, {"noise": FLOATS["noise"]}) * 3:
                feed, _ = self._draw_row(rng, lengths, floats)
                try:
                    self._runner.run(feed)
                except Refused as refusal:
                    hints += [int(word) for word in _numbers(str(refusal)) if int(word) not in hints]
                else:
                    return lengths
        return None

    def _guess_lengths(self, hints: Sequence[int]) -> Iterator[dict[Any, int]]:
        """Yield lengths by dimension: usual ones, then numbers from refusals for each open dimension."""
        sides, sequences, known = dict[Any, None](), dict[Any, None](), dict[Any, int]()
        for spec in self._runner.inputs:
            for index, dimension in enumerate(_dimensions(spec), 1):
                if isinstance(dimension, int):
                    known[dimension] = dimension
                elif len(spec.shape) >= PICTURE_DIMENSIONS and index == 1:
                    known[dimension] = 3
                elif len(spec.shape) >= PICTURE_DIMENSIONS:
                    sides[dimension] = None
                else:
                    sequences[dimension] = None
        for side, length in zip((*SIDES, SIDES[0]), SEQUENCES, strict=True):
            yield known | dict.fromkeys(sequences, length) | dict.fromkeys(sides, side)
            if not sides and not sequences:
                return
        opened = [*sequences, *sides]
        usual = dict.fromkeys(sequences, SEQUENCES[0]) | dict.fromkeys(sides, SIDES[0])
        for hint in hints[:MAX_HINTS]:
            for dimension in opened:
                yield known | usual | {dimension: hint}


def _dimensions(spec: Any) -> list[Any]:
    """Return a key of each dimension after the batch's: its length, its name, or its input and index."""
    return [
        each if isinstance(each, int | str) and each else (spec.name, index)
        for index, each in enumerate(spec.shape[1:], 1)
    ]


def _numbers(text: str) -> list[str]:
    words = "".join(letter if letter.isdigit() else " " for letter in text).split()
    return [word for word in words if 1 < int(word) < 2**16]


# --- Comparison ---------------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    """Comparisons of the rows of a pool.

    Attributes:
        runner: runs the model.
        pool: the rows.
        compared: the number of rows in batches, beside a row that is answered differently.
    """

    runner: _Runner
    pool: Sequence[_Row]
    compared: int = 0
    _copies: dict[tuple[int, int], Answer] = field(default_factory=dict)
    _roundings: dict[int, "_Rounding"] = field(default_factory=dict)

    def find_defect(self, rng: np.random.Generator, deadline: float) -> str | None:
        for count, batches in BATCHES.items():
            for _ in range(batches if len(self.pool) >= count else 0):
                defect = self._compare_batch([int(each) for each in rng.permutation(len(self.pool))[:count]])
                if defect is not None:
                    return defect
                if time.monotonic() > deadline:
                    return None
        return None

    def _compare_batch(self, chosen: Sequence[int]) -> str | None:
        rows = [self.pool[index] for index in chosen]
        try:
            batch = self.runner.run(_join([row.feed for row in rows]))
        except Refused as refusal:
            return f"{len(rows)} rows that run alone are refused together: {refusal}"
        for position, index in enumerate(chosen):
            row = rows[position]
            defect = self._compare_copies(index, len(rows)) or self._compare_row(
                index, position, batch, len(rows)
            )
            if defect is not None:
                others = "; ".join(each.kinds for each in rows)
                return f"row {position} of {len(rows)} ({others}): {defect}"
            self.compared += any(
                not all(map(_are_equal, row.alone, other.alone)) for other in rows if other is not row
            )
        return None

    def _compare_copies(self, index: int, count: int) -> str | None:
        """Compare a row beside copies of itself with the row alone, once."""
        row = self.pool[index]
        if (index, count) in self._copies:
            return None
        try:
            copies = self._copies[index, count] = self.runner.run(_join([row.feed] * count))
        except Refused as refusal:
            return f"copies of a row that runs alone are refused: {refusal}"
        for name, alone, joined in zip(self.runner.outputs, row.alone, copies, strict=True):
            if (alone is None) != (joined is None):
                return f"output {name!r} is there, or missing, only beside copies"
            if alone is None:
                continue
            if not isinstance(alone, np.ndarray) or not isinstance(joined, np.ndarray):
                return f"output {name!r} is no tensor"
            if alone.shape[:1] != (1,) or joined.shape != (count, *alone.shape[1:]):
                return f"output {name!r} has shape {alone.shape} for one row and {joined.shape} for {count}"
        if not row.is_finite:
            return None  # vectorised code treats NaN unlike scalar code, at each position of a batch
        for position in range(count):
            for name, alone, joined in zip(self.runner.outputs, row.alone, copies, strict=True):
                if alone is None or _are_equal(alone, joined[position : position + 1]):
                    continue
                if not self._rounding(index).allows(name, joined[position : position + 1]):
                    return f"output {name!r}, beside copies, is not the row's alone: " + _first_difference(
                        joined[position : position + 1], alone
                    )
        return None

    def _compare_row(self, index: int, position: int, batch: Answer, count: int) -> str | None:
        """Compare a row beside others with the same position beside copies, bit by bit."""
        copies = self._copies[index, count]
        for name, joined, copied in zip(self.runner.outputs, batch, copies, strict=True):
            if joined is None and copied is None:
                continue
            if np.shape(joined) != np.shape(copied):
                return f"output {name!r} has shape {np.shape(joined)}, and {np.shape(copied)} beside copies"
            here = slice(position, position + 1)
            if not _are_equal(joined[here], copied[here]):
                again = self.runner.run(_join([self.pool[index].feed] * count))
                words = (
                    "is not reproducible" if not all(map(_are_equal, again, copies)) else "depends on others"
                )
                return f"output {name!r} {words}: " + _first_difference(joined[here], copied[here])
        return None

    def _rounding(self, index: int) -> "_Rounding":
        if index not in self._roundings:
            self._roundings[index] = _Rounding(self.runner, self.pool[index])
        return self._roundings[index]


class _Rounding:
    """How far rounding moves the answer to a row, found by other runs of the row alone.

    With more rows, ONNX Runtime multiplies matrices in other blocks, which round differently. How much of
    that reaches an output depends on the model: a subtraction of nearly equal numbers enlarges it, a
    quantisation moves it by a step, an ArgMax of equal scores takes the other one. So the row alone runs
    without fused operators, and with weights and inputs that differ in their last bits. Its answer beside
    copies may differ by `ROUNDING_FACTOR` times as much. A tolerance without these runs would be too small
    for such models, or hide a coupling in others.
    """

    def __init__(self, runner: _Runner, row: _Row) -> None:
        rng = np.random.default_rng(0)
        self._alone = dict(zip(runner.outputs, row.alone, strict=True))
        feeds = [row.feed]
        if any(array.dtype.kind == "f" for array in row.feed.values()):
            feeds += [{name: _perturb(rng, each) for name, each in row.feed.items()} for _ in range(2)]
        self._others = [
            dict(zip(runner.outputs, answer, strict=True))
            for feed in feeds
            for answer in runner.run_others(feed)
        ]

    def allows(self, name: str, joined: Any) -> bool:
        """Whether each element of an output is the row's own, but for rounding."""
        alone = self._alone[name]
        others = [each[name] for each in self._others if np.shape(each[name]) == alone.shape]
        if alone.dtype.kind != "f":
            return any(not _are_equal(alone, other) for other in others)
        one, both = alone.astype(np.float64), joined.astype(np.float64)
        moved = [np.abs(one - other.astype(np.float64)).max(initial=0) for other in others]
        relative = RELATIVE if alone.dtype.itemsize >= np.dtype(np.float32).itemsize else RELATIVE_OF_HALVES
        absolute = ABSOLUTE * np.abs(one).max(initial=0) + ROUNDING_FACTOR * max(moved, default=0)
        return bool((np.abs(one - both) <= relative * np.abs(one) + absolute).all())


def _perturb(rng: np.random.Generator, array: Any) -> Any:
    if array.dtype.kind != "f":
        return array
    unit = (
        PERTURBATION if array.dtype.itemsize >= np.dtype(np.float32).itemsize else np.finfo(array.dtype).eps
    )
    return (array * (1 + unit * rng.choice([-1.0, 1.0], array.shape))).astype(array.dtype)


def _perturb_weights(model: bytes | str, seed: int) -> bytes:
    """Return a model with other last bits of its weights."""
    rng = np.random.default_rng(seed)
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    tensors = [*proto.graph.initializer]
    tensors += [each.t for node in proto.graph.node for each in node.attribute if each.HasField("t")]
    for tensor in tensors:
        if tensor.data_type in WEIGHTS and np.prod(tensor.dims, dtype=int) >= MIN_WEIGHTS:
            tensor.CopyFrom(
                numpy_helper.from_array(_perturb(rng, numpy_helper.to_array(tensor)), tensor.name)
            )
    made: bytes = proto.SerializeToString()
    return made


def _join(feeds: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _is_finite(array: Any) -> bool:
    return not isinstance(array, np.ndarray) or array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _are_equal(one: Any, other: Any) -> bool:
    """Whether arrays are equal, with NaN equal to NaN."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return one is other
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _first_difference(seen: Any, expected: Any) -> str:
    differs = seen != expected
    if seen.dtype.kind == "f":
        differs &= ~(np.isnan(seen) & np.isnan(expected))
    index = (0, *map(int, np.argwhere(differs)[0][1:])) if differs.any() else (0,) * seen.ndim
    counts = f"{int(differs.sum())} of {seen.size} elements differ"
    return f"{counts}, {index[1:]} is {seen[index]}, not {expected[index]}"
