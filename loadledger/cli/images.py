"""Pictures as arrays: layout, size and values follow the declared input unless options say otherwise.

Pillow is the extra `images`.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadledger.records import ModelTensor
from loadledger.tensors import FORMS, Array, convert

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 89_478_485
"""Pillow's own limit, before which it warns of a decompression bomb."""
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by number of channels."""
DEEP = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
"""Modes whose values are beyond 0..255."""
FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})
RANKS = (2, 3, 4)
"""Dimensions of an input for pictures: height and width, with channels, and with a batch."""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How to make an array of a picture; None follows the declared input.

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


@dataclass(frozen=True, slots=True)
class ImageShape:
    """The dimensions of an input for pictures.

    Attributes:
        order: NCHW, NHWC, CHW or HWC; None is height and width alone.
        height: None is any.
        width: None is any.
    """

    order: str | None
    channels: int = 1
    height: int | None = None
    width: int | None = None


def image_array(content: bytes, tensor: ModelTensor, options: ImageOptions) -> tuple[Array, str]:
    """Return the array for an input, and what was done in words.

    An input of BYTES, and one of UINT8 with one dimension, get the file as it is.

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
    """Return what an input's shape says of its pictures; channels first, if it fits both ways.

    Raises:
        ValueError: it is no shape of pictures, or its layout is not clear.
    """
    declared = tensor.shape
    if len(declared) not in RANKS:
        raise ValueError(f"input {tensor.name!r} has the shape {declared}, which is none of pictures")
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


def _static(length: int) -> int | None:
    return length if length > 0 else None


def _open(content: bytes) -> Any:
    """Return a picture, upright, of which all is decoded."""
    try:
        from PIL import Image, ImageOps  # it is an extra
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
