"""The outputs of `loadledger infer`: a summary for people, JSON, or a file of numpy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loadledger.cli.output import format_cell, format_table
from loadledger.inference import InferenceResult
from loadledger.tensors import Array

HEAD = ("OUTPUT", "DATATYPE", "SHAPE", "DATA")
NAMES = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As in the JSON of Protocol Buffers."""
MAX_DATA_CHARACTERS = 400
"""Longest output in a table; `--json` has all of it."""
MAX_ELEMENTS = 16
"""Larger numeric outputs are summarised."""
TOP = 5


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
    """Yield the summary for people."""
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
    """
    plain = {name: array.astype(str) if array.dtype == object else array for name, array in arrays.items()}
    if path.suffix == ".npy" and len(plain) != 1:
        raise ValueError(
            f"the model has the outputs {', '.join(plain) or 'none'}: name one with --output, or write .npz"
        )
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, next(iter(plain.values())), allow_pickle=False)
            else:
                np.savez(file, allow_pickle=False, **plain)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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
