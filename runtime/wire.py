"""The messages between the server and a worker, and their frames: the whole contract.

A frame is a fixed prefix (length of the header, length of the payload), a header (one of the messages here,
in msgpack) and the payload: the raw bytes of the message's tensors, one after the other, little-endian and in
row-major order. Requests carry ids that only go up; any number may be in flight. On the data channel `Load`,
`Probe` and `Infer` go to the worker; `StageReached`, `Loaded`, `Probed`, `LoadFailure`, `Outcome` and
`InferenceFailure` come back; on the control channel `Cancel` goes to the worker. Nothing is pickled, and what
cannot be decoded is a `MalformedFrame`, whatever the bytes. A long tensor of an inference may lie in shared
memory (`runtime.process.sharedmemory`) instead of in the payload.

A worker runs what its model made of it, so each field that comes from one has bounds here: what a hostile
worker says is within what the ledger can hold, or ends it. Which messages may come when, and how long they
may be then, is in `runtime.process.inflight`.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

from runtime.errors import LoadCode

PREFIX = struct.Struct("<IQ")
LENGTH = struct.Struct("<I")
"""What goes before each element of a BYTES tensor."""
MAX_HEADER_BYTES = 16 * 2**20
"""Of any message: the names in a request, of which there may be many thousands."""
MAX_REPORT_BYTES = 2**20
"""Header of a message about a load. `Loaded` with 10,000 inputs and outputs fits, 100 bytes for each: models
of the first ONNX releases list each of their weights as an input."""
MAX_FAILURE_BYTES = 8 * 2**10
"""Header of an answer without outputs: an `InferenceFailure` with its message fits."""
MAX_OUTPUTS = 4096
"""Of a model. An answer with so many takes the server's loop 20 ms, which no other request should wait."""
MAX_HEAD_BYTES = 1024
"""Of an output's head in `Outcome`, beside its name: `MAX_DIMENSIONS` lengths of 9 bytes fit."""
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Of an answer, four times the largest request by default; a longer one becomes an `InferenceFailure`."""
MAX_REQUEST_BYTES = 2**31
"""Of what is sent to a worker: the most that `--max-request-size` may be."""
ALIGNMENT = 16
"""Bytes: where the payload of a long frame begins is a multiple of it. malloc gives no other addresses."""
SHARED_ALIGNMENT = 64
"""Bytes: where outputs begin in shared memory is a multiple of it, a line of the processor's cache."""
MAX_DIMENSIONS = 64
"""What numpy's arrays have."""
MAX_TEXT_BYTES = 4096
"""Of a message for people, as it is kept in an event."""
MAX_REASON_BYTES = 256
"""Of what is wrong with a frame: the decoder cites what the other side wrote, however long that is."""
MAX_NAME_CHARACTERS = 4096
"""Of a path (PATH_MAX), and of what a model calls its inputs and outputs."""


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
    """The bytes are no frame of the contract; their sender is not trusted any further."""


class MalformedTexts(ValueError):
    """The data of a BYTES tensor is not what it has to be; says what is wrong with an element."""


Buffer = bytes | bytearray | memoryview
LoadStage = Literal["loading", "warming_up"]
Fill = Literal["zeros", "ones"]
Layer = Literal["landlock", "seccomp"]
"""By which the kernel confines a worker, in the order in which they are applied."""
ForbiddenAct = Literal[
    "read_files",
    "write_files",
    "use_network",
    "start_processes",
    "read_memory",
    "run_code",
    "call_drivers",
    "manage_server",
]
"""Forbidden things that a throw-away worker tries: outside of its files, or of another process; to run code
that it has made, to call drivers of devices, and to manage the server over its control socket."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Time = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Nanoseconds since 1970, and a file can be older."""
FileNumber = Annotated[int, msgspec.Meta(ge=0)]
"""A device or an inode: some file systems use all 64 bits. They are compared, and go into no event."""
Length = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
"""Of a dimension of a model's input or output; -1 is any."""
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_BYTES)]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """A named tensor: `data` holds the elements of `shape`, row-major, as its datatype has them.

    With `text`, it holds them as JSON: a list, flat or nested. What the text says is not checked here: the
    worker reads what a client sent, and what it writes is the model's answer.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
    text: bool = False


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A frame's header: its fields in their order, without their names."""


