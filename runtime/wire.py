"""The messages between the server and a worker, and their frames: the whole contract.

A frame is a fixed prefix (length of the header, length of the payload), a header (one of the messages here,
in msgpack) and the payload: the raw bytes of the message's tensors, one after the other, little-endian and in
row-major order. Requests carry ids that only go up; any number may be in flight. On the data channel `Load`,
`Probe` and `Infer` go to the worker; `StageReached`, `Loaded`, `Probed`, `LoadFailure`, `Outcome`, `RunBegun`
and `InferenceFailure` come back; on the control channel `Cancel` goes to the worker. Nothing is pickled, and
bytes that cannot be decoded are a `MalformedFrame`. A long tensor of an inference may lie in shared memory
(`runtime.process.sharedmemory`) instead of in the payload.

A model may take over its worker, so each field of a worker's message has bounds here: a hostile worker's
report fits the ledger, or ends the worker. Which messages may come at which time, and their length then, is
in `runtime.process.inflight`.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

from features.wire import FoundTarget, Library, Target
from runtime.errors import LoadCode
from runtime.rows.judgement import Judgement

PREFIX = struct.Struct("<IQ")
LENGTH = struct.Struct("<I")
"""The length before each element of a BYTES tensor."""
MAX_HEADER_BYTES = 16 * 2**20
"""Header of any message: a request may have many thousands of names."""
MAX_REPORT_BYTES = 2**20
"""Header of a message about a load. `Loaded` with 10,000 inputs and outputs fits, 100 bytes for each: models
of the first ONNX releases list each of their weights as an input."""
MAX_FAILURE_BYTES = 8 * 2**10
"""Header of an answer without outputs: an `InferenceFailure` with its message fits, and a `RunBegun`."""
MAX_BEGUN = 512
"""Inferences that a `RunBegun` names; a larger batch has more."""
MAX_OUTPUTS = 4096
"""Outputs of a model. An answer with so many takes 20 ms of the server's loop, a delay for other requests."""
MAX_HEAD_BYTES = 1024
"""An output's head in `Outcome`, without its name: `MAX_DIMENSIONS` lengths of 9 bytes fit."""
MAX_PAYLOAD_BYTES = 256 * 2**20
"""Payload of an answer, four times the default limit of a request; a longer one becomes a failure."""
MAX_REQUEST_BYTES = 2**31
"""Bytes sent to a worker: the largest value of `--max-request-size`."""
ALIGNMENT = 16
"""Alignment of the payload of a long frame, in bytes, which is malloc's."""
SHARED_ALIGNMENT = 64
"""Alignment of outputs in shared memory, in bytes: a line of the processor's cache."""
MAX_DIMENSIONS = 64
"""The limit of numpy's arrays."""
MAX_TEXT_BYTES = 4096
"""A message for people, as an event keeps it."""
MAX_REASON_BYTES = 256
"""The description of a malformed frame, in which the decoder quotes the sender's bytes."""
MAX_NAME_CHARACTERS = 4096
"""A path (PATH_MAX), or a model's name of an input or output."""


@dataclass(frozen=True, slots=True)
class Datatype:
    """A datatype of the Open Inference Protocol.

    `numpy` and `onnx` (ONNX Runtime's) are its names there; `size` is bytes per element. A BYTES element is
    its length, four bytes little-endian, and its bytes; `size` is then 0. numpy has no BF16: its two bytes
    are passed as unsigned integers.
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
    """The bytes are no frame of the contract; nothing further is read from their sender."""


class MalformedTexts(ValueError):
    """The data of a BYTES tensor is malformed; the text names the defect of an element."""


Buffer = bytes | bytearray | memoryview
LoadStage = Literal["loading", "warming_up"]
Fill = Literal["zeros", "ones"]
Layer = Literal["landlock", "seccomp"]
"""A layer of a worker's confinement, in the order of application."""
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
"""Forbidden acts that a throw-away worker tries: to use files or processes of others, to run code that it has
made, to call drivers of hardware, and to manage the server over its control socket."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Time = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Nanoseconds since 1970; a file can be older."""
FileNumber = Annotated[int, msgspec.Meta(ge=0)]
"""A file system or an inode, with all 64 bits on some systems. They are compared, and go into no event."""
Length = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
"""Length of a dimension of a model's input or output; -1 is any length."""
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_BYTES)]


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """A named tensor: `data` holds the elements of `shape`, row-major, in the form of its datatype.

    With `text`, the elements are JSON: a list, flat or nested. The text is not checked here: the worker
    checks a client's text, and a worker's text is the model's answer.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer
    text: bool = False


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """A frame's header: its fields in their order, without their names."""


