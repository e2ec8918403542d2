"""Inputs and outputs of an inference: tensors of the wire, binary or JSON, to numpy's arrays and back.

Source of the rules for JSON: "Tensor Data" of the Open Inference Protocol v2: flat or nested, row-major, with
as many elements as the shape; FP16 and BF16 have no JSON form.
"""

import ctypes
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from typing import Any, Literal

import msgspec
import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from runtime.errors import InferenceCancelled, InferenceFailed, InvalidInput, NotRepresentable
from runtime.requestjson import explain_malformed
from runtime.wire import (
    ALIGNMENT,
    DATATYPES,
    MAX_PAYLOAD_BYTES,
    Buffer,
    MalformedTexts,
    Tensor,
    TensorHead,
    TensorSpec,
    WantedOutput,
    pack_texts,
    unpack_texts,
)
from runtime.worker.declaredsizes import least_bytes
from runtime.worker.refusals import explain_refusal
from runtime.worker.sharedtensors import AnswerRegion

MAX_JSON_BYTES = 64 * 2**20
"""Limit of an output's tensor before encoding: the size of a request. JSON takes several times as much."""

_BINARY_ONLY = ("FP16", "BF16")
_FLOATS = ("FP32", "FP64")
_QUOTED = {b"NaN": b'"NaN"', b"Infinity": b"Inf", b"Inf": b'"Inf"', b'-"': b'"-'}
"""Replacements, in this order, that make strings of NaN and the infinities, which numpy reads as numbers."""
_FLOAT_OR_QUOTED = float | Literal["NaN", "-NaN", "Inf", "-Inf"]
_ELEMENT: dict[str, type] = {"BOOL": bool, "BYTES": str, "FP32": float, "FP64": float}
_TYPES = {datatype.name: np.dtype(datatype.numpy) for datatype in DATATYPES.values()}
_COUNTED_BYTES = 4096
"""From this length on, numpy counts a byte in a sixth of the time (measured)."""
PART_ELEMENTS = 2**14
"""Elements of an array that become JSON text at once: Python's numbers for a whole array would take eight
times its memory, and one long text twice its own while it grows."""
STRING_BYTES = 96
"""Python's object for a string, and its entry in a growing list."""
ROOM_BYTES = 2 * 2**20
"""Python takes memory in pieces of at most this size."""
_BRACKET, _COMMA = ord("["), ord(",")
_FIRST_OF_AN_ELEMENT = frozenset(b'-0123456789tf"')
_BRACKETS = re.compile(rb"[\[ \t\r\n]*")
_ENCODER = msgspec.json.Encoder()


ELEMENT_TYPE_BFLOAT16 = 16
"""TensorProto.DataType in onnx.proto3."""
COPIED_BYTES = 32 * 2**10
"""Copying this much takes about as long as creating a view."""
ALIGNED_COPY_BYTES = 8 * 2**10
"""Copying this much takes about as long as asking for an array's address."""
TOO_LONG = (
    f"the outputs are larger than {MAX_PAYLOAD_BYTES} bytes, which is the most of an answer: ask for fewer of"
    " them, or send less at once"
)
MAX_LISTED = 20
"""Names that an error lists."""
KNOWN_CHOICES = 64
"""Lists of wanted outputs that are cached; a hostile client may send more."""


def check_json(name: str, datatype: str) -> None:
    """Refuse an output whose datatype has no JSON form.

    Raises:
        NotRepresentable: `not_representable`, naming the output.
    """
    if datatype in _BINARY_ONLY:
        reason = f"output '{name}': {datatype} cannot be sent as JSON; ask for the binary data form"
        raise NotRepresentable(reason)


