"""A model's `loadledger.toml`: default parameters of its loads, and its warm-up.

The file is untrusted input: it is read up to a limit, and links out of the repository are refused. It is
read when a load is requested; the ledger then has the parameters. The warm-up is read again when the load
begins, because a ledger holds no tensors; so a reload takes it as a help and not as a condition.
"""

import json
import math
import re
import tomllib
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from runtime.errors import LoadRefused, RepositoryUnreadable, RuntimeProblem
from runtime.repository import Repository
from runtime.wire import DATATYPES, MAX_DIMENSIONS, Count, Name, Tensor

DEFAULTS_FILE = "loadledger.toml"
MAX_DEFAULTS_BYTES = 64 * 1024
"""A file with every key has a few hundred bytes; this leaves room for comments and warm-up inputs."""
MAX_DOTS = 1000
"""Beside those of numbers. tomllib takes quadratic time for a key of many parts: a minute for 64 KiB, in
which its thread competes with the event loop. For a key of so many parts it takes a tenth of a second."""
_NUMBER = re.compile(r"[-+\s,\[=][0-9][0-9_]*\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?(?=\s*[,\]}#\n])")
"""A number with a fraction, in a list or at the end of a line. No part of a key is followed by these."""
WARM_UP = "warm_up"
"""The only key that is no parameter of a load."""
NO_TEXT = frozenset({"FP16", "BF16"})
"""Datatypes that JSON cannot represent."""


class InvalidDefaults(RuntimeProblem):
    """The model's loadledger.toml is invalid."""

    code = "invalid_defaults"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The warm-up of a model: the inference that runs before the model is loaded.

    Attributes:
        enabled: whether it runs; None uses the server's setting.
        inputs: its inputs as JSON text; none are zeros.
        required: whether the load fails if it does.
    """

    enabled: bool | None = None
    inputs: tuple[Tensor, ...] = ()
    required: bool = True


NO_WARM_UP = WarmUp(enabled=False, required=False)
"""Of a reload whose model has no valid file, or none that can be read now."""


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    datatype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data: list[Any]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool | msgspec.UnsetType = msgspec.UNSET
    inputs: tuple[_Input, ...] = ()


def defaults_name(model_id: str) -> str:
    return f"{model_id}/{DEFAULTS_FILE}"


def read_defaults(repository: Repository, model_id: str) -> dict[str, Any]:
    """Return the default parameters of a model, unchecked; empty without a file.

    The warm-up is checked and left out.

    Raises:
        InvalidDefaults: `invalid_defaults`, the file cannot be read, is too large, is no TOML, or its warm-up
            is invalid.
    """
    values, _ = _read(repository, model_id)
    return values


def read_warm_up(repository: Repository, model_id: str) -> WarmUp:
    """Return the warm-up of a model.

    Raises:
        InvalidDefaults: `invalid_defaults`, as `read_defaults`.
    """
    _, warm_up = _read(repository, model_id)
    return warm_up


def read_reload_warm_up(repository: Repository, model_id: str) -> WarmUp:
    """Return the warm-up of a reload, which no mistake made in the file since the load can fail."""
    try:
        return replace(read_warm_up(repository, model_id), required=False)
    except RuntimeProblem:
        return NO_WARM_UP


def _read(repository: Repository, model_id: str) -> tuple[dict[str, Any], WarmUp]:
    name = defaults_name(model_id)
    try:
        content = repository.read_beside(model_id, DEFAULTS_FILE, MAX_DEFAULTS_BYTES)
        values = _parse(content.decode())
        return values, _warm_up(name, values.pop(WARM_UP, {}))
    except (LoadRefused, RepositoryUnreadable) as error:
        reason = str(error).removeprefix(f"{DEFAULTS_FILE!r} ")
        raise InvalidDefaults(f"{name} {reason}; replace it, or take it away") from None
    except UnicodeDecodeError:
        raise InvalidDefaults(f"{name} is not UTF-8, which TOML has to be") from None
    except ValueError as error:  # of the parser, and of Python for a number of thousands of digits
        raise InvalidDefaults(f"{name} is no TOML: {error}") from None
    except RecursionError:
        raise InvalidDefaults(f"{name} is nested too deeply; it takes keys with plain values") from None


def _parse(text: str) -> dict[str, Any]:
    if text.count(".") - len(_NUMBER.findall(text)) > MAX_DOTS:
        raise ValueError(f"it has more than {MAX_DOTS} dots, beside those of numbers")
    return tomllib.loads(text)


def _warm_up(file: str, table: object) -> WarmUp:
    """Check the table `warm_up`, as far as this is possible without the model."""
    try:
        read = msgspec.convert(table, _Table)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise InvalidDefaults(f"{file}: {WARM_UP}{place.rstrip('`')}: {reason}") from None
    enabled = None if read.enabled is msgspec.UNSET else read.enabled
    inputs = [_tensor(f"{file}: {WARM_UP}.inputs[{n}]", given) for n, given in enumerate(read.inputs)]
    return WarmUp(enabled, tuple(inputs))


def _tensor(where: str, given: _Input) -> Tensor:
    if given.datatype not in DATATYPES:
        known = ", ".join(sorted(DATATYPES.keys() - NO_TEXT))
        raise InvalidDefaults(f"{where}.datatype: {given.datatype[:64]!r} is no datatype; known: {known}")
    if given.datatype in NO_TEXT:
        reason = "has no form as text, so it cannot be given here"
        raise InvalidDefaults(f"{where}.datatype: {given.datatype} {reason}")
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