class TensorHead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor without its data: `size` bytes of the payload, which are JSON with `text`.

    With `at`, the data is not in the payload: it begins there in the shared memory.
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
    """A value of an input that the model ran on: zeros or ones of a shape.

    With `refusal` the shape is a guess: the text is the model's refusal, or why it was not tried.
    """

    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    values: Fill
    refusal: Text | None = None


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An input or output of a model: -1 in `shape` is any length; an `optional` one may be missing.

    Attributes:
        datatype: the protocol's, or ONNX Runtime's own type where the protocol has none ("seq(…)").
        dimensions: the model's name of each dimension of `shape`, or ""; () without any name.
        example: for an input of a loaded model, if its warm-up has searched for one.
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


NO_MORE = "the machine has no more"
"""The reason for a lack of memory of a load without a limit."""


def _leave_room(limit_bytes: int | None, target: Target | None) -> int | None:
    """Return a limit of mapped memory with room for what a provider maps."""
    return limit_bytes if limit_bytes is None or target is None else limit_bytes + target.mapped_bytes


class Load(Message, frozen=True):
    """Load the model in `folder`; the first message to a worker.

    Attributes:
        root: the folder that no file may leave: `folder` itself in the store, else the repository's root.
        bytes: the size of all files together.
        memory_limit_bytes: limit of the model, beside the empty worker; None is no limit.
        load_limit_bytes: a further limit until the model is loaded; None is no limit.
        max_batch_size: 0 turns batching off.
        max_queue_delay_us: the longest wait of a request for its batch.
        warm_up: whether the model runs once before it is loaded.
        warm_up_required: whether a warm-up that fails fails the load.
        layers: the layers of the worker's confinement; the worker ends if one cannot be applied.
        ceiling_bytes: the worker's permanent limit of memory, which it cannot lift; None is no limit.
        tensors: inputs of the warm-up, which `Worker.load` fills in; else zeros where shapes allow it.
        name: the process's name in lists of processes.
        target: where the session runs; None is the CPU. Its warm-up has to succeed.
        max_request_bytes: limit of a request; a model that needs longer ones is refused.
        dependent_rows: whether rows of a batch may change each other's answers.
        rows_required: whether the load fails if they do, and may not; else its requests are not joined.
        has_priorities: whether inferences of a higher priority run first.
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
    target: Target | None = None
    max_request_bytes: Count = MAX_REQUEST_BYTES
    dependent_rows: bool = False
    rows_required: bool = True
    has_priorities: bool = False

    def hard_limit_bytes(self, thread_bytes: int) -> int | None:
        """Return the limit that the worker cannot lift; the model's own leaves room for its threads.

        Args:
            thread_bytes: the memory of one thread. The first of `threads` is the worker's own.
        """
        own = self.memory_limit_bytes
        with_threads = None if own is None else own + (self.threads - 1) * thread_bytes
        given = [each for each in (with_threads, self.ceiling_bytes) if each is not None]
        return _leave_room(min(given, default=None), self.target)

    def most_bytes(self, thread_bytes: int) -> int | None:
        """Return the most memory of any kind that the worker can add within its limits; None is no limit.

        Beside `hard_limit_bytes`, the kernel gives it its first stack, and the page tables: 8 bytes for each
        page of 4 KiB, including pages of files.
        """
        hard = self.hard_limit_bytes(thread_bytes)
        if hard is None:
            return None
        return hard + thread_bytes + (hard + self.bytes) // 512

    @property
    def soft_limit_bytes(self) -> int | None:
        """The limit that the worker lifts when the model is loaded; None is no limit."""
        return _leave_room(self.load_limit_bytes, self.target)

    @property
    def is_limited_by_itself(self) -> bool:
        """Whether the model's own limit of memory is the lowest of its limits."""
        own, others = self.memory_limit_bytes, (self.load_limit_bytes, self.ceiling_bytes)
        return own is not None and all(each is None or own <= each for each in others)

    @property
    def limit_text(self) -> str:
        """The name of the lowest limit of memory; the server adds how much the budget leaves to a load."""
        if self.is_limited_by_itself:
            return f"its memory_limit_bytes are {self.memory_limit_bytes}"
        if self.load_limit_bytes is not None:
            return "the memory budget leaves it no more"
        most = self.ceiling_bytes
        return NO_MORE if most is None else f"the memory budget is {most} bytes"


