"""What the server and a worker say to each other: the whole contract.

A frame is a fixed prefix (length of the header, length of the payload), a header (one of the messages here,
in msgpack) and the payload: the raw bytes of the message's tensors, one after the other, little-endian and
in row-major order. Requests carry ids that only go up; any number may be in flight. On the data channel
`Load` and `Infer` go to the worker, and `Stage`, `Loaded`, `LoadFailed`, `Outcome` and `Failure` come back;
on the control channel `Cancel` goes to the worker. Nothing is pickled, and what cannot be decoded is a
`MalformedFrame`, whatever the bytes.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

PREFIX = struct.Struct("<IQ")
MAX_HEADER_BYTES = 16 * 2**20
"""`Loaded` with the longest list of files that is allowed, and long paths, fits."""
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Four times the largest request that the server takes. A worker that has more to say answers `Failure`."""
MAX_DIMENSIONS = 64
MAX_TEXT_BYTES = 4096
"""Of a message for people, as it is kept in an event."""


@dataclass(frozen=True, slots=True)
class Datatype:
    """A datatype of the Open Inference Protocol.

    `numpy` and `onnx` (ONNX Runtime's name) are how each calls it; `size` is bytes per element. A BYTES
    element is its length, four bytes little-endian, and its bytes; `size` is then 0. numpy has no BF16: its
    two bytes are handed on as unsigned integers.
    """

    name: str
    numpy: str
    onnx: str
    size: int


DATATYPES = {
    datatype.name: datatype
    for datatype in (
        Datatype("BOOL", "?", "tensor(bool)", 1),
        Datatype("UINT8", "u1", "tensor(uint8)", 1),
        Datatype("UINT16", "<u2", "tensor(uint16)", 2),
        Datatype("UINT32", "<u4", "tensor(uint32)", 4),
        Datatype("UINT64", "<u8", "tensor(uint64)", 8),
        Datatype("INT8", "i1", "tensor(int8)", 1),
        Datatype("INT16", "<i2", "tensor(int16)", 2),
        Datatype("INT32", "<i4", "tensor(int32)", 4),
        Datatype("INT64", "<i8", "tensor(int64)", 8),
        Datatype("FP16", "<f2", "tensor(float16)", 2),
        Datatype("BF16", "<u2", "tensor(bfloat16)", 2),
        Datatype("FP32", "<f4", "tensor(float)", 4),
        Datatype("FP64", "<f8", "tensor(double)", 8),
        Datatype("BYTES", "O", "tensor(string)", 0),
    )
}
BY_ONNX = {datatype.onnx: datatype for datatype in DATATYPES.values()}


class MalformedFrame(ValueError):
    """This is no frame of the contract; if it arrived, who sent it is not to be trusted any further."""


