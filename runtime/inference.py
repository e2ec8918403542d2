"""What a worker does with `Infer`: tensors of the wire to ONNX Runtime's and back."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from runtime.errors import InferenceCancelled, InferenceFailed, InvalidInput
from runtime.wire import (
    BY_ONNX,
    DATATYPES,
    MAX_PAYLOAD_BYTES,
    MalformedTexts,
    Tensor,
    pack_texts,
    unpack_texts,
)

ELEMENT_TYPE_BFLOAT16 = 16
"""TensorProto.DataType in onnx.proto3."""


class Runner:
    """Runs one session; what it does not take is refused before the session sees it."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        inputs = session.get_inputs()
        self._types = {node.name: node.type for node in (*inputs, *session.get_overridable_initializers())}
        self._required = {node.name for node in inputs}
        self._outputs = {node.name: node.type for node in session.get_outputs()}
        self._default_outputs = [name for name, kind in self._outputs.items() if kind in BY_ONNX]
        every = (*self._types.values(), *self._outputs.values())
        self._has_bfloat16 = DATATYPES["BF16"].onnx in every

    def run(self, tensors: Sequence[Tensor], outputs: Sequence[str], run: ort.RunOptions) -> list[Tensor]:
        """Run the model once.

        Raises:
            InvalidInput: `invalid_input`.
            InferenceFailed: `inference_failed`.
            InferenceCancelled: `inference_cancelled`, when `run.terminate` was set meanwhile.
        """
        names = self._check_outputs(outputs)
        arrays = self._arrays(tensors)
        try:
            values = self._run(names, arrays, run)
        except InvalidArgument as error:
            raise InvalidInput(str(error)) from None
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
            if run.terminate:
                raise InferenceCancelled from None
            raise InferenceFailed(str(error) or type(error).__name__) from None
        result = [self._tensor(name, value) for name, value in zip(names, values, strict=True)]
        if sum(len(tensor.data) for tensor in result) > MAX_PAYLOAD_BYTES:
            raise InferenceFailed(f"the outputs are larger than {MAX_PAYLOAD_BYTES} bytes")
        return result

    def _run(self, names: list[str], arrays: dict[str, Any], run: ort.RunOptions) -> list[Any]:
        if not self._has_bfloat16:
            return list(self._session.run(names, arrays, run))
        values = {name: self._ort_value(name, array) for name, array in arrays.items()}
        return list(self._session.run_with_ort_values(names, values, run))

    def _ort_value(self, name: str, array: Any) -> ort.OrtValue:
        if self._types[name] == DATATYPES["BF16"].onnx:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPE_BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def _check_outputs(self, outputs: Sequence[str]) -> list[str]:
        for name in outputs:
            if name not in self._outputs:
                raise InvalidInput(f"the model has no output {name!r}")
            if self._outputs[name] not in BY_ONNX:
                raise InvalidInput(f"output {name!r} is a {self._outputs[name]}, which is no tensor to send")
        return list(dict.fromkeys(outputs)) or self._default_outputs

    def _arrays(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for tensor in tensors:
            if tensor.name in arrays:
                raise InvalidInput(f"input {tensor.name!r} is given twice")
            self._check_input(tensor)
            arrays[tensor.name] = to_array(tensor)
        if missing := self._required - arrays.keys():
            raise InvalidInput(f"no value for input {', '.join(map(repr, sorted(missing)))}")
        return arrays

    def _check_input(self, tensor: Tensor) -> None:
        expected = self._types.get(tensor.name)
        if expected is None:
            raise InvalidInput(f"the model has no input {tensor.name!r}")
        if expected not in BY_ONNX:
            raise InvalidInput(f"input {tensor.name!r} is a {expected}, which no tensor can be")
        if BY_ONNX[expected].name != tensor.datatype:
            wanted = BY_ONNX[expected].name
            raise InvalidInput(f"input {tensor.name!r} is {wanted}, not {tensor.datatype}")

    def _tensor(self, name: str, value: Any) -> Tensor:
        datatype = BY_ONNX[self._outputs[name]].name
        if not isinstance(value, ort.OrtValue):
            return to_tensor(name, datatype, value)
        if datatype != "BF16":
            return to_tensor(name, datatype, value.numpy())
        # numpy has no such type, so ONNX Runtime gives no array of it; on the CPU its memory can be read.
        data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        return Tensor(name, datatype, tuple(value.shape()), data)


def to_array(tensor: Tensor) -> Any:
    """View a tensor as a numpy array of its shape: no copy, but of strings.

    Raises:
        InvalidInput: `invalid_input`, for BYTES that are no text (all that ONNX Runtime takes from Python),
            or not as many elements as the shape says.
    """
    if tensor.datatype == "BYTES":
        elements = _texts(tensor)
        flat: Any = np.empty(len(elements), object)
        flat[:] = elements
    else:
        flat = np.frombuffer(tensor.data, DATATYPES[tensor.datatype].numpy)
    try:
        return flat.reshape(tensor.shape)
    except ValueError:
        shape = list(tensor.shape)
        raise InvalidInput(f"input {tensor.name!r} has {flat.size} elements, not those of {shape}") from None


def to_tensor(name: str, datatype: str, array: Any) -> Tensor:
    """Take the bytes of a numpy array: no copy if it is contiguous, but of strings."""
    if datatype == "BYTES":
        return Tensor(name, datatype, array.shape, pack_texts(array.ravel()))
    flat = np.ascontiguousarray(array, DATATYPES[datatype].numpy).reshape(-1)
    return Tensor(name, datatype, array.shape, flat.view(np.uint8).data if flat.size else b"")


def _texts(tensor: Tensor) -> list[str]:
    try:
        return unpack_texts(tensor.data)
    except MalformedTexts as error:
        raise InvalidInput(f"input {tensor.name!r}: {error}") from None
