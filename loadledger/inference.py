"""Inference requests and answers: tensors in binary, outputs as numpy arrays.

The datatype of an array is its dtype's. Datatypes of lists, and of arrays that the model refuses, come from
the model's metadata, which a client remembers. A model may change, so the server checks each datatype and
refuses a wrong one without running the model; the client then sends it again with the metadata's datatypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from answers.inference import ModelMetadata
from loadledger.address import Address
from loadledger.errors import ServerError
from loadledger.requests import (
    HEADER_LENGTH,
    Answer,
    Buffer,
    CallContext,
    Request,
    decode_value,
    encode_json,
    fetch,
    foreign_answer,
    get_request,
    parse_length,
    send_request,
)

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""By name, an array, a nested list or a tensor of the protocol; or a list of named tensors.

The `data` of a tensor is an array or a nested list.
"""
Datatypes = Mapping[str, str]
"""The datatypes of a model's inputs, by name."""
Json = dict[str, Any]

NOT_LOADED = frozenset({"model_not_loaded", "model_unloading"})
REFUSED = "invalid_input"
"""The server's code for inputs that do not fit the model; nothing ran."""
MAX_REMEMBERED = 1000
"""Models whose datatypes a client remembers."""


class InferenceResult(Mapping[str, Any]):
    """The outputs of an inference: numpy arrays by name.

    BF16 becomes FP32, and elements of BYTES become str, with surrogates for bytes that are no UTF-8.

    Attributes:
        model_name: the model.
        model_version: the version that answered.
        datatypes: the outputs' datatypes by name, as the server names them.
        id: the request's id, if it had one.
        parameters: the answer's parameters.
    """

    def __init__(self, arrays: Mapping[str, Any], datatypes: Mapping[str, str], head: InferenceHead) -> None:
        self._arrays = dict(arrays)
        self.datatypes = dict(datatypes)
        self.model_name = head.model_name
        self.model_version = head.model_version
        self.id = head.id
        self.parameters = head.parameters

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:  # comparing arrays gives no single truth value
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        outputs = ", ".join(
            f"{name}: {self.datatypes[name]}{list(each.shape)}" for name, each in self._arrays.items()
        )
        return f"InferenceResult({self.model_name}/{self.model_version}: {outputs})"


class OutputHead(msgspec.Struct, frozen=True):
    """An output as described by the answer's JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Json = {}
    data: Any = msgspec.UNSET

    @property
    def size(self) -> int | None:
        """Bytes of a binary output; None for one in JSON."""
        size = self.parameters.get("binary_data_size")
        return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


class InferenceHead(msgspec.Struct, frozen=True):
    """The JSON of an answer."""

    outputs: list[OutputHead] = []
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: Json = {}


@dataclass(frozen=True, slots=True)
class InputTensor:
    """An input of a request: its members in JSON, and its binary data if it is not among them."""

    members: Json
    data: Buffer | None = None


class Inferences:
    """Runs inferences and remembers the datatypes of models."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._known: dict[str, Datatypes] = {}

    async def run(
        self, path: str, inputs: Inputs, members: Mapping[str, Any], timeout_s: float | None
    ) -> InferenceResult:
        """Run one inference on the model with this path; `members` are of the request, beside its inputs.

        Raises:
            ServerError: the server refused.
            ValueError: the model has no such input, or a value does not fit it.
        """

        async def send(tensors: Sequence[InputTensor]) -> InferenceResult:
            headers, text, data = encode_inference(tensors, members)
            request = Request("POST", f"{path}/infer", headers, text, repeatable=False, model=path)
            request = replace(request, timeout_s=timeout_s, attachments=data)
            return decode_inference(await send_request(self._context, request), self._context.address)

        remembered = known = self._known.get(path)
        if known is None and _needs_datatypes(inputs):
            known = await self._find_datatypes(path)
        tensors = list[InputTensor]()
        try:
            tensors = build_tensors(inputs, known)
            return await send(tensors)
        except ServerError as error:
            if error.code != REFUSED or _are_tensors(inputs):
                raise
            refusal: Exception = error
        except ValueError as error:
            if remembered is None:
                raise
            refusal = error
        found = await self._find_datatypes(path)
        try:
            again = build_tensors(inputs, found)
        except ValueError as error:
            raise (refusal if isinstance(refusal, ServerError) else error) from None
        if [each.members for each in again] == [each.members for each in tensors]:
            raise refusal
        return await send(again)

    async def _find_datatypes(self, path: str) -> Datatypes | None:
        """Return the datatypes of the metadata, or None for a model that is not loaded."""
        try:
            metadata = await fetch(self._context, get_request(path), ModelMetadata)
        except ServerError as problem:
            if problem.code in NOT_LOADED:
                return None
            raise
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        found = self._known[path] = {tensor.name: tensor.datatype for tensor in metadata.inputs}
        return found


