"""The arrays of `loadledger infer`: inputs that fit the model, outputs as a summary, JSON or a file.

A picture's layout, size and values follow the declared input unless options say otherwise. Reading one needs
Pillow, the extra `images`.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from answers.inference import ModelMetadata
from answers.tensors import ModelTensor
from events.files import write_file
from loadledger.cli.inputs import MAX_FILE_BYTES, GivenInput, InputFile, InputFill
from loadledger.cli.output import format_cell, format_table
from loadledger.cli.snippets import example_of
from loadledger.inference import InferenceResult
from loadledger.tensors import FORMS, Array, convert, guess_datatype, to_array

Note = Callable[[str], None]
_BROKEN = (ValueError, OSError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile, KeyError)
COLUMNS = ("OUTPUT", "DATATYPE", "SHAPE", "DATA")
NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""The names in the JSON of Protocol Buffers."""
MAX_DATA_CHARACTERS = 400
"""Longest output in a table; `--json` has all of it."""
MAX_ELEMENTS = 16
"""Larger numeric outputs are summarised."""
TOP = 5
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 89_478_485
"""Pillow's own limit, above which it warns of a decompression bomb."""
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by number of channels."""
DEEP = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
"""Modes with values outside 0 to 255."""
FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
RANKS = (2, 3, 4)
"""Dimensions of an input for pictures: height and width, with channels, and with a batch."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Settings for the array of a picture; None follows the declared input.

    Attributes:
        layout: NCHW (channels first) or NHWC (channels last); both also without N.
        size: width and height, in pixels.
        scale: factor of the pixels' values, 0 to 255.
        mean: subtracted after that, for each channel or all.
        std: divisor after that, for each channel or all.
    """

    layout: str | None = None
    size: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def build_inputs(
    given: Iterable[GivenInput], metadata: ModelMetadata | None, options: ImageOptions, note: Note
) -> dict[str, Any]:
    """Return the inputs by name.

    Args:
        given: the parsed inputs.
        metadata: the model's; None if it is not loaded, so that inputs need names.
        options: options for pictures.
        note: called with each conversion, in words.

    Raises:
        ValueError: an input does not fit; the message says what to do.
    """
    declared = None if metadata is None else {tensor.name: tensor for tensor in metadata.inputs}
    found: dict[str, Any] = {}
    for name, value in _named_values(given, declared):
        if name in found:
            raise ValueError(f"input {name!r} is given twice")
        if declared is not None and name not in declared:
            raise ValueError(f"the model has no input {name!r}; it has {', '.join(declared) or 'none'}")
        tensor = None if declared is None else declared[name]
        found[name] = _fit(name, value, tensor, options, note)
    return found


def _named_values(
    given: Iterable[GivenInput], declared: Mapping[str, ModelTensor] | None
) -> Iterator[tuple[str, Any]]:
    for each in given:
        if each.names_inputs:
            values = each.value if isinstance(each.value, Mapping) else _read_archive(each.value)
            yield from values.items()
        else:
            yield (_only_name(declared) if each.name is None else each.name), each.value


def _only_name(declared: Mapping[str, ModelTensor] | None) -> str:
    if declared is None:
        raise ValueError("the model is not loaded, so its inputs are not known: give NAME=VALUE")
    if len(declared) != 1:
        raise ValueError(
            f"the model has the inputs {', '.join(declared) or 'none'}: give NAME=VALUE for each"
        )
    return next(iter(declared))


def _fit(name: str, value: Any, tensor: ModelTensor | None, options: ImageOptions, note: Note) -> Any:
    """Return a value for an input, which is None if the model is not loaded."""
    if isinstance(value, InputFile) and value.is_image:
        if tensor is None:
            raise ValueError(
                f"input {name!r}: a picture needs the shape of the input, which only a loaded model's has"
            )
        array, said = image_array(value.content, tensor, options)
        note(f"{value.label}: {said}")
        return array
    if isinstance(value, InputFill):
        if tensor is None:
            raise ValueError(f"input {name!r}: its datatype is known once the model is loaded; give JSON")
        return _fit_array(name, _fill(value, tensor), tensor, note, is_typed=False)
    if isinstance(value, Mapping):  # a whole tensor
        return value
    label, is_typed = name, isinstance(value, InputFile | np.ndarray)
    if isinstance(value, InputFile):
        array, label = _only_array(value) if value.is_archive else _read_array(value), value.label
    else:
        array = to_array(name, value)
    return array if tensor is None else _fit_array(label, array, tensor, note, is_typed=is_typed)


def _fill(value: InputFill, tensor: ModelTensor) -> Array:
    """Return made-up values: floating-point numbers below 1, bytes, or 0 and 1, mostly valid indices.

    Raises:
        ValueError: the model takes texts, which cannot be made up, or too large an input.
    """
    shape = tuple(example_of(tensor).shape) if value.shape is None else value.shape
    form = FORMS.get(tensor.datatype, np.dtype(np.float32))
    if prod(shape) * form.itemsize > MAX_FILE_BYTES:
        raise ValueError(f"input {tensor.name!r}: {list(shape)} is more than a request may have")
    if tensor.datatype == "BYTES":
        if value.values != "zeros":
            raise ValueError(
                f"input {tensor.name!r} takes texts: give some, like {tensor.name}='[\"a text\"]'"
            )
        return np.full(shape, "", object)
    if value.values != "random":
        return np.full(shape, value.values == "ones", form)
    dice = np.random.default_rng()
    if tensor.datatype in FLOATS:
        return dice.random(shape, np.float32)
    return dice.integers(0, 256 if tensor.datatype == "UINT8" else 2, shape)


def _fit_array(label: str, array: Array, tensor: ModelTensor, note: Note, *, is_typed: bool) -> Array:
    """Add the batch dimension that the declared shape has, and convert to the declared datatype."""
    declared = tensor.shape
    lacks_batch = len(declared) == array.ndim + 1 and declared[0] in (-1, 1)
    batched = array[None] if lacks_batch else array
    if not _has_shape(batched.shape, tensor.shape):
        raise ValueError(
            f"{label} has the shape {list(array.shape)}; input {tensor.name!r} takes"
            f" {tensor.describe_shape()}, where -1 and names are any length"
        )
    fitted = convert(tensor.name, batched, tensor.datatype)
    if batched is not array or (is_typed and guess_datatype(array) not in (tensor.datatype, None)):
        note(f"{label}: {_describe(array)} -> {tensor.datatype} {list(fitted.shape)}")
    return fitted


def _has_shape(shape: tuple[int, ...], declared: list[int]) -> bool:
    """Whether a shape fits the declared one; an empty declaration may be an unknown shape."""
    if not declared:
        return True
    pairs = zip(shape, declared, strict=False)
    return len(shape) == len(declared) and all(wanted in (-1, length) for length, wanted in pairs)


def _describe(array: Array) -> str:
    return f"{array.dtype if array.dtype.kind in 'biuf' else 'strings'} {list(array.shape)}"


def _read_array(file: InputFile) -> Array:
    try:
        return np.asarray(np.load(io.BytesIO(file.content), allow_pickle=False))
    except _BROKEN as error:
        raise ValueError(f"{file.label} is no array that can be read safely: {error}") from None


def _read_archive(file: InputFile) -> dict[str, Array]:
    """Return the arrays of an archive by name; refuse one that unpacks to too much."""
    try:
        with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_FILE_BYTES // 2**20} MiB")
        with np.load(io.BytesIO(file.content), allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except _BROKEN as error:
        raise ValueError(f"{file.label} is no archive that can be read safely: {error}") from None


def _only_array(file: InputFile) -> Array:
    arrays = _read_archive(file)
    if len(arrays) != 1:
        names = ", ".join(arrays) or "none"
        raise ValueError(f"{file.label} has the arrays {names}: give @{file.label} without a name")
    return next(iter(arrays.values()))


def result_json(result: InferenceResult) -> dict[str, Any]:
    """Return the outputs as in the protocol's JSON, with NaN and the infinities by name."""
    about = {"model_name": result.model_name, "model_version": result.model_version, "id": result.id}
    outputs = [
        {
            "name": name,
            "datatype": result.datatypes[name],
            "shape": list(array.shape),
            "data": list(map(_named_number, array.reshape(-1).tolist())),
        }
        for name, array in result.items()
    ]
    return {key: value for key, value in about.items() if value is not None} | {"outputs": outputs}