class TensorHead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor without its data, which is `size` bytes of the payload; JSON, if it is `text`.

    With `at`, they are no part of the payload: they begin there in the shared memory.
    """

    name: Name
    datatype: Name
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    size: Count
    text: bool = False
    at: Count | None = None


class WantedOutput(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A requested output, as JSON or raw bytes."""

    name: Name
    text: bool = False


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A value of an input that the model was run on: zeros or ones of a shape.

    With `refusal` the shape is a guess: so the model refused it, or why it was not tried.
    """

    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    values: Fill
    refusal: Text | None = None


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An input or output of a model: -1 in `shape` is any length; what is `optional` may be left out.

    Attributes:
        datatype: the protocol's, or ONNX Runtime's own type where the protocol has none ("seq(…)").
        dimensions: what the model calls each dimension of `shape`, or ""; () if it names none.
        example: of an input of a loaded model, if its warm-up has looked for one.
    """

    name: Name
    datatype: Name
    shape: tuple[Length, ...]
    optional: bool = False
    dimensions: tuple[Name, ...] = ()
    example: Example | None = None


class ProviderOperators(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many operators of a model's graph run on a provider, whose version it is."""

    provider: Name
    version: Name
    operators: Count


class ProviderLibrary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The library of an execution provider that is installed.

    Attributes:
        provider: its name in names of devices.
        path: of the library, absolute.
        ep_name: what ONNX Runtime calls the provider.
    """

    provider: Name
    path: str
    ep_name: Name


class FoundDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device that a provider has found on this machine.

    Attributes:
        name: as loads name it (`events.devices`).
        version: of the provider.
        hardware: what the provider calls it, for people.
        pci_bus_id: by which its driver knows it; "" of one that is on no such bus.
    """

    name: Name
    version: Name
    hardware: Name = ""
    pci_bus_id: Name = ""


class TargetDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device of a load.

    Attributes:
        name: as loads name it (`events.devices`).
        library: of its provider.
        options: for the provider.
        falls_back: whether operators that it does not support run on the CPU; else the load is refused.
    """

    name: Name
    library: ProviderLibrary
    options: Mapping[str, str] = {}
    falls_back: bool = False


NO_MORE = "the machine has no more"
"""Why a load without a limit of memory lacks it."""
PROVIDER_MAPPED_BYTES = 64 * 2**20
"""Memory that a provider maps and does not touch: OpenVINO's libraries and threads 50 MB (measured)."""


def _leave_room(limit_bytes: int | None, device: TargetDevice | None) -> int | None:
    """Return a limit of mapped memory with room for what a provider maps."""
    return limit_bytes if limit_bytes is None or device is None else limit_bytes + PROVIDER_MAPPED_BYTES


class Load(Message, frozen=True):
    """Load the model in `folder`; the first message to a worker.

    Attributes:
        root: what no file may leave: the folder itself in the store, else the repository's root.
        bytes: the size of all files together.
        memory_limit_bytes: for the model, beside the empty worker; None is no limit.
        load_limit_bytes: as well, until the model is loaded; None is no limit.
        max_batch_size: 0 turns batching off.
        max_queue_delay_us: how long a request may wait for its batch.
        warm_up: whether the model runs once before it is loaded.
        warm_up_required: whether a warm-up that fails fails the load.
        layers: what confines the worker; one that cannot be applied ends it.
        ceiling_bytes: limit of its memory for good, whatever it does itself; None is no limit.
        tensors: inputs of the warm-up, which `Worker.load` fills in; else zeros where shapes allow it.
        name: what the process is called in lists of processes.
        device: where the session runs; None is the CPU. Its warm-up has to succeed.
        max_request_bytes: limit of a request; a model that needs longer ones is refused.
        dependent_rows: whether rows of a batch may change each other's answers.
    """

    root: str
    folder: str
    bytes: Count
    threads: int
    memory_limit_bytes: int | None = None
    load_limit_bytes: int | None = None
    max_batch_size: Count = 0
    max_queue_delay_us: Count = 0
    warm_up: bool = True
    warm_up_required: bool = True
    layers: tuple[Layer, ...] = ()
    ceiling_bytes: int | None = None
    tensors: tuple[TensorHead, ...] = ()
    name: str = ""
    device: TargetDevice | None = None
    max_request_bytes: Count = MAX_REQUEST_BYTES
    dependent_rows: bool = False

    def hard_limit_bytes(self, thread_bytes: int) -> int | None:
        """Return the limit that the worker cannot lift; the model's own leaves room for its threads.

        Args:
            thread_bytes: of one thread. The first of `threads` is the worker's own, which is there.
        """
        own = self.memory_limit_bytes
        with_threads = None if own is None else own + (self.threads - 1) * thread_bytes
        given = [each for each in (with_threads, self.ceiling_bytes) if each is not None]
        return _leave_room(min(given, default=None), self.device)

    def most_bytes(self, thread_bytes: int) -> int | None:
        """Return the most memory of any kind that the worker can add within its limits; None has no limit.

        Beside `hard_limit_bytes`, the kernel gives it its first stack, and the page tables: 8 bytes for each
        page of 4 KiB, also for those of files.
        """
        hard = self.hard_limit_bytes(thread_bytes)
        if hard is None:
            return None
        return hard + thread_bytes + (hard + self.bytes) // 512

    @property
    def soft_limit_bytes(self) -> int | None:
        """The limit that the worker lifts when the model is loaded; None is no limit."""
        return _leave_room(self.load_limit_bytes, self.device)

    @property
    def is_limited_by_itself(self) -> bool:
        """Whether the model's own limit of memory is the lowest of its limits."""
        own, others = self.memory_limit_bytes, (self.load_limit_bytes, self.ceiling_bytes)
        return own is not None and all(each is None or own <= each for each in others)

    @property
    def limit_text(self) -> str:
        """Which limit of memory is the lowest; the server says how much the budget leaves to a load."""
        if self.is_limited_by_itself:
            return f"its memory_limit_bytes are {self.memory_limit_bytes}"
        if self.load_limit_bytes is not None:
            return "the memory budget leaves it no more"
        most = self.ceiling_bytes
        return NO_MORE if most is None else f"the memory budget is {most} bytes"


class Probe(Message, frozen=True):
    """Confine yourself by these layers, as far as they are to be had, and try forbidden things.

    The first message to a worker, and its last. `outside` is a folder that no worker needs. With `providers`,
    do it as the worker of a load on a device, and list their devices.
    """

    outside: str
    layers: tuple[Layer, ...]
    providers: tuple[ProviderLibrary, ...] = ()


class ReadJson(Message, frozen=True):
    """Read the JSON of an inference request, the only tensor; the first message to a worker, and its last.

    `memory_limit_bytes` and `layers` are as for `Load`; `Worker.read_json` fills in the tensor.
    """

    memory_limit_bytes: int
    layers: tuple[Layer, ...]
    tensors: tuple[TensorHead, ...] = ()


class Infer(Message, frozen=True):
    """Run the model; no `outputs` means all that the protocol has a type for, as JSON if `text`.

    `sent_ns` is the time of CLOCK_MONOTONIC, which all processes of a machine share. With
    `digest` each output comes as 32 bytes, UINT8: the SHA-256 of its datatype, shape and data.
    `answer_region` is where in the shared memory long outputs may go, and how many bytes it has. At
    `deadline_ns`, by the same clock, nothing wants the answer any more; 0 is no deadline.
    """

    id: Count
    tensors: tuple[TensorHead, ...] = ()
    outputs: tuple[WantedOutput, ...] = ()
    text: bool = False
    sent_ns: Count = 0
    digest: bool = False
    answer_region: tuple[Count, Count] | None = None
    deadline_ns: Count = 0


class StageReached(Message, frozen=True):
    """The load has come to this."""

    stage: LoadStage


class Loaded(Message, frozen=True):
    """The model can serve; `warming_up_us` is None if it was not run before.

    `placed` is empty for a load on the CPU, else first what runs on its device. `dependence` is why rows of a
    batch might change each other's answers; None without batching, or if it was shown that they do not.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_OUTPUTS)]
    loading_us: Count
    warming_up_us: Count | None = None
    placed: tuple[ProviderOperators, ...] = ()
    dependence: Text | None = None


class Probed(Message, frozen=True):
    """Result of a `Probe`; the worker ends after this.

    Attributes:
        landlock_abi: the version of the Landlock that was applied; 0 if it was not.
        layers: those that were applied.
        succeeded: the forbidden things that the worker could do.
        problems: why a layer was not applied, or a provider could not be used.
        devices: of the providers.
    """

    landlock_abi: Count
    layers: tuple[Layer, ...]
    succeeded: tuple[ForbiddenAct, ...]
    problems: tuple[Text, ...] = ()
    devices: tuple[FoundDevice, ...] = ()


class JsonRead(Message, frozen=True):
    """The answer to `ReadJson`: the request without its data, as JSON, and the span of each data in the text.

    Or the `problem` with it. A span is begin and length; None is that of an input without data in the text.
    """

    head: Annotated[bytes, msgspec.Meta(max_length=MAX_REPORT_BYTES // 2)] = b""
    spans: tuple[tuple[Count, Count] | None, ...] = ()
    problem: Text = ""


class LoadFailure(Message, frozen=True):
    """The model cannot be loaded; the worker ends after this."""

    code: LoadCode
    message: Text


class Outcome(Message, frozen=True):
    """The answer to `Infer`, and where its time in the worker went.

    `queue_ns` is the wait for other requests, also for those before which this one was not received yet.
    `input_ns`, `infer_ns` and `output_ns` are decoding, run and encoding; a whole run, if it is a batch's.
    `batch_size` is what the request brought along the batch dimension, 1 where the model has none.
    `execution_size` is the batch size of the execution, in one answer of each; the others have 0.
    """

    id: Count
    tensors: Annotated[tuple[TensorHead, ...], msgspec.Meta(max_length=MAX_OUTPUTS)] = ()
    queue_ns: Count = 0
    input_ns: Count = 0
    infer_ns: Count = 0
    output_ns: Count = 0
    batch_size: Count = 1
    execution_size: Count = 1


class InferenceFailure(Message, frozen=True):
    """No answer to `Infer`: `invalid_input`, `not_representable`, `inference_failed`, `inference_cancelled`.

    A request that cannot make its deadline is not run: `inference_timeout`. Whatever else a worker calls it
    is `inference_failed`.
    """

    id: Count
    code: Text
    message: Text


class Cancel(Message, frozen=True):
    """Stop this inference, be it running or queued; of one that has ended nothing happens."""

    id: Count


ToWorker = Load | Probe | ReadJson | Infer
FromLoading = StageReached | Loaded | Probed | JsonRead | LoadFailure
FromServing = Outcome | InferenceFailure
FromWorker = FromLoading | FromServing
TO_WORKER = msgspec.msgpack.Decoder(ToWorker)
FROM_LOADING = msgspec.msgpack.Decoder(FromLoading)
FROM_SERVING = msgspec.msgpack.Decoder(FromServing)
CONTROL = msgspec.msgpack.Decoder(Cancel)
"""One decoder for each direction and time: what it does not know does not belong there."""
_ENCODER = msgspec.msgpack.Encoder()

M = TypeVar("M", bound=Message)
Frame = tuple[M, tuple[Tensor, ...]]
Locate = Callable[[int, int, int], memoryview]
"""Returns shared memory: of which request, from where, how many bytes. It raises `MalformedFrame`."""


def heads(tensors: Sequence[Tensor], offsets: Iterable[int | None] = repeat(None)) -> tuple[TensorHead, ...]:
    """Describe tensors as the message that goes before their data does.

    `offsets` is where each begins in shared memory, None for one in the payload.

    Raises:
        MalformedFrame: the other side would not take them: no such datatype, or data not of its shape.
    """
    pairs = zip(tensors, offsets, strict=False)
    described = tuple([TensorHead(t.name, t.datatype, t.shape, len(t.data), t.text, at) for t, at in pairs])
    for head in described:
        if len(head.name) > MAX_NAME_CHARACTERS:
            raise MalformedFrame(f"a name of more than {MAX_NAME_CHARACTERS} characters")
        shape = head.shape
        if len(shape) > MAX_DIMENSIONS or (shape and not 0 <= min(shape) <= max(shape) < 2**63):
            raise MalformedFrame("a tensor of a shape or size that cannot be")
        _check_size(head)
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
    parts = [tensor.data for tensor in tensors if len(tensor.data)]
    payload = sum(map(len, parts))
    if len(header) > MAX_HEADER_BYTES or payload > MAX_REQUEST_BYTES:
        raise MalformedFrame("a frame of more than the allowed length")
    return [PREFIX.pack(len(header), payload) + header, *parts]


def plain_text(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Make any text fit to be stored and shown: lone surrogates replaced, at most `limit` bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    return encoded[:limit].decode("utf-8", "ignore") if len(encoded) > limit else encoded.decode()


def pack_texts(texts: Iterable[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(part for data in encoded for part in (LENGTH.pack(len(data)), data))


def unpack_texts(data: Buffer) -> list[str] | list[bytes]:
    """Read the data of a BYTES tensor: strings, or bytes if one of them is not UTF-8.

    Raises:
        MalformedTexts: an element is longer than the data.
    """
    try:
        return [str(element, "utf-8") for element in _elements(data)]
    except UnicodeDecodeError:
        return [bytes(element) for element in _elements(data)]


def _elements(data: Buffer) -> Iterator[memoryview]:
    view, position = memoryview(data), 0
    while position < len(view):
        start = position + LENGTH.size
        if start > len(view):
            raise MalformedTexts("an element is longer than the data")
        position = start + int(LENGTH.unpack_from(view, position)[0])
        if position > len(view):
            raise MalformedTexts("an element is longer than the data")
        yield view[start:position]


def decode(
    body: memoryview, header_bytes: int, decoder: msgspec.msgpack.Decoder[M], locate: Locate | None = None
) -> Frame[M]:
    """Decode what follows a frame's prefix; the tensors refer to `body` or shared memory.

    Raises:
        MalformedFrame: it is no frame of this contract.
    """
    message = decode_header(body[:header_bytes], decoder)
    return message, _cut_tensors(message, body[header_bytes:], locate)


def decode_header(header: memoryview, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """Decode the message of a frame.

    Raises:
        MalformedFrame: it is no message of this contract.
    """
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(plain_text(str(error), MAX_REASON_BYTES)) from None


def _cut_tensors(message: Message, payload: memoryview, locate: Locate | None) -> tuple[Tensor, ...]:
    tensors, position = [], 0
    for head in getattr(message, "tensors", ()):
        _check_size(head)  # name and shape are within their limits, which are the decoder's, too
        if head.at is None:
            data = payload[position : position + head.size]
            position += head.size
        elif locate is None or not isinstance(message, Infer | Outcome):
            raise MalformedFrame("a tensor in shared memory that there is not")
        else:
            data = locate(message.id, head.at, head.size)
        tensors.append(Tensor(head.name, head.datatype, head.shape, data, head.text))
    if position != len(payload):
        raise MalformedFrame("the payload is not as long as its tensors")
    return tuple(tensors)


def _check_size(head: TensorHead) -> None:
    datatype = DATATYPES.get(head.datatype)
    if datatype is None:
        raise MalformedFrame(f"no such datatype: {plain_text(head.datatype, 64)}")
    if datatype.size and not head.text and math.prod(head.shape) * datatype.size != head.size:
        raise MalformedFrame("a tensor whose data is not of its shape")


CHUNK_BYTES = 64 * 2**10
"""Shorter frames are cut out of one read; a longer one is read into a buffer of its own."""
READ_BYTES = 2**20
"""Limit of one read: a socket is read on for as long as its other side goes on writing."""
JOINED_BYTES = 32 * 2**10
"""Of frames to send: copying this much takes about as long as one more buffer in a system call."""


class PayloadDropped(MemoryError):
    """There is no memory for the payload of a frame; it was read and dropped, and the channel goes on.

    Attributes:
        message: the frame's message, without its tensors.
    """

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message


_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""Allocates without filling: zeroing 600 KB takes as long as reading them, and announced bytes that never
come would take memory."""
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


@dataclass(frozen=True, slots=True)
class FrameRules(Generic[M]):
    """Which frames may come: the messages, and limits that a frame's prefix is held against.

    Without header bytes, none may come.
    """

    decoder: msgspec.msgpack.Decoder[M]
    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES


class FrameReader(Generic[M]):
    """Cuts the bytes of a channel into frames.

    Read into `buffer()`, call `feed` with the number of bytes, and then `next_frame` until there is none. The
    tensor data of a frame refers to memory that nothing else uses.

    Attributes:
        rules: which frames may come next; may be changed between frames.

    Args:
        rules: which frames may come at first.
        locate: finds the tensors that lie in shared memory; None if none do.
    """

    def __init__(self, rules: FrameRules[M], locate: Locate | None = None) -> None:
        self.rules = rules
        self._locate = locate
        self._chunk = bytearray(CHUNK_BYTES)
        self._body: bytearray | None = None
        self._begin = 0
        self._header_bytes = 0
        self._start = 0
        self._filled = 0
        self._is_dropped = False
        self._drop_bytes = 0

    def buffer(self) -> memoryview:
        """Return the buffer for the next bytes; never empty once `next_frame` has returned None."""
        if self._body is None:
            return memoryview(self._chunk)[self._filled :]
        if self._drop_bytes and self._filled == len(self._body):
            return memoryview(self._chunk)[: self._drop_bytes]
        return memoryview(self._body)[self._filled : self._filled + READ_BYTES]

    def feed(self, count: int) -> None:
        if self._drop_bytes and self._body is not None and self._filled == len(self._body):
            self._drop_bytes -= count
        else:
            self._filled += count

    def next_frame(self) -> Frame[M] | None:
        """Return the next complete frame.

        Raises:
            MalformedFrame: the bytes are no frame, or none that may come now.
            PayloadDropped: there was no memory for the frame's payload.
        """
        if self._body is not None:
            return self._finish_body(self._body)
        start = self._start
        if self._filled - start < PREFIX.size:
            if start:
                self._move_rest(start)
            return None
        header, payload = PREFIX.unpack_from(self._chunk, start)
        rules = self.rules
        if header > rules.header_bytes or payload > rules.payload_bytes:
            raise MalformedFrame(_describe_excess(rules, header, payload))
        start += PREFIX.size
        end = start + header + payload
        if end > self._filled:
            self._begin_body(start, header, payload)
            return None
        self._start = end
        # A copy, since the chunk is used again.
        return decode(
            memoryview(bytes(memoryview(self._chunk)[start:end])), header, rules.decoder, self._locate
        )

    def close(self) -> None:
        """Release the buffers now: nothing more is read, and a reference cycle may keep the reader alive."""
        self._chunk, self._body = bytearray(), None
        self._start = self._filled = 0

    def _move_rest(self, start: int) -> None:
        if start < self._filled:
            self._chunk[: self._filled - start] = self._chunk[start : self._filled]
        self._filled -= start
        self._start = 0

    def _begin_body(self, start: int, header: int, payload: int) -> None:
        """Read the rest of a frame into a buffer of its own; a page of it takes memory when bytes arrive."""
        self._begin = -header % ALIGNMENT
        self._header_bytes = header
        try:
            self._body = _new_bytearray(None, self._begin + header + payload)
        except MemoryError:  # the message says whose frame it is
            self._body, self._drop_bytes, self._is_dropped = bytearray(self._begin + header), payload, True
        came = self._filled - start
        kept = min(came, len(self._body) - self._begin)
        self._body[self._begin : self._begin + kept] = self._chunk[start : start + kept]
        self._drop_bytes -= came - kept
        self._start, self._filled = 0, self._begin + kept

    def _finish_body(self, body: bytearray) -> Frame[M] | None:
        if self._filled < len(body) or self._drop_bytes:
            return None
        self._body, self._filled = None, 0
        if self._is_dropped:
            self._is_dropped = False
            raise PayloadDropped(decode_header(memoryview(body)[self._begin :], self.rules.decoder))
        return decode(memoryview(body)[self._begin :], self._header_bytes, self.rules.decoder, self._locate)


def _describe_excess(rules: FrameRules[M], header: int, payload: int) -> str:
    if not rules.header_bytes:
        return "a message that nothing asked for"
    came, most = f"{header} + {payload}", f"{rules.header_bytes} + {rules.payload_bytes}"
    return f"a frame of {came} bytes (header + payload), of at most {most}"


def join_short(parts: Sequence[Buffer]) -> list[Buffer]:
    """Join short buffers, for few system calls; long ones are not copied."""
    if sum(map(len, parts)) < JOINED_BYTES:
        return [b"".join(parts)]
    joined, short = list[Buffer](), list[Buffer]()
    for part in parts:
        if len(part) < JOINED_BYTES:
            short.append(part)
            continue
        joined += [b"".join(short), part]
        short = []
    return [*joined, b"".join(short)]