class Probe(Message, frozen=True):
    """Apply these layers, as far as they exist, and try forbidden acts.

    The first message to a worker, and its last. `outside` is a folder that no worker needs. With `providers`,
    act like the worker of a load on a target of theirs, and list these.
    """

    outside: str
    layers: tuple[Layer, ...]
    providers: tuple[Library, ...] = ()


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
    `answer_region` is the offset and size of the shared memory for long outputs. At `deadline_ns`, by the
    same clock, the answer is too late; 0 is no deadline. With priorities, a lower `level` runs first.
    """

    id: Count
    tensors: tuple[TensorHead, ...] = ()
    outputs: tuple[WantedOutput, ...] = ()
    text: bool = False
    sent_ns: Count = 0
    digest: bool = False
    answer_region: tuple[Count, Count] | None = None
    deadline_ns: Count = 0
    level: Count = 0


class StageReached(Message, frozen=True):
    """The load has reached a stage."""

    stage: LoadStage


class Loaded(Message, frozen=True):
    """The model can serve; `warming_up_us` is None without a warm-up.

    `placed` is empty for a load on the CPU, else its target comes first. `rows` says whether the rows of a
    batch are independent; None without batching.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_OUTPUTS)]
    loading_us: Count
    warming_up_us: Count | None = None
    placed: tuple[ProviderOperators, ...] = ()
    rows: Judgement | None = None


class Probed(Message, frozen=True):
    """Result of a `Probe`; the worker ends after this.

    Attributes:
        landlock_abi: the version of the applied Landlock, or 0.
        layers: the applied layers.
        succeeded: the forbidden acts that the worker could do.
        problems: why a layer was not applied, or a provider could not be used.
        targets: the providers' targets.
    """

    landlock_abi: Count
    layers: tuple[Layer, ...]
    succeeded: tuple[ForbiddenAct, ...]
    problems: tuple[Text, ...] = ()
    targets: tuple[FoundTarget, ...] = ()


class JsonRead(Message, frozen=True):
    """The answer to `ReadJson`: the request without its data, as JSON, and the span of each data in the text.

    Or the request's `problem`. A span is begin and length, or None for an input without data in the text.
    """

    head: Annotated[bytes, msgspec.Meta(max_length=MAX_REPORT_BYTES // 2)] = b""
    spans: tuple[tuple[Count, Count] | None, ...] = ()
    problem: Text = ""


class LoadFailure(Message, frozen=True):
    """The model cannot be loaded; the worker ends after this."""

    code: LoadCode
    message: Text


class Outcome(Message, frozen=True):
    """The answer to `Infer`, and the parts of its time in the worker.

    `queue_ns` is the wait for other requests, including those running before it was received. `input_ns`,
    `infer_ns` and `output_ns` are decoding, run and encoding; those of the whole run, for a batch.
    `batch_size` is the request's elements along the batch dimension, 1 without one. `execution_size` is the
    batch size of the execution, in one of its answers; in the others 0.
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

    A request that cannot meet its deadline is not run: `inference_timeout`. Any other code of a worker
    becomes `inference_failed`.
    """

    id: Count
    code: Text
    message: Text


class RunBegun(Message, frozen=True):
    """These inferences run now; of a load with priorities, whose order the server does not know."""

    ids: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_BEGUN)]