def result_lines(result: InferenceResult) -> Iterator[str]:
    yield f"{format_cell(result.model_name)} version {format_cell(result.model_version)}"
    rows = [
        (
            format_cell(name),
            format_cell(result.datatypes[name]),
            json.dumps(list(array.shape)),
            format_cell(describe_data(array), most=MAX_DATA_CHARACTERS),
        )
        for name, array in result.items()
    ]
    yield from format_table(COLUMNS, rows)


def describe_data(array: Array) -> str:
    """Return all elements of a small output, or a summary: range, mean, and the largest of a vector."""
    flat = array.reshape(-1)
    if array.dtype.kind not in "biuf":
        return json.dumps(flat.tolist(), ensure_ascii=False)
    if array.size <= MAX_ELEMENTS:
        return f"[{', '.join(map(_plain, flat))}]"
    if array.dtype.kind == "b":
        return f"{np.count_nonzero(flat)} of {array.size} true"
    return "; ".join(_summary(array, flat[~np.isnan(flat)] if array.dtype.kind == "f" else flat))


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write outputs to a file: one as .npy, any number as .npz; an existing file is replaced at once.

    Raises:
        ValueError: there is more than one output for .npy.
        OSError: the file cannot be written.
        WrongTarget: the path leads to a folder, a link or a special file.
    """
    plain = {name: array.astype(str) if array.dtype == object else array for name, array in arrays.items()}
    if path.suffix == ".npy" and len(plain) != 1:
        raise ValueError(
            f"the model has the outputs {', '.join(plain) or 'none'}: name one with --output, or write .npz"
        )
    with write_file(path, replace=True) as file:
        if path.suffix == ".npy":
            np.save(file, next(iter(plain.values())), allow_pickle=False)
        else:
            np.savez(file, allow_pickle=False, **plain)


def _summary(array: Array, numbers: Array) -> Iterator[str]:
    if numbers.size:
        with np.errstate(all="ignore"):
            mean = numbers.mean(dtype=np.float64)
        yield f"min {numbers.min():.6g}, max {numbers.max():.6g}, mean {mean:.6g}"
    if numbers.size < array.size:
        yield f"{array.size - numbers.size} NaN"
    elif array.size == array.shape[-1]:
        best = np.argsort(-array.reshape(-1).astype(np.float64), kind="stable")[:TOP]
        yield f"top {TOP}: " + ", ".join(f"{at} ({array.reshape(-1)[at]:.6g})" for at in best)


def _plain(number: Any) -> str:
    if isinstance(number, np.bool_):
        return json.dumps(bool(number))
    return NAMES.get(str(number), str(number))


def _named_number(element: Any) -> Any:
    return NAMES.get(str(element), element) if isinstance(element, float) else element


@dataclass(frozen=True, slots=True)
class ImageShape:
    """The dimensions of an input for pictures.

    Attributes:
        order: NCHW, NHWC, CHW or HWC; None is height and width alone.
        height: None is any height.
        width: None is any width.
    """

    order: str | None
    channels: int = 1
    height: int | None = None
    width: int | None = None


def image_array(content: bytes, tensor: ModelTensor, options: ImageOptions) -> tuple[Array, str]:
    """Return the array for an input, and the conversion in words.

    An input of BYTES, or of UINT8 with one dimension, gets the file unchanged.

    Raises:
        ValueError: the picture or the options do not fit the input, or Pillow is missing.
    """
    if tensor.datatype == "BYTES":
        array = np.empty([1] * len(tensor.shape), object)
        array[...] = content
        return array, f"its {len(content)} bytes as they are -> BYTES {list(array.shape)}"
    if tensor.datatype == "UINT8" and len(tensor.shape) == 1:
        array = np.frombuffer(content, np.uint8)
        return array, f"its bytes as they are -> UINT8 {list(array.shape)}"
    shape = find_image_shape(tensor, options.layout)
    picture = _open(content)
    label = f"{picture.width}x{picture.height} {picture.mode}"
    pixels = _pixels(picture, shape, options)
    values, span = _values(pixels, tensor, options)
    if shape.order is None:
        values = values[..., 0]
    elif shape.order.endswith("CHW"):
        values = values.transpose(2, 0, 1)
    is_batch = shape.order is not None and shape.order.startswith("N")
    array = convert(tensor.name, np.ascontiguousarray(values[None] if is_batch else values), tensor.datatype)
    order = "" if shape.order is None else f" ({shape.order})"
    return array, f"{label} -> {array.dtype} {list(array.shape)}{order}, values {span}"


def find_image_shape(tensor: ModelTensor, layout: str | None) -> ImageShape:
    """Return the pictures' dimensions by an input's shape; channels first, if both orders fit.

    Raises:
        ValueError: the shape does not fit pictures, or its layout is ambiguous.
    """
    declared = tensor.shape
    if len(declared) not in RANKS or (len(declared) == min(RANKS) and min(declared) <= 1):  # a batch of rows
        raise ValueError(
            f"input {tensor.name!r} takes {tensor.datatype} of the shape {tensor.describe_shape()},"
            f" which is none of pictures: give numbers, as JSON or as {tensor.name}=@FILE.npy"
        )
    if len(declared) == min(RANKS):  # height and width
        return ImageShape(None, height=_static(declared[0]), width=_static(declared[1]))
    dims = declared[-3:]
    is_first, is_last = dims[0] in CHANNELS, dims[2] in CHANNELS
    if layout is None and not is_first and not is_last and dims[0] > 0:
        raise ValueError(f"input {tensor.name!r} has the shape {declared}: say --layout NCHW or NHWC")
    first = layout == "NCHW" if layout is not None else is_first or not is_last
    channels = dims[0] if first else dims[2]
    if channels > 0 and channels not in CHANNELS:
        raise ValueError(f"input {tensor.name!r} has {channels} channels; a picture has 1, 3 or 4")
    height, width = dims[1:] if first else dims[:2]
    order = ("N" if len(declared) == max(RANKS) else "") + ("CHW" if first else "HWC")
    return ImageShape(order, channels if channels > 0 else 3, _static(height), _static(width))


def suggest_size(given: Iterable[GivenInput], metadata: ModelMetadata, options: ImageOptions) -> str | None:
    """Return advice on the size of a picture that the model failed with: the size that its warm-up ran on."""
    declared = {tensor.name: tensor for tensor in metadata.inputs}
    for name, value in _named_values(given, declared):
        example = declared[name].example
        if isinstance(value, InputFile) and value.is_image and example is not None and not example.refusal:
            with suppress(ValueError):  # the example is no picture
                tried = find_image_shape(replace(declared[name], shape=example.shape), options.layout)
                if options.size != (tried.width, tried.height):
                    size = f"{tried.width}x{tried.height}"
                    return f"it worked with {size} when it was loaded: for {value.label}, add --size {size}"
    return None


def _static(length: int) -> int | None:
    return length if length > 0 else None


def _open(content: bytes) -> Any:
    """Return a picture, upright and completely decoded."""
    try:
        from PIL import Image, ImageOps  # an extra
    except ImportError:
        raise ValueError("pictures need Pillow: pip install 'loadledger[images]'") from None
    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except bombs:
        raise ValueError(f"the picture has more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"the picture cannot be read: {error}") from None
    if upright.mode in DEEP:
        raise ValueError(f"the picture has values beyond 0..255 (mode {upright.mode}): give it as .npy")
    return upright


def _pixels(picture: Any, shape: ImageShape, options: ImageOptions) -> Array:
    """Return values 0 to 255 as UINT8: height, width, channels."""
    size = options.size or (shape.width or picture.width, shape.height or picture.height)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} is more than {MAX_PIXELS} pixels")
    from PIL import Image

    converted = picture.convert(CHANNELS[shape.channels])
    resized = converted if converted.size == size else converted.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(resized)
    return pixels[..., None] if shape.channels == 1 else pixels


def _values(pixels: Array, tensor: ModelTensor, options: ImageOptions) -> tuple[Array, str]:
    """Return the scaled values, and their possible range."""
    is_plain = options.scale is None and options.mean is None and options.std is None
    if is_plain and tensor.datatype not in FLOATS:
        return pixels, "0..255"
    default = 1 / 255 if tensor.datatype in FLOATS else 1.0
    scale = default if options.scale is None else options.scale
    shift = _per_channel(options.mean or (0.0,), pixels.shape[-1])
    divisor = _per_channel(options.std or (1.0,), pixels.shape[-1])
    values = (pixels.astype(np.float32) * np.float32(scale) - shift) / divisor
    ends = (np.array([[0.0], [255.0]]) * scale - shift) / divisor
    form = FORMS.get(tensor.datatype, FORMS["FP32"])
    span = f"{ends.min():.4g}..{ends.max():.4g}"
    return values.astype(form if form.kind == "f" else np.float32), span


def _per_channel(values: tuple[float, ...], channels: int) -> Array:
    if len(values) not in (1, channels):
        raise ValueError(f"--mean and --std have one number, or one for each of {channels} channels")
    return np.asarray(values, np.float32)
