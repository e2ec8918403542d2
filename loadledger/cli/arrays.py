"""The arrays of `loadledger infer`: inputs that fit the model, outputs as a summary, JSON or a file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from events.files import write_file
from loadledger.cli.images import ImageOptions, image_array
from loadledger.cli.infer import MAX_FILE_BYTES, GivenInput, InputFile
from loadledger.cli.output import format_cell, format_table
from loadledger.inference import InferenceResult
from loadledger.records import ModelMetadata, ModelTensor
from loadledger.tensors import Array, convert, guess_datatype, to_array

Note = Callable[[str], None]
_BROKEN = (ValueError, OSError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile, KeyError)
HEAD = ("OUTPUT", "DATATYPE", "SHAPE", "DATA")
NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As in the JSON of Protocol Buffers."""
MAX_DATA_CHARACTERS = 400
"""Longest output in a table; `--json` has all of it."""
MAX_ELEMENTS = 16
"""Larger numeric outputs are summarised."""
TOP = 5


def build_inputs(
    given: Iterable[GivenInput], metadata: ModelMetadata | None, options: ImageOptions, note: Note
) -> dict[str, Any]:
    """Return the inputs by name.

    Args:
        given: as they were read.
        metadata: of the model; None if it is not loaded, so that only names that were given are known.
        options: for pictures.
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
    """Return a value for an input, which is not known if the model is not loaded."""
    if isinstance(value, InputFile) and value.is_image:
        if tensor is None:
            raise ValueError(
                f"input {name!r}: a picture needs the shape of the input, which only a loaded model's has"
            )
        array, said = image_array(value.content, tensor, options)
        note(f"{value.label}: {said}")
        return array
    if isinstance(value, Mapping):  # a whole tensor
        return value
    label, is_typed = name, isinstance(value, InputFile | np.ndarray)
    if isinstance(value, InputFile):
        array, label = _only_array(value) if value.is_archive else _read_array(value), value.label
    else:
        array = to_array(name, value)
    return array if tensor is None else _fit_array(label, array, tensor, note, is_typed=is_typed)


def _fit_array(label: str, array: Array, tensor: ModelTensor, note: Note, *, is_typed: bool) -> Array:
    """Add the batch dimension that the declared shape has, and convert to the declared datatype."""
    batched = array[None] if _lacks_batch(array.shape, tensor.shape) else array
    if not _has_shape(batched.shape, tensor.shape):
        raise ValueError(
            f"{label} has the shape {list(array.shape)}; input {tensor.name!r} takes {tensor.shape},"
            " where -1 is any length"
        )
    fitted = convert(tensor.name, batched, tensor.datatype)
    if batched is not array or (is_typed and guess_datatype(array) not in (tensor.datatype, None)):
        note(f"{label}: {_describe(array)} -> {tensor.datatype} {list(fitted.shape)}")
    return fitted


def _has_shape(shape: tuple[int, ...], declared: list[int]) -> bool:
    """Whether a shape fits the declared one; an empty one may stand for one that is not known."""
    if not declared:
        return True
    pairs = zip(shape, declared, strict=False)
    return len(shape) == len(declared) and all(wanted in (-1, length) for length, wanted in pairs)


def _lacks_batch(shape: tuple[int, ...], declared: list[int]) -> bool:
    return len(declared) == len(shape) + 1 and declared[0] in (-1, 1)


def _describe(array: Array) -> str:
    return f"{array.dtype if array.dtype.kind in 'biuf' else 'strings'} {list(array.shape)}"


def _read_array(file: InputFile) -> Array:
    try:
        return np.asarray(np.load(io.BytesIO(file.content), allow_pickle=False))
    except _BROKEN as error:
        raise ValueError(f"{file.label} is no array that can be read safely: {error}") from None


def _read_archive(file: InputFile) -> dict[str, Array]:
    """Return the arrays of an archive by name; one that unpacks to too much is not unpacked."""
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
    """Return the outputs as the protocol has them in JSON; NaN and the infinities by name."""
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
    yield from format_table(HEAD, rows)


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
        WrongTarget: the path is that of a folder, a link or a device.
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
