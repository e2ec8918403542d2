"""A model's `loadledger.toml`: what its loads are asked for with if a request says nothing, and its warm-up.

The file is whatever somebody put into the repository, so it is read with a limit and never followed out of
it. It is looked at when a load is requested; what applied stands in the ledger, so nothing later needs it.
All but the warm-up: a ledger holds no tensors, so that is read again when the load begins.
"""

import json
import math
import os
import tomllib
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from runtime.errors import RuntimeProblem
from runtime.repository import Repository, UnsafeFile
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Count, Name, Tensor

DEFAULTS_FILE = "loadledger.toml"
MAX_DEFAULTS_BYTES = 64 * 1024
"""A file that names every key has a few hundred bytes; comments have room, and the inputs of a warm-up."""
WARM_UP = "warm_up"
"""The one key that is no parameter of a load."""
NO_TEXT = frozenset({"FP16", "BF16"})
"""Datatypes whose elements have no form as text."""


class InvalidDefaults(RuntimeProblem):
    """The model's loadledger.toml is not what it has to be."""

    code = "invalid_defaults"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a model's file says of the inference that is run before the model is loaded.

    Attributes:
        enabled: whether there is one; None leaves it to the server's setting.
        inputs: what it is run on, as JSON text; with none, it is zeros.
    """

    enabled: bool | None = None
    inputs: tuple[Tensor, ...] = ()


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    datatype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data: list[Any]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool | msgspec.UnsetType = msgspec.UNSET
    inputs: tuple[_Input, ...] = ()


def defaults_name(model_id: str) -> str:
    """Return what the file is called when people are told of it: its path in the repository."""
    return f"{model_id}/{DEFAULTS_FILE}"


def read_defaults(repository: Repository, model_id: str) -> dict[str, Any]:
    """Return what a model's file says, an empty dict if there is none; keys and values are not checked here.

    Its warm-up is: that is checked, and left out.

    Raises:
        InvalidDefaults: `invalid_defaults`, it cannot be read, is too large, or is no TOML; or the warm-up
            that it describes is none.
    """
    values, _ = _read(repository, model_id)
    return values


def read_warm_up(repository: Repository, model_id: str) -> WarmUp:
    """Return what a model's file says of its warm-up.

    Raises:
        InvalidDefaults: `invalid_defaults`, as `read_defaults`.
    """
    _, warm_up = _read(repository, model_id)
    return warm_up


def _read(repository: Repository, model_id: str) -> tuple[dict[str, Any], WarmUp]:
    name = defaults_name(model_id)
    try:
        content = _content(repository, model_id)
        values = tomllib.loads(content.decode())
        return values, _warm_up(name, values.pop(WARM_UP, {}))
    except UnsafeFile as error:
        raise InvalidDefaults(f"{name} {error}; replace it, or take it away") from None
    except UnicodeDecodeError:
        raise InvalidDefaults(f"{name} is not UTF-8, which TOML has to be") from None
    except ValueError as error:  # of the parser, and of Python for a number of thousands of digits
        raise InvalidDefaults(f"{name} is no TOML: {error}") from None
    except RecursionError:
        raise InvalidDefaults(f"{name} is nested too deeply; it takes keys with plain values") from None


def _warm_up(file: str, table: object) -> WarmUp:
    """Check the table of that name, so far as this can be done without the model."""
    try:
        read = msgspec.convert(table, _Table)
    except msgspec.ValidationError as error:
        told, _, place = str(error).partition(" - at `$")
        raise InvalidDefaults(f"{file}: {WARM_UP}{place.rstrip('`')}: {told}") from None
    enabled = None if read.enabled is msgspec.UNSET else read.enabled
    inputs = [_tensor(f"{file}: {WARM_UP}.inputs[{n}]", given) for n, given in enumerate(read.inputs)]
    return WarmUp(enabled, tuple(inputs))


def _tensor(where: str, given: _Input) -> Tensor:
    if given.datatype not in DATATYPES:
        known = ", ".join(sorted(DATATYPES.keys() - NO_TEXT))
        raise InvalidDefaults(f"{where}.datatype: {given.datatype[:64]!r} is no datatype; known: {known}")
    if given.datatype in NO_TEXT:
        told = "has no form as text, so it cannot be given here"
        raise InvalidDefaults(f"{where}.datatype: {given.datatype} {told}")
    _check_elements(f"{where}.data", given.data)
    try:
        text = json.dumps(given.data, ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError:  # of Python, for a number of thousands of digits
        raise InvalidDefaults(f"{where}.data: has a number that no datatype can hold") from None
    return Tensor(given.name, given.datatype, given.shape, text, text=True)


def _check_elements(where: str, values: list[Any]) -> None:
    for each in values:
        if isinstance(each, list):
            _check_elements(where, each)
        elif not isinstance(each, bool | int | float | str):
            raise InvalidDefaults(f"{where}: takes numbers, booleans, strings and lists of them")
        elif isinstance(each, float) and not math.isfinite(each):
            raise InvalidDefaults(f"{where}: takes no infinity and no NaN, as a request does not")


def _content(repository: Repository, model_id: str) -> bytes:
    descriptor = repository.open_beside(model_id, DEFAULTS_FILE)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(MAX_DEFAULTS_BYTES + 1)
        except OSError as error:
            raise UnsafeFile(f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_DEFAULTS_BYTES:
        raise UnsafeFile(f"has more than {MAX_DEFAULTS_BYTES} bytes")
    return content