Buffer = bytes | bytearray | memoryview
LoadStage = Literal["loading", "measuring"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor: `data` holds the elements of `shape`, row-major, as its datatype has them."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What a frame's header holds."""


class TensorHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor without its data, which is `size` bytes of the payload."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a model: -1 in `shape` is any length.

    `datatype` is the protocol's, or ONNX Runtime's own type where the protocol has none ("seq(…)").
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class LoadedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a loaded version: its identity and the SHA-256 (64 hex digits) of its content."""

    path: str
    dev: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


class Load(Message, frozen=True):
    """Load the model in `folder`; the first message to a worker. `known` files need no hashing.

    `memory_limit_bytes` is what the model may take beside the empty worker; None is no limit.
    """

    root: str
    folder: str
    threads: int
    memory_limit_bytes: int | None = None
    known: tuple[LoadedFile, ...] = ()


class Infer(Message, frozen=True):
    """Run the model; no `outputs` means all that the protocol has a type for."""

    id: int
    tensors: tuple[TensorHead, ...] = ()
    outputs: tuple[str, ...] = ()


class Stage(Message, frozen=True):
    """The load has come to this."""

    stage: LoadStage


class Loaded(Message, frozen=True):
    """The model can serve."""

    files: tuple[LoadedFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory_bytes: int
    peak_memory_bytes: int
    loading_us: int
    hashing_us: int
    measuring_us: int


class LoadFailed(Message, frozen=True):
    """The model cannot be loaded; the worker ends after this."""

    code: str
    message: str


class Outcome(Message, frozen=True):
    """The answer to `Infer`."""

    id: int
    tensors: tuple[TensorHead, ...] = ()


class Failure(Message, frozen=True):
    """No answer to `Infer`: `invalid_input`, `inference_failed` or `inference_cancelled`."""

    id: int
    code: str
    message: str


class Cancel(Message, frozen=True):
    """Stop this inference, be it running or queued; of one that has ended nothing happens."""

    id: int


ToWorker = Load | Infer
FromWorker = Stage | Loaded | LoadFailed | Outcome | Failure
TO_WORKER = msgspec.msgpack.Decoder(ToWorker)
FROM_WORKER = msgspec.msgpack.Decoder(FromWorker)
CONTROL = msgspec.msgpack.Decoder(Cancel)
"""One decoder for each direction: what it does not know does not belong there."""
_ENCODER = msgspec.msgpack.Encoder()

M = TypeVar("M", bound=Message)
Frame = tuple[M, tuple[Tensor, ...]]


def heads(tensors: Sequence[Tensor]) -> tuple[TensorHead, ...]:
    """Describe tensors as the message that goes before their data does.

    Raises:
        MalformedFrame: the other side would not take them: no such datatype, or data not of its shape.
    """
    described = tuple(TensorHead(t.name, t.datatype, t.shape, len(t.data)) for t in tensors)
    for head in described:
        _check_head(head)
    return described


def encode(message: Message, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
    """Encode a frame, as buffers to be written one after the other; the tensors' data is not copied.

    Raises:
        MalformedFrame: it is longer than the other side takes, or holds a lone surrogate.
    """
    try:
        header = _ENCODER.encode(message)
    except UnicodeEncodeError:
        raise MalformedFrame("a name that is not Unicode text") from None
    payload = sum(len(t.data) for t in tensors)
    if len(header) > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise MalformedFrame("a frame of more than the allowed length")
    return [PREFIX.pack(len(header), payload) + header, *(t.data for t in tensors if len(t.data))]


def plain_text(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Make any text fit to be stored and shown: lone surrogates replaced, at most `limit` bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:limit].decode("utf-8", "ignore") if len(encoded) > limit else encoded.decode()


def decode(body: memoryview, header_bytes: int, decoder: msgspec.msgpack.Decoder[M]) -> Frame[M]:
    """Decode what follows a frame's prefix; the tensors refer to `body`, they are no copies.

    Raises:
        MalformedFrame: it is no frame of this contract.
    """
    try:
        message = decoder.decode(body[:header_bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(str(error)) from None
    return message, _cut_tensors(getattr(message, "tensors", ()), body[header_bytes:])


def _cut_tensors(tensor_heads: Sequence[TensorHead], payload: memoryview) -> tuple[Tensor, ...]:
    tensors, position = [], 0
    for head in tensor_heads:
        _check_head(head)
        tensors.append(Tensor(head.name, head.datatype, head.shape, payload[position : position + head.size]))
        position += head.size
    if position != len(payload):
        raise MalformedFrame("the payload is not as long as its tensors")
    return tuple(tensors)


def _check_head(head: TensorHead) -> None:
    datatype = DATATYPES.get(head.datatype)
    if datatype is None:
        raise MalformedFrame(f"no such datatype: {plain_text(head.datatype, 64)}")
    if head.size < 0 or len(head.shape) > MAX_DIMENSIONS or any(length < 0 for length in head.shape):
        raise MalformedFrame("a tensor of a shape or size that cannot be")
    if datatype.size and math.prod(head.shape) * datatype.size != head.size:
        raise MalformedFrame("a tensor whose data is not of its shape")