def decode_text(tensor: Tensor) -> Any:
    """Return a tensor's JSON text as an array of its datatype and shape.

    Raises:
        InvalidInput: `invalid_input`, naming the input and its defect.
    """
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    if datatype in _BINARY_ONLY:
        raise InvalidInput(f"input '{name}': {datatype} cannot be sent as JSON; use the binary data form")
    depth = _depth(tensor.data)
    if depth not in (1, _nesting(shape)):
        raise InvalidInput(f"input '{name}': data must be a flat list, or nested as its shape {list(shape)}")
    if datatype == "BYTES":
        _check_memory(bytes(tensor.data))
    elif 0 not in shape:
        _check_count(name, shape, tensor.data)
    not_finite = 0
    try:
        try:
            values = _decoder(_ELEMENT.get(datatype, int), depth).decode(tensor.data)
        except msgspec.DecodeError as error:
            values, not_finite = _decode_not_finite(datatype, depth, bytes(tensor.data), error)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = explain_malformed(tensor.data, error)
        raise InvalidInput(f"input '{name}': data is not {datatype}: {reason}") from None
    array = _array(name, datatype, values, not_finite)
    found = array.shape
    if found == shape:
        return array
    if found == (shape[:depth] if depth > 1 else (math.prod(shape),)):
        return _reshape(name, array, shape)
    raise InvalidInput(f"input '{name}': data has shape {list(found)}, declared is {list(shape)}")


def _decode_not_finite(
    datatype: str, depth: int, text: bytes, error: msgspec.DecodeError
) -> tuple[list[Any], int]:
    """Return the elements of a text with NaN or infinities as strings, and the number of these.

    Raises:
        DecodeError: `error` without NaN or infinities; otherwise the first other defect.
    """
    if b'"' in text:
        raise error
    for each, quoted in _QUOTED.items():
        text = text.replace(each, quoted)
    if b'"' not in text:
        raise error
    if datatype not in _FLOATS:
        raise msgspec.DecodeError("it has no NaN and no Infinity")
    return _decoder(_FLOAT_OR_QUOTED, depth).decode(text), text.count(b'"') // 2


def _check_count(name: str, shape: tuple[int, ...], text: Buffer) -> None:
    """Refuse a text whose number of elements differs from the shape's, before each becomes an object."""
    if len(text) <= _COUNTED_BYTES:
        count = bytes(text).count(b",") + 1
    else:
        count = int(np.count_nonzero(np.frombuffer(text, np.uint8) == _COMMA)) + 1
    if count != math.prod(shape):
        raise InvalidInput(f"input '{name}': data has {count} elements, declared is {list(shape)}")


def encode_text(name: str, datatype: str, array: Any) -> list[Buffer]:
    """Return an array's elements, flat and row-major, as JSON text, in parts.

    Raises:
        NotRepresentable: `not_representable`, the elements have no JSON form, or are too many.
    """
    check_json(name, datatype)
    if datatype != "BYTES":
        _check_size(name, array.nbytes)
    flat = array.ravel()
    if datatype == "BYTES":
        _check_size(name, sum(4 + len(each.encode()) for each in flat.tolist()))
    parts, length = list[Buffer](), 0
    for start in range(0, max(flat.size, 1), PART_ELEMENTS):
        part = _encode_part(flat[start : start + PART_ELEMENTS], start, flat.size)
        parts.append(part)
        length += len(part)
        if length > MAX_PAYLOAD_BYTES:
            raise NotRepresentable(f"output '{name}' is too long as JSON: ask for the binary data form")
    return parts


def _encode_part(elements: Any, start: int, total: int) -> bytearray:
    """Return some elements of a list as JSON text, with its brackets and commas where they belong.

    Without memory `encode` crashes the process (msgspec 0.22), and `encode_into` raises MemoryError. NaN and
    infinities are written as in JavaScript: JSON has no form for them, and Triton's clients read this one.
    """
    text = bytearray()
    _ENCODER.encode_into(elements.tolist(), text)
    if elements.dtype.kind == "f" and b"null" in text:
        text = bytearray(json.dumps(elements.tolist(), separators=(",", ":")).encode())
    if start:
        text[0] = _COMMA
    if start + elements.size < total:
        del text[-1]
    return text


def _check_size(name: str, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise NotRepresentable(
            f"output '{name}' is {size} bytes; as JSON at most {MAX_JSON_BYTES} are sent: "
            "ask for the binary data form"
        )


def _check_memory(text: bytes) -> None:
    """Check that there is memory for the strings of a JSON text.

    Without it msgspec 0.22 crashes the process. malloc is asked, not mmap: after a long text a heap may keep
    all memory within the limit, so that a new mapping fails.

    Raises:
        MemoryError: there is too little.
    """
    needed = ROOM_BYTES + (text.count(b",") + 1) * STRING_BYTES + len(text) * (1 if text.isascii() else 4)
    np.empty(needed, np.uint8)  # untouched pages take no memory


@cache
def _decoder(element: Any, depth: int) -> msgspec.json.Decoder[list[Any]]:
    nested: Any = element
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)


