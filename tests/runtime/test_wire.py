"""The wire contract between server and worker: whatever goes in comes out, whatever else is refused."""

import math
from contextlib import suppress
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN
from support.strategies import TEXTS, instances

from runtime import wire
from runtime.wire import (
    CHUNK_BYTES,
    FrameReader,
    FrameRules,
    Infer,
    MalformedFrame,
    MalformedTexts,
    Outcome,
    Tensor,
    TensorHead,
    heads,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(wire.DATATYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    size = math.prod(shape) * wire.DATATYPES[datatype].size
    text = draw(st.booleans())
    any_length = text or datatype == "BYTES"
    data = draw(st.binary(max_size=100) if any_length else st.binary(min_size=size, max_size=size))
    return Tensor(draw(TEXTS), datatype, shape, data, text)


MESSAGES = {
    decoder: st.one_of(*(instances(kind, without="tensors") for kind in kinds))
    for decoder, kinds in {
        wire.TO_WORKER: get_args(wire.ToWorker),
        wire.FROM_LOADING: get_args(wire.FromLoading),
        wire.FROM_SERVING: get_args(wire.FromServing),
        wire.CONTROL: (wire.Cancel,),
    }.items()
}
"""The messages of each direction, without tensors."""


def frame(message: wire.Message, content: tuple[Tensor, ...] = ()) -> bytes:
    return b"".join(bytes(part) for part in wire.encode(message, content))


def asked(content: list[Tensor]) -> Infer:
    return Infer(7, heads(content), (wire.WantedOutput("y", text=True),), text=True, sent_ns=8)


def read(decoder: Any, data: bytes, step: int = 2**30) -> list[wire.Frame[Any]]:
    reader: FrameReader[Any] = FrameReader(FrameRules(decoder))
    found, position = [], 0
    while position < len(data):
        buffer = reader.buffer()
        count = min(len(buffer), step, len(data) - position)
        found += fed(reader, data[position : position + count])
        position += count
    return found


def fed(reader: FrameReader[Any], data: bytes) -> list[wire.Frame[Any]]:
    """Feed a reader as much as its buffer takes, and return the frames that are complete then."""
    reader.buffer()[: len(data)] = data
    reader.feed(len(data))
    return list(iter(reader.next_frame, None))


def comparable(frames: list[wire.Frame[Any]]) -> list[Any]:
    return [(m, [(t.name, t.datatype, t.shape, bytes(t.data), t.text) for t in ts]) for m, ts in frames]


@PLAIN
@given(data=st.data(), step=st.integers(1, 300))
def test_frames_round_trip_in_any_pieces(data: st.DataObject, step: int) -> None:
    decoder = data.draw(st.sampled_from(list(MESSAGES)))
    choices: st.SearchStrategy[wire.Frame[Any]] = MESSAGES[decoder].map(lambda message: (message, ()))
    if decoder in (wire.TO_WORKER, wire.FROM_SERVING):
        choices |= st.lists(tensors(), max_size=3).map(
            lambda ts: (
                data.draw(st.sampled_from([asked(ts), wire.Load("r", "f", 0, 1, tensors=heads(ts))]))
                if decoder is wire.TO_WORKER
                else Outcome(7, heads(ts), 1, 2, 3, 4, 5, 6),
                tuple(ts),
            )
        )
    sent = data.draw(st.lists(choices, max_size=5))
    stream = b"".join(frame(message, content) for message, content in sent)
    assert comparable(read(decoder, stream, step)) == comparable(sent)


@pytest.mark.parametrize("size", [CHUNK_BYTES - 100, CHUNK_BYTES, 3 * CHUNK_BYTES, 2**20])
@pytest.mark.parametrize("step", [1000, CHUNK_BYTES, 2**30])
def test_long_frames_round_trip(size: int, step: int) -> None:
    content = (Tensor("x", "UINT8", (size,), bytes(range(256)) * (size // 256) + bytes(size % 256)),)
    sent: list[wire.Frame[Any]] = [(Outcome(0), ()), (Outcome(1, heads(content)), content), (Outcome(2), ())]
    stream = b"".join(frame(message, parts) for message, parts in sent)
    assert comparable(read(wire.FROM_SERVING, stream, step)) == comparable(sent)


def test_tensors_outlive_the_next_frame() -> None:
    reader: FrameReader[Any] = FrameReader(FrameRules(wire.FROM_SERVING))
    kept = []
    for fill in (b"\x01", b"\x02"):
        content = (Tensor("x", "UINT8", (8,), fill * 8),)
        data = frame(Outcome(1, heads(content)), content)
        kept += [bytes(t.data) for _, ts in fed(reader, data) for t in ts]
    assert kept == [b"\x01" * 8, b"\x02" * 8]


@PLAIN
@given(data=st.data())
def test_any_bytes_are_read_or_malformed(data: st.DataObject) -> None:
    content = (Tensor("x", "INT16", (2, 1), b"1234"), Tensor("s", "BYTES", (1,), b"\1\0\0\0a"))
    damaged = bytearray(frame(Infer(3, heads(content), (wire.WantedOutput("y"),)), content))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    drawn = data.draw(st.binary(max_size=300))
    for stream in (drawn, wire.PREFIX.pack(len(drawn), 0) + drawn, bytes(damaged)):
        for decoder in MESSAGES:
            with suppress(MalformedFrame):
                read(decoder, stream)


DEEP = b"\x82\xa4type\xa5Infer\xa2id" + b"\x91" * 100_000


@pytest.mark.parametrize(
    "stream",
    [
        wire.PREFIX.pack(wire.MAX_HEADER_BYTES + 1, 0),
        wire.PREFIX.pack(1, wire.MAX_REQUEST_BYTES + 1),
        wire.PREFIX.pack(0, 0),
        wire.PREFIX.pack(1, 0) + b"\xc1",
        frame(Outcome(1)),  # not in this direction
        frame(wire.Cancel(1)),
        frame(Infer(1, (TensorHead("x", "FP32", (1,), 4),))),  # without its data
        frame(Infer(1), (Tensor("x", "FP32", (1,), b"1234"),)),  # data without its head
        frame(Infer(1, (TensorHead("x", "FP99", (), 0),))),
        frame(Infer(1, (TensorHead("x", "FP32", (-1, -1), 4),)), (Tensor("x", "FP32", (1,), b"1234"),)),
        frame(Infer(1, (TensorHead("x", "FP32", (2,), 4),)), (Tensor("x", "FP32", (1,), b"1234"),)),
        frame(Infer(1, (TensorHead("x", "BYTES", (1,), -4), TensorHead("x", "BYTES", (1,), 4)))),
        frame(Infer(1, (TensorHead("x", "BYTES", (0,) * 65, 0),))),
        wire.PREFIX.pack(len(DEEP), 0) + DEEP,
    ],
)
def test_malformed_frames_are_refused(stream: bytes) -> None:
    with pytest.raises(MalformedFrame):
        read(wire.TO_WORKER, stream)


UNTRUE: list[wire.Message] = [
    *(wire.LoadFailure(code, "so it says") for code in ("fork_server_died", "crash_loop", "x" * 10_000)),  # type: ignore[arg-type]
    wire.LoadFailure("invalid_model", "x" * (wire.MAX_TEXT_BYTES + 1)),
    *(wire.Loaded((), (), took_us, 2) for took_us in (2**63, -1, 1.5)),  # type: ignore[arg-type]
    wire.Loaded((), (), 1, -1),
    wire.Loaded((wire.TensorSpec("x" * 5000, "FP32", ()),), (), 1),
    wire.Loaded((), (wire.TensorSpec("x", "FP32", (-2,)),), 1),
    wire.StageReached("warmed up"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("message", UNTRUE, ids=lambda message: repr(message)[:60])
def test_report_that_cannot_be_true_is_malformed(message: wire.Message) -> None:
    with pytest.raises(MalformedFrame):
        read(wire.FROM_LOADING, frame(message))


def test_datatypes_have_one_onnx_type_each() -> None:
    assert {datatype.onnx: datatype for datatype in wire.DATATYPES.values()} == wire.BY_ONNX
    assert len(wire.BY_ONNX) == len(wire.DATATYPES) == 14


@PLAIN
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_texts_round_trip(texts: list[str]) -> None:
    packed = wire.pack_texts(texts)
    assert wire.unpack_texts(packed) == wire.unpack_texts(memoryview(packed)) == texts


def test_texts_are_length_prefixed() -> None:
    assert wire.pack_texts(["é", ""]) == b"\2\0\0\0\xc3\xa9\0\0\0\0"
    assert wire.unpack_texts(b"") == []


@pytest.mark.parametrize("data", [b"\1", b"\1\0\0", b"\0\0\0\0\0", b"\2\0\0\0a", b"\xff\xff\xff\xffa"])
def test_text_beyond_the_data_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedTexts, match="longer than the data"):
        wire.unpack_texts(data)


def test_elements_are_bytes_if_one_is_not_utf8() -> None:
    assert wire.unpack_texts(b"\1\0\0\0a\1\0\0\0\xff") == [b"a", b"\xff"]


@pytest.mark.parametrize(
    ("own", "ceiling", "threads", "expected"),
    [
        (None, None, 4, None),
        (100, None, 1, 100),
        (100, None, 4, 130),
        (100, 120, 4, 120),
        (100, 200, 4, 130),
        (None, 200, 4, 200),
    ],
)
def test_memory_limit_of_a_model_leaves_room_for_its_threads(
    own: int | None, ceiling: int | None, threads: int, expected: int | None
) -> None:
    order = wire.Load("/m", "/m/1", 5, threads, memory_limit_bytes=own, ceiling_bytes=ceiling)
    assert order.hard_limit_bytes(10) == expected


@PLAIN
@given(text=st.text(), limit=st.integers(4, 40))
def test_plain_text_is_bounded_and_encodable(text: str, limit: int) -> None:
    plain = wire.plain_text(text + "\ud800", limit)
    assert len(plain.encode()) <= limit
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plain)) == plain


def test_plain_text_is_cut_between_characters() -> None:
    assert wire.plain_text("ä" * 4000) == "ä" * (wire.MAX_TEXT_BYTES // 2)
    assert wire.plain_text("short") == "short"
