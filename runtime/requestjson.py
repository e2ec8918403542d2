"""The JSON of inference requests, read strictly, without blocking the event loop for long.

Only the data of an input may have NaN, Infinity and -Infinity, which JSON has no form for, as in Triton.

Short texts are decoded at once. A long text is read once into raw members, since each value of a hostile text
would become an object; then the rest without the tensors' data is decoded. A key that appears twice in one
object is refused. The longest texts are read in a process of their own, which says where the data is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, ClassVar

import msgspec

from runtime.errors import InvalidInput
from runtime.strictjson import InvalidJson, loads
from runtime.wire import MAX_DIMENSIONS, Buffer, JsonRead, MalformedFrame, Name, plain_text

Parameters = dict[str, bool | int | float | str]
"""Values are strings, numbers or booleans, as the protocol says."""

MAX_HEAD_BYTES = 256 * 2**10
"""Limit of a request's JSON without its tensors' data: a thousand inputs take a third of it. Names, shapes
and parameters become objects; reading 4 MiB of them would block the event loop for a quarter of a second
(measured)."""

MAX_CUSTOM_BYTES = 32 * 2**10
"""The same limit with unknown members, which are decoded as well: the worst takes 5 ms (measured)."""

MAX_INPUTS = MAX_HEAD_BYTES // 32
"""An input takes at least 32 bytes without its data, so requests with more inputs are refused anyway."""

SHORT_JSON_BYTES = 16 * 2**10
"""The worst JSON of this length blocks the event loop for a millisecond or two (measured)."""

LONG_JSON_BYTES = 4 * 2**20
"""The worst of this length blocks it for 31 ms (measured); longer ones are read in a separate process."""

MAX_DIMENSION = 2**31 - 1
"""Accepted by numpy everywhere, and more than the elements of any body."""

Dimension = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]

NO_DATA = msgspec.Raw()
"""The data of an input without data."""


class JsonInput(msgspec.Struct, gc=False):
    """An input; `data` is the JSON text."""

    name: Name
    shape: Shape
    datatype: str
    data: msgspec.Raw = NO_DATA
    parameters: Parameters | msgspec.UnsetType | None = msgspec.UNSET


class JsonOutput(msgspec.Struct, gc=False):
    """A requested output."""

    name: Name
    parameters: Parameters | msgspec.UnsetType | None = msgspec.UNSET


class JsonRequest(msgspec.Struct, gc=False):
    """A request; a missing member is UNSET."""

    inputs: list[JsonInput]
    outputs: list[JsonOutput] | msgspec.UnsetType | None = msgspec.UNSET
    id: str | msgspec.UnsetType | None = msgspec.UNSET
    parameters: Parameters | msgspec.UnsetType | None = msgspec.UNSET


_Raw = msgspec.Raw | msgspec.UnsetType


class _RawInput(msgspec.Struct, gc=False):
    """Counted while decoding, since each is an object: 4 MiB of `{},{},…` would become 100 MB."""

    name: _Raw = msgspec.UNSET
    shape: _Raw = msgspec.UNSET
    datatype: _Raw = msgspec.UNSET
    data: _Raw = msgspec.UNSET
    parameters: _Raw = msgspec.UNSET
    count: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _RawInput.count += 1
        if _RawInput.count > MAX_INPUTS:
            raise InvalidInput(f"the request has more than {MAX_INPUTS} inputs; no more are allowed")


class _RawRequest(msgspec.Struct, gc=False):
    """The members of a request without any objects but the inputs."""

    inputs: list[_RawInput] | msgspec.UnsetType = msgspec.UNSET
    outputs: _Raw = msgspec.UNSET
    id: _Raw = msgspec.UNSET
    parameters: _Raw = msgspec.UNSET


_REQUEST = msgspec.json.Decoder(JsonRequest)
_RAW_REQUEST = msgspec.json.Decoder(_RawRequest)
_ENCODER = msgspec.json.Encoder()
_NOTHING_YET = msgspec.Raw(b"0")
_COUNTED_BYTES = 4096
"""In a longer text, replacing a byte takes a fiftieth of the time of counting it, since it uses memchr."""
_BACKSLASH, _ESCAPED_COLON = b"\\", rb"\u003"
_NESTED = frozenset({dict, list})
_ANYTHING = msgspec.json.Decoder()
_DATA_KEY = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*')
_NOT_FINITE = {b"NaN": b"111", b"Infinity": b"11111111", b"Inf": b"111"}
"""Words for numbers that are not finite, as Triton reads them, each with a number of the same length."""
_UNPAIRED = re.compile(
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]|\xed[\xa0-\xbf]", re.DOTALL
)
"""A surrogate, escaped or in the form that UTF-8 does not allow."""
_POSITION = re.compile(r"\(byte (\d+)\)")
_NEAR_BYTES = 16


def decode_json(text: Buffer) -> JsonRequest:
    """Decode the JSON of a request; the data of its tensors are views of the text, or of a duplicate.

    Raises:
        InvalidInput: `invalid_input`, the JSON is malformed, or a key appears twice in one object.
    """
    return _decode(text)[0]


def _decode(text: Buffer) -> tuple[JsonRequest, Buffer]:
    """Decode the JSON of a request; returns it with the text that its data are views of.

    Numbers of the same length replace NaN and infinities. Afterwards the raw members get the original text,
    so that these words are refused outside of data.
    """
    where = ""
    try:
        try:
            request = _REQUEST.decode(text) if len(text) <= SHORT_JSON_BYTES else _decode_long(text)
        except msgspec.DecodeError:
            finite = bytearray(text)
            for number, other in _NOT_FINITE.items():
                finite = finite.replace(number, other)
            if finite == text:
                raise
            where = "; NaN and Infinity are allowed in the data of an input alone"
            request, text = _decode_long(finite, text), finite
        _check_keys(text, request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidJson) as error:
        reason = explain_malformed(text, error)
        raise InvalidInput(f"the body is not an inference request: {reason}{where}") from None
    return request, text


def explain_malformed(text: Buffer, error: Exception) -> str:
    """Return the defect of a refused text; the decoder's words for a lone surrogate vary.

    Only the text around the error is searched for surrogates: the whole text may take a tenth of a second
    (4 MiB, measured).
    """
    if isinstance(error, msgspec.DecodeError) and "UTF-8" in str(error):  # msgspec 0.23 does not say where
        error = _find_invalid_utf8(text) or error
    if isinstance(error, UnicodeDecodeError):
        near = error.object[error.start : error.end + 1]
    else:
        found = _POSITION.search(str(error))
        at = int(found[1]) if found else len(text)  # a text that was cut off has no position
        near = bytes(text[max(0, at - _NEAR_BYTES) : at + _NEAR_BYTES])
    if "surrogate" in str(error) or _UNPAIRED.search(near.replace(rb"\\", b"")):
        return "a string has an unpaired surrogate, \\ud800 to \\udfff, which is half a character"
    return str(error)


def _find_invalid_utf8(text: Buffer) -> UnicodeDecodeError | None:
    try:
        str(text, "utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def _decode_long(text: Buffer, later: Buffer = b"") -> JsonRequest:
    """Decode a long text: read it once into raw members, then decode the rest without the tensors' data.

    `later` replaces the text once the members are known.
    """
    _RawInput.count = 0
    raw = _RAW_REQUEST.decode(text)
    if later:
        memoryview(text)[:] = later
    data = [each.data for each in raw.inputs or ()]
    _check_head(len(text) - sum(len(memoryview(each)) for each in data if each))
    for each in raw.inputs or ():
        if each.data:
            each.data = _NOTHING_YET
    request = _REQUEST.decode(_ENCODER.encode(raw))
    for item, own in zip(request.inputs, data, strict=True):
        item.data = own or NO_DATA
    return request


def describe(text: Buffer, address: Callable[[Buffer | msgspec.Raw], int]) -> JsonRead:
    """Decode the JSON of a request for another process, which has the same text.

    Args:
        text: the JSON.
        address: returns the memory address of a text or of a view of it.
    """
    try:
        request, source = _decode(text)
    except InvalidInput as problem:
        return JsonRead(problem=plain_text(str(problem)))
    spans = []
    for item in request.inputs:
        size = len(memoryview(item.data))
        spans.append((address(item.data) - address(source), size) if size else None)
        item.data = _NOTHING_YET if size else msgspec.Raw(b"null")
    return JsonRead(_ENCODER.encode(request), tuple(spans))


def assemble(text: Buffer, read: JsonRead) -> JsonRequest:
    """Return a request that another process has read; the data of its tensors are views of the text.

    Raises:
        InvalidInput: `invalid_input`, as the process reported.
        MalformedFrame: the report is impossible.
    """
    if read.problem:
        raise InvalidInput(read.problem)
    view, end = memoryview(text), 0
    try:
        request = _REQUEST.decode(read.head)
        for item, span in zip(request.inputs, read.spans, strict=True):
            item.data = NO_DATA
            if span is not None:
                start, size = span
                if start < end or start + size > len(view):
                    raise MalformedFrame("data outside of the text")
                item.data, end = msgspec.Raw(view[start : start + size]), start + size
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise MalformedFrame(f"a request that cannot be: {error}") from None
    return request


def _check_head(head_bytes: int, most: int = MAX_HEAD_BYTES, when: str = "") -> None:
    if head_bytes > most:
        reason = f"has {head_bytes} bytes; at most {most} are allowed{when}"
        raise InvalidInput(f"the request without its tensors' data {reason}")


def _check_keys(text: Buffer, request: JsonRequest) -> None:
    """Refuse a key that appears twice in one object (RFC 8259 section 4): readers interpret it differently.

    The decoder takes the last value. So the colons of a text equal its decoded members and the colons in
    strings only if each key appears once. Where the known members do not account for all colons, there are
    unknown members, and the text without its tensors' data is decoded.

    Raises:
        InvalidJson: a key appears twice.
        InvalidInput: the text without the data is too long to be decoded.
    """
    whole = text if isinstance(text, bytearray) else bytes(text)
    more = _count_colons(whole) - _count_members(request)
    is_known = not more or more == _colons_in_strings(request)
    if is_known and not _may_escape_colons(whole):
        return
    rest = _without_escaped_colons(_without_data(whole, request))
    if _count_colons(rest) != _count_all(_ANYTHING.decode(rest)):
        if len(rest) <= _COUNTED_BYTES:
            loads(rest)  # raises, naming the key
        raise InvalidJson("a key appears twice in one object")


def _count_colons(text: bytes | bytearray) -> int:
    if len(text) <= _COUNTED_BYTES:
        return text.count(b":")
    return len(text) - len(text.replace(b":", b""))


def _count_members(request: JsonRequest) -> int:
    count: int = 1 + (request.id is not msgspec.UNSET) + (request.outputs is not msgspec.UNSET)
    if request.parameters is not msgspec.UNSET:
        count += 1 + len(request.parameters or ())
    for item in request.inputs:
        count += 3 if item.data is NO_DATA else 4
        if item.parameters is not msgspec.UNSET:
            count += 1 + len(item.parameters or ())
    for output in request.outputs or ():
        count += 1
        if output.parameters is not msgspec.UNSET:
            count += 1 + len(output.parameters or ())
    return count


def _colons_in_strings(request: JsonRequest) -> int:
    """Return the colons in the values of a request, and in the names of its parameters."""
    members = [request.parameters, *(each.parameters for each in (*request.inputs, *(request.outputs or ())))]
    texts: list[str] = [
        request.id or "",
        *(each.name for each in (*request.inputs, *(request.outputs or ()))),
    ]
    for parameters in members:
        texts += [text for member in (parameters or {}).items() for text in member if isinstance(text, str)]
    data: int = sum(bytes(item.data).count(b":") for item in request.inputs if item.datatype == "BYTES")
    return data + sum(text.count(":") for text in texts)


def _count_all(value: object) -> int:
    """Return the members of all objects, and the colons in all strings."""
    count, texts, level = 0, list[str](), [value]
    while level:
        members = list[object]()
        for each in level:
            if not each:
                continue
            if type(each) is dict:
                count += len(each)
                texts += each
                members += each.values()
            elif type(each) is list:
                members += each
        texts += [each for each in members if type(each) is str]
        level = [each for each in members if type(each) in _NESTED]
    return count + "".join(texts).count(":")


def _may_escape_colons(text: bytes | bytearray) -> bool:
    """Whether a text has the beginning of an escaped colon.

    Most texts have no backslash, and one byte is found in a twentieth of the time (measured with 3 MB).
    """
    return _BACKSLASH in text and _ESCAPED_COLON in text


def _without_escaped_colons(text: bytes) -> bytes:
    """Return a text with its escaped colons as colons, and its escaped backslashes as a noncharacter."""
    if not _may_escape_colons(text):
        return text
    text = text.replace(rb"\\", "\uffff".encode())
    return text.replace(rb"\u003a", b":").replace(rb"\u003A", b":")


def _without_data(text: bytes | bytearray, request: JsonRequest) -> bytes:
    """Return a text with 0 for the data of its inputs.

    Raises:
        InvalidInput: the rest is too long, the data appears twice, or its key is escaped.
    """
    pieces, start, position = list[Buffer](), 0, 0
    for item in request.inputs:
        data = bytes(item.data)
        while data and (key := _DATA_KEY.search(text, position)):
            position = key.end()
            if text.startswith(data, position):
                pieces += text[start:position], b"0"
                position = start = position + len(data)
                break
    pieces.append(text[start:])
    _check_head(sum(map(len, pieces)), MAX_CUSTOM_BYTES, " with unknown members")
    return b"".join(pieces)