def _depth(data: Buffer) -> int:
    """Return the number of brackets that open the text."""
    if len(data) > 1 and data[0] == _BRACKET and data[1] in _FIRST_OF_AN_ELEMENT:
        return 1
    opening = _BRACKETS.match(data)
    return opening[0].count(b"[") if opening else 0


def _nesting(shape: tuple[int, ...]) -> int:
    """Return the depth of nested data: nothing can be nested in a dimension of length 0."""
    return shape.index(0) + 1 if 0 in shape else max(1, len(shape))


def _array(name: str, datatype: str, values: list[Any], not_finite: int) -> Any:
    try:
        with np.errstate(over="ignore"):  # the decoder reads FP64; numbers that round to infinity are refused
            array = np.array(values, _TYPES[datatype])
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"input '{name}': data is not {datatype} of one shape: {error}") from None
    if datatype == "FP32" and np.count_nonzero(np.isfinite(array)) + not_finite < array.size:
        raise InvalidInput(f"input '{name}': a number is out of the range of {datatype}")
    return array


def _reshape(name: str, array: Any, shape: tuple[int, ...]) -> Any:
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidInput(f"input '{name}': {list(shape)[:8]} is not a shape") from None


@dataclass(frozen=True, slots=True, eq=False)
class SelectedOutputs:
    """The requested outputs: their names, and the name, datatype and JSON flag of each.

    With `digest`, only their hashes are returned.
    """

    names: list[str]
    forms: list[tuple[str, str, bool]]
    digest: bool = False


