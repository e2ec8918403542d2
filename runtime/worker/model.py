"""A session that can serve, and what it takes and gives."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import onnxruntime as ort

from runtime.errors import LoadRefused
from runtime.wire import BY_ONNX, MAX_NAME_CHARACTERS, TensorSpec
from runtime.worker.batching import BatchDimension
from runtime.worker.inference import Runner

OPTIONAL = re.compile(r"optional\((.*)\)")
"""How ONNX Runtime calls the type of what may have no value; it takes it as if it had, or left out."""


@dataclass(frozen=True, slots=True)
class Model:
    """A session that can serve.

    Attributes:
        runner: runs it.
        inputs: all that it takes, as the server is told.
        outputs: all that it gives.
        dimension: along which requests go together, if they are to.
    """

    runner: Runner
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimension: BatchDimension | None


def model_of(session: ort.InferenceSession, max_batch_size: int) -> Model:
    """Describe a session, of which so many elements may be run at once; 0 is no batching.

    Raises:
        LoadRefused: `invalid_model`, it has names that are too long, or not the batch dimension to have.
    """
    inputs, outputs = _inputs(session), tuple(_spec(node) for node in session.get_outputs())
    dimension = None
    if max_batch_size:
        names = [node.name for node in session.get_inputs()]
        _check_batch_dimension([*inputs[: len(names)], *outputs])
        dimension = BatchDimension(max_batch_size, names)
    return Model(Runner(session, inputs, outputs), inputs, outputs, dimension)


def _inputs(session: ort.InferenceSession) -> tuple[TensorSpec, ...]:
    """Describe what the session takes: last, and optional, what it has a default for."""
    defaults = (_spec(node) for node in session.get_overridable_initializers())
    return (
        *(_spec(node) for node in session.get_inputs()),
        *(msgspec.structs.replace(spec, optional=True) for spec in defaults),
    )


def _spec(node: ort.NodeArg) -> TensorSpec:
    if max(len(node.name), len(node.type)) > MAX_NAME_CHARACTERS:
        reason = f"an input or output has a name or type of more than {MAX_NAME_CHARACTERS} characters"
        raise LoadRefused("invalid_model", reason)
    inner = OPTIONAL.fullmatch(node.type)
    datatype = BY_ONNX.get(node.type if inner is None else inner[1])
    shape = tuple(length if isinstance(length, int) and length >= 0 else -1 for length in node.shape)
    name = node.type if datatype is None else datatype.name
    return TensorSpec(node.name, name, shape, optional=inner is not None)


def _check_batch_dimension(specs: Iterable[TensorSpec]) -> None:
    """Refuse a model that is said to have a batch dimension and does not."""
    for spec in specs:
        if not spec.shape or spec.shape[0] != -1:
            reason = (
                f"{spec.name!r} has shape {list(spec.shape)}: with max_batch_size the first dimension of each"
                " input and output has to be of any length (-1)"
            )
            raise LoadRefused("invalid_model", reason)