def build_tensors(inputs: Inputs, known: Datatypes | None) -> list[InputTensor]:
    """Return the inputs as tensors.

    Args:
        inputs: the caller's inputs.
        known: datatypes of the model's inputs; None guesses those of lists.

    Raises:
        ValueError: the model has no such input, or a value does not fit it.
    """
    if not isinstance(inputs, Mapping):
        return [_whole_tensor(dict(tensor)) for tensor in inputs]
    return [
        _whole_tensor({"name": name, **value}) if isinstance(value, Mapping) else _tensor(name, value, known)
        for name, value in inputs.items()
    ]


def encode_inference(
    tensors: Sequence[InputTensor], members: Mapping[str, Any]
) -> tuple[dict[str, str], bytes, tuple[Buffer, ...]]:
    """Return header fields, JSON and tensors of an inference that requests binary outputs.

    Raises:
        ValueError: a value cannot be sent.
    """
    heads = [_input_head(tensor) for tensor in tensors]
    parameters = {"binary_data_output": True, **(members.get("parameters") or {})}
    text = encode_json({"inputs": heads, **members, "parameters": parameters})
    payload = tuple(tensor.data for tensor in tensors if tensor.data is not None)
    fields = {"Content-Type": "application/json", "Accept": "application/json, application/octet-stream"}
    if payload:
        fields |= {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return fields, text, payload


def decode_inference(answer: Answer, address: Address) -> InferenceResult:
    """Return the outputs of an inference.

    Raises:
        ServerError: the server refused.
        BadAnswer: the body has another shape.
    """
    from loadledger import tensors  # imports numpy

    body = memoryview(answer.body)
    start = parse_length(answer.headers.get(HEADER_LENGTH.lower(), str(len(body))))
    if start is None or start > len(body):
        raise foreign_answer(answer, address, "a length beyond the body")
    head = decode_value(Answer(answer.status, answer.headers, body[:start]), InferenceHead, address)
    arrays = dict[str, Any]()
    for output in head.outputs:
        size = output.size
        try:
            if size is None:
                data = [] if output.data is msgspec.UNSET else output.data
                arrays[output.name] = tensors.from_json(output.datatype, data, output.shape)
                continue
            data = body[start : start + size]
            arrays[output.name] = tensors.unpack(output.datatype, data, output.shape)
        except (ValueError, OverflowError, MemoryError) as error:
            raise foreign_answer(answer, address, str(error)) from None
        start += size
    return InferenceResult(arrays, {output.name: output.datatype for output in head.outputs}, head)


def _are_tensors(inputs: Inputs) -> bool:
    """Whether all inputs are tensors, so that the model's metadata is not needed."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return all(isinstance(value, Mapping) for value in values)


def _needs_datatypes(inputs: Inputs) -> bool:
    """Whether an input is neither a tensor nor an array, so that its datatype comes from the metadata."""
    values = inputs.values() if isinstance(inputs, Mapping) else ()
    return not all(isinstance(value, Mapping) or hasattr(value, "dtype") for value in values)


def _tensor(name: str, value: Any, known: Datatypes | None) -> InputTensor:
    from loadledger import tensors  # imports numpy

    if known is not None and name not in known:
        raise ValueError(f"the model has no input {name!r}; it has {', '.join(known) or 'none'}")
    array = tensors.to_array(name, value)
    datatype = tensors.guess_datatype(array) if known is None else known[name]
    if known is None and not hasattr(value, "dtype") and datatype == "FP64":
        datatype = "FP32"  # the usual datatype of models' float inputs
    if datatype is None:
        raise ValueError(f"input {name!r}: there is no datatype for numpy's {array.dtype}")
    return _packed({"name": name, "shape": list(array.shape), "datatype": datatype}, array)


def _whole_tensor(members: Json) -> InputTensor:
    """Return a tensor written by the caller, unchecked: the server reports its defects."""
    from loadledger import tensors  # imports numpy

    data, datatype = members.get("data"), members.get("datatype")
    if isinstance(data, bytes | bytearray | memoryview):
        return InputTensor({key: each for key, each in members.items() if key != "data"}, data)
    if data is None or not isinstance(datatype, str):
        return InputTensor(members)
    try:
        return _packed(members, tensors.to_array(str(members.get("name")), data))
    except ValueError:
        plain = data.tolist() if hasattr(data, "tolist") else data
        return InputTensor({**members, "data": plain})


def _packed(members: Json, array: Any) -> InputTensor:
    from loadledger import tensors  # imports numpy

    datatype = members["datatype"]
    data = tensors.pack(tensors.convert(str(members.get("name")), array, datatype), datatype)
    return InputTensor({key: each for key, each in members.items() if key != "data"}, data)


def _input_head(tensor: InputTensor) -> Json:
    if tensor.data is None:
        return tensor.members
    parameters = {**(tensor.members.get("parameters") or {}), "binary_data_size": len(tensor.data)}
    return {**tensor.members, "parameters": parameters}