class Runner:
    """Runs one session; invalid inputs are refused before they reach it."""

    def __init__(
        self, session: ort.InferenceSession, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        # Undocumented, but `InferenceSession.run` around it takes 3 µs more, half of the smallest run
        # (measured with 1.31), for checks that `decode_inputs` has made or that cannot fail here.
        self._session = session._sess  # noqa: SLF001
        self._inputs = {spec.name: spec.datatype for spec in inputs}
        self._required = {spec.name for spec in inputs if not spec.optional}
        self._outputs = {spec.name: spec.datatype for spec in outputs}
        self._has_bfloat16 = "BF16" in (*self._inputs.values(), *self._outputs.values())
        self._sizes = {spec.name: least_bytes(spec, 0) for spec in outputs if spec.datatype in DATATYPES}
        self._known = lru_cache(KNOWN_CHOICES)(self._select)

    def select_outputs(
        self,
        outputs: tuple[WantedOutput, ...],
        text: bool,  # noqa: FBT001 - as in `Infer`
        digest: bool = False,  # noqa: FBT001, FBT002
    ) -> SelectedOutputs:
        """Return the outputs that a request asks for, cached by request.

        Raises:
            InvalidInput: `invalid_input`, or as NotRepresentable `not_representable`.
        """
        if len(outputs) > len(self._outputs):  # names repeat, up to 80,000 times: not to be cached
            return self._select(outputs, text, digest)
        return self._known(outputs, text, digest)

    def _select(self, outputs: tuple[WantedOutput, ...], text: bool, digest: bool) -> SelectedOutputs:  # noqa: FBT001
        for output in outputs:
            datatype = self._outputs.get(output.name)
            if datatype is None:
                raise InvalidInput(
                    f"the model has no output {output.name!r}; it has {_list_names(self._outputs)}"
                )
            if datatype not in DATATYPES:
                raise InvalidInput(f"output {output.name!r} is a {datatype}, which is no tensor to send")
        chosen = {output.name: output.text for output in outputs} or {
            name: text for name, datatype in self._outputs.items() if datatype in DATATYPES
        }
        forms = [(name, self._outputs[name], as_text) for name, as_text in chosen.items()]
        for name, datatype, as_text in forms:
            if as_text:
                check_json(name, datatype)
                _check_size(name, self._sizes[name])
        if (
            sum(self._sizes[name] for name, _, as_text in forms if not as_text and not digest)
            > MAX_PAYLOAD_BYTES
        ):
            raise InferenceFailed(TOO_LONG)
        return SelectedOutputs(list(chosen), forms, digest)

    def decode_inputs(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return a request's tensors as arrays, by name.

        Raises:
            InvalidInput: `invalid_input`.
        """
        arrays: dict[str, Any] = {}
        for tensor in tensors:
            if self._inputs.get(tensor.name) != tensor.datatype or tensor.name in arrays:
                self._refuse(tensor, given=tensor.name in arrays)
            arrays[tensor.name] = decode_text(tensor) if tensor.text else to_array(tensor)
        if not self._required <= arrays.keys():
            missing = sorted(self._required - arrays.keys())
            raise InvalidInput(f"no value for input {', '.join(map(repr, missing))}")
        return arrays

    def run(self, selected: SelectedOutputs, feed: Mapping[str, Any], options: ort.RunOptions) -> list[Any]:
        """Run the model once; returns an array for each output, None for an optional output without a value.

        Raises:
            InvalidInput: `invalid_input`.
            InferenceFailed: `inference_failed`.
            InferenceCancelled: `inference_cancelled`, when `options.terminate` was set meanwhile.
        """
        try:
            if self._has_bfloat16:
                return self._run_with_values(selected, feed, options)
            arrays: list[Any] = self._session.run(selected.names, feed, options)
        except InvalidArgument as error:
            raise InvalidInput(explain_refusal(str(error), "the inputs do not fit the model")) from None
        except UnicodeDecodeError:
            texts = _list_names(repr(name) for name, datatype, _ in selected.forms if datatype == "BYTES")
            reason = "holds a string that is not UTF-8, which ONNX Runtime does not return to Python"
            raise InferenceFailed(f"output {texts} {reason}: have the model return bytes as UINT8") from None
        except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
            if options.terminate:
                raise InferenceCancelled from None
            said = str(error) or type(error).__name__
            raise InferenceFailed(explain_refusal(said, "the model cannot compute these inputs")) from None
        return arrays

    def encode_outputs(
        self, selected: SelectedOutputs, arrays: Sequence[Any], region: AnswerRegion | None = None
    ) -> tuple[tuple[TensorHead, ...], list[Buffer]]:
        """Return the heads and data of the outputs, except optional ones without a value.

        Long outputs are copied to `region`, as far as it has space, and are no part of the data.

        Raises:
            NotRepresentable: `not_representable`.
            InferenceFailed: `inference_failed`, the outputs exceed a frame.
        """
        if selected.digest:
            return _digests(selected, arrays)
        heads: list[TensorHead] = []
        parts: list[Buffer] = []
        for (name, datatype, text), array in zip(selected.forms, arrays, strict=True):
            if array is None:
                continue
            data = encode_text(name, datatype, array) if text else [to_data(datatype, array)]
            at = None if text or region is None else region.put(data[0])
            heads.append(TensorHead(name, datatype, array.shape, sum(map(len, data)), text, at))
            if at is None:
                parts += data
        if sum(map(len, parts)) > MAX_PAYLOAD_BYTES:
            problem = NotRepresentable if any(head.text for head in heads) else InferenceFailed
            raise problem(TOO_LONG)
        return tuple(heads), parts

    def _run_with_values(
        self, selected: SelectedOutputs, feed: Mapping[str, Any], options: ort.RunOptions
    ) -> list[Any]:
        """Run a model with tensors of BF16, which numpy does not have."""
        values = {name: self._value(name, array) for name, array in feed.items()}
        answers = self._session.run_with_ort_values(values, selected.names, options)
        return [
            _array_of(value, datatype)
            for value, (_, datatype, _) in zip(answers, selected.forms, strict=True)
        ]

    def _value(self, name: str, array: Any) -> Any:
        if self._inputs[name] == "BF16":
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPE_BFLOAT16)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        return value._get_c_value()  # noqa: SLF001 - what the session within the session takes

    def _refuse(self, tensor: Tensor, *, given: bool) -> None:
        name, expected = tensor.name, self._inputs.get(tensor.name)
        if given:
            raise InvalidInput(f"input {name!r} is given twice")
        if expected is None:
            raise InvalidInput(f"the model has no input {name!r}; it has {_list_names(self._inputs)}")
        if expected not in DATATYPES:
            raise InvalidInput(f"input {name!r} is a {expected}, which no tensor can be")
        raise InvalidInput(f"input {name!r} is {expected}, not {tensor.datatype}")


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(islice(names, MAX_LISTED))


def to_array(tensor: Tensor) -> Any:
    """Return a tensor as a numpy array; a long, aligned one as a view.

    Raises:
        InvalidInput: `invalid_input`: BYTES that ONNX Runtime does not take, a number of elements that does
            not fit the shape, or a BOOL that is neither 0 nor 1.
    """
    if tensor.datatype == "BYTES":
        try:
            elements = unpack_texts(tensor.data)
        except MalformedTexts as error:
            raise InvalidInput(f"input {tensor.name!r}: {error}") from None
        flat = _to_strings(tensor.name, elements)
    else:
        flat = _align(np.frombuffer(tensor.data, _TYPES[tensor.datatype]))
        if tensor.datatype == "BOOL" and flat.view(np.uint8).max(initial=0) > 1:
            raise InvalidInput(f"input {tensor.name!r}: a BOOL is a byte of 0 or 1")
    if flat.shape == tensor.shape:
        return flat
    try:
        return flat.reshape(tensor.shape)
    except ValueError:
        shape = list(tensor.shape)
        raise InvalidInput(f"input {tensor.name!r} has {flat.size} elements, not those of {shape}") from None


def _to_strings(name: str, elements: list[str] | list[bytes]) -> Any:
    """Return strings as ONNX Runtime takes them; strings that are not UTF-8 as bytes.

    ONNX Runtime reads an element of numpy's `S` up to a byte of 0, even beyond its end (1.32), so there is a
    0 at each end. Of `V` it takes all bytes, the same number in each element.
    """
    if not elements or isinstance(elements[0], str):
        flat: Any = np.empty(len(elements), object)
        flat[:] = elements
        return flat
    lengths = set(map(len, elements))
    if len(lengths) == 1:
        return np.array(elements, f"V{lengths.pop()}")
    if not any(b"\0" in element for element in elements if isinstance(element, bytes)):
        return np.array(elements, f"S{max(lengths) + 1}")
    reason = "elements that are not UTF-8, of different lengths and with bytes of 0, cannot be given together"
    raise InvalidInput(f"input {name!r}: {reason}: send a request for each")


def _align(flat: Any) -> Any:
    """Return the array, or an aligned copy, so that results do not depend on its address.

    ONNX Runtime's sums differ in their last bits if an input does not begin at a multiple of 16.
    """
    # Copying a short array costs less than asking for its address.
    if flat.nbytes < ALIGNED_COPY_BYTES or flat.ctypes.data % ALIGNMENT:
        return flat.copy()
    return flat


def to_data(datatype: str, array: Any) -> Buffer:
    """Return the data of a tensor; a view of a long, contiguous array."""
    if datatype == "BYTES":
        return pack_texts(array.ravel())
    if array.dtype != _TYPES[datatype]:
        array = array.astype(_TYPES[datatype])
    if array.nbytes < COPIED_BYTES:
        return bytes(array.tobytes())
    view: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return view


def _digests(selected: SelectedOutputs, arrays: Sequence[Any]) -> tuple[tuple[TensorHead, ...], list[Buffer]]:
    """Return tensors with the SHA-256 of each output's datatype, shape and data."""
    heads: list[TensorHead] = []
    parts: list[Buffer] = []
    for (name, datatype, _), array in zip(selected.forms, arrays, strict=True):
        if array is not None:
            digest = hashlib.sha256(f"{datatype} {list(array.shape)}\n".encode())
            digest.update(to_data(datatype, array))
            heads.append(TensorHead(name, "UINT8", (digest.digest_size,), digest.digest_size))
            parts.append(digest.digest())
    return tuple(heads), parts


def _array_of(value: Any, datatype: str) -> Any:
    if not value.has_value():
        return None
    if datatype != "BF16":
        return value.numpy()
    # numpy has no BF16, so ONNX Runtime gives no array of it; on the CPU its memory can be read.
    shape = value.shape()
    size = int(np.prod(shape, dtype=np.int64)) * DATATYPES[datatype].size
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, _TYPES[datatype]).reshape(shape)