class Cancel(Message, frozen=True):
    """Stop this inference, running or queued; no effect on one that has ended."""

    id: Count


ToWorker = Load | Probe | ReadJson | Infer
FromLoading = StageReached | Loaded | Probed | JsonRead | LoadFailure
FromServing = Outcome | InferenceFailure | RunBegun
FromWorker = FromLoading | FromServing
TO_WORKER = msgspec.msgpack.Decoder(ToWorker)
FROM_LOADING: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromLoading)
FROM_SERVING: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromServing)
CONTROL = msgspec.msgpack.Decoder(Cancel)
"""One decoder for each direction and phase: unknown messages do not belong there."""
_ENCODER = msgspec.msgpack.Encoder()

M = TypeVar("M", bound=Message)
Frame = tuple[M, tuple[Tensor, ...]]


class PayloadRoom:
    """The memory for payloads of long frames: bytes that are arriving, or that no receiver counts yet.

    Args:
        has_room: whether there is memory for so many bytes now.
        max_bytes: of one payload, which a worker may only announce.
    """

    def __init__(self, has_room: Callable[[int], bool] = lambda _: True, max_bytes: int = 2**63) -> None:
        self._has_room = has_room
        self.max_bytes = max_bytes
        self.taken_bytes = 0

    def take(self, count: int) -> bool:
        """Count a payload; returns whether there is memory for it."""
        if count > self.max_bytes or not self._has_room(self.taken_bytes + count):
            return False
        self.taken_bytes += count
        return True

    def give_back(self, count: int) -> None:
        self.taken_bytes -= count


Locate = Callable[[int, int, int], memoryview]
"""Returns shared memory for a request, an offset and a size; raises `MalformedFrame`."""


def heads(tensors: Sequence[Tensor], offsets: Iterable[int | None] = repeat(None)) -> tuple[TensorHead, ...]:
    """Describe tensors in the form of a message's heads.

    `offsets` are the positions in shared memory, None for a tensor in the payload.

    Raises:
        MalformedFrame: the receiver would refuse them: an unknown datatype, or data of another size.
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
    """Encode a frame, as buffers to be written in this order; the tensors' data is not copied.

    Raises:
        MalformedFrame: the frame is longer than the receiver accepts, or holds a lone surrogate.
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
    """Decode the bytes after a frame's prefix; the tensors refer to `body` or shared memory.

    Raises:
        MalformedFrame: the bytes are no frame of this contract.
    """
    message = decode_header(body[:header_bytes], decoder)
    return message, _cut_tensors(message, body[header_bytes:], locate)


def decode_header(header: memoryview, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """Decode the message of a frame.

    Raises:
        MalformedFrame: the bytes are no message of this contract.
    """
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(plain_text(str(error), MAX_REASON_BYTES)) from None


def _cut_tensors(message: Message, payload: memoryview, locate: Locate | None) -> tuple[Tensor, ...]:
    tensors, position = [], 0
    for head in getattr(message, "tensors", ()):
        _check_size(head)  # the decoder has checked the limits of name and shape
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
"""Shorter frames are cut out of one read; a longer one is read into its own buffer."""
READ_BYTES = 2**20
"""Limit of one read: a socket is read for as long as its other side writes."""
JOINED_BYTES = 32 * 2**10
"""Frames to send: copying this much takes about as long as one more buffer in a system call."""


class PayloadDropped(MemoryError):
    """There is no memory for the payload of a frame; it was read and dropped, and the channel goes on.

    Attributes:
        message: the frame's message, without its tensors.
        bytes: the length of the payload.
    """

    def __init__(self, message: Message, payload_bytes: int) -> None:
        super().__init__()
        self.message = message
        self.bytes = payload_bytes


_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""Allocates without filling: zeroing 600 KB takes as long as reading them, and announced bytes that do not
arrive would take memory."""
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


@dataclass(frozen=True, slots=True)
class FrameRules(Generic[M]):
    """The allowed frames: their messages, and limits for a frame's prefix.

    Without header bytes, no frame is allowed.
    """

    decoder: msgspec.msgpack.Decoder[M]
    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES


class FrameReader(Generic[M]):
    """Cuts the bytes of a channel into frames.

    Read into `buffer()`, call `feed` with the number of bytes, and then `next_frame` until there is none. The
    tensor data of a frame refers to memory that nothing else uses.

    Attributes:
        rules: the rules of the next frame; may be changed between frames.

    Args:
        rules: the rules of the first frame.
        locate: finds the tensors in shared memory; None if there is none.
        room: the memory for payloads of long frames.
    """

    def __init__(
        self, rules: FrameRules[M], locate: Locate | None = None, room: PayloadRoom | None = None
    ) -> None:
        self.rules = rules
        self._room = room or PayloadRoom()
        self._held_bytes = self._payload_bytes = 0
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
            MalformedFrame: the bytes are no frame, or one that may not come now.
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
        # A copy, since the chunk is reused.
        return decode(
            memoryview(bytes(memoryview(self._chunk)[start:end])), header, rules.decoder, self._locate
        )

    def close(self) -> None:
        """Release the buffers now: nothing more is read, and a reference cycle may keep the reader alive."""
        self._chunk, self._body = bytearray(), None
        self._start = self._filled = 0
        self._room.give_back(self.take_held())

    def take_held(self) -> int:
        """Return the bytes that the latest frame has in the room, which the caller gives back."""
        held, self._held_bytes = self._held_bytes, 0
        return held

    def _move_rest(self, start: int) -> None:
        if start < self._filled:
            self._chunk[: self._filled - start] = self._chunk[start : self._filled]
        self._filled -= start
        self._start = 0

    def _begin_body(self, start: int, header: int, payload: int) -> None:
        """Read the rest of a frame into a buffer of its own; a page of it takes memory when bytes arrive."""
        self._begin = -header % ALIGNMENT
        self._header_bytes, self._payload_bytes = header, payload
        self._body = self._allocate(self._begin + header + payload, payload)
        if self._body is None:  # the message says which request the frame belongs to
            self._body, self._drop_bytes, self._is_dropped = bytearray(self._begin + header), payload, True
        came = self._filled - start
        kept = min(came, len(self._body) - self._begin)
        self._body[self._begin : self._begin + kept] = self._chunk[start : start + kept]
        self._drop_bytes -= came - kept
        self._start, self._filled = 0, self._begin + kept

    def _allocate(self, length: int, payload: int) -> bytearray | None:
        """Return the buffer of a frame, or None without memory for its payload."""
        if payload and not self._room.take(payload):
            return None
        self._held_bytes = payload
        try:
            body: bytearray = _new_bytearray(None, length)
        except MemoryError:
            self._room.give_back(self.take_held())
            return None
        return body

    def _finish_body(self, body: bytearray) -> Frame[M] | None:
        if self._filled < len(body) or self._drop_bytes:
            return None
        self._body, self._filled = None, 0
        if self._is_dropped:
            self._is_dropped = False
            message = decode_header(memoryview(body)[self._begin :], self.rules.decoder)
            raise PayloadDropped(message, self._payload_bytes)
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
