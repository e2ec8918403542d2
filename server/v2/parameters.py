"""The `parameters` of inference requests: which have a meaning here, and which are refused.

Source: Triton's parameters extension and `ParseJsonTritonParams` of its HTTP server. What is nobody's (a
client's own) is taken and ignored, as the protocol has it. So is `headers`: it is reserved, but Triton gives
it no meaning in a request, it only forwards header fields under their own names if told to.
"""

from __future__ import annotations

from runtime.errors import InvalidInput
from runtime.wire import plain_text

Parameters = dict[str, bool | int | float | str]
"""Each value a string, a number or a boolean: the protocol allows no other."""

MAX_TIMEOUT_US = 2**63 - 1

_NEUTRAL: dict[str, tuple[int | str, ...]] = {
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
    "priority": (0,),
    "classification": (0,),
}
"""Values that ask for nothing: clients send them for what was not set."""

_SHOWN_BYTES = 64


def check_parameters(where: str, parameters: Parameters) -> None:
    """Refuse by name what has a meaning that is not supported; of all else nothing is checked here.

    All names that begin with `triton_` are Triton's own, and its HTTP server takes none of them either.

    Args:
        where: whose parameters these are, as a message begins: "input 'x': ", or "" for the request's.
        parameters: what was given.

    Raises:
        InvalidInput: `invalid_input`.
    """
    for name, value in parameters.items():
        neutral = _NEUTRAL.get(name)
        if neutral is not None:
            if not any(type(value) is type(each) and value == each for each in neutral):
                raise InvalidInput(f"{where}the parameter '{name}' is not supported; leave it out")
        elif name.startswith("shared_memory_"):
            raise InvalidInput(f"{where}'{shown(name)}': shared memory is not supported; send the data")
        elif name.startswith("triton_"):
            raise InvalidInput(f"{where}the parameter '{shown(name)}' is not supported; leave it out")


def timeout_us(parameters: Parameters) -> int | None:
    """Return the request's deadline in microseconds, None if it has none or 0.

    Raises:
        InvalidInput: `invalid_input`, it is not a number of microseconds.
    """
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise InvalidInput("the parameter 'timeout' must be an integer of microseconds, 0 for none")
    return value or None


def binary_output(where: str, parameters: Parameters, name: str, *, default: bool = False) -> bool:
    """Return what the parameter `name` says about the form of outputs.

    Raises:
        InvalidInput: `invalid_input`, it is neither true nor false.
    """
    value = parameters.get(name, default)
    if value is True or value is False:
        return value
    raise InvalidInput(f"{where}the parameter '{name}' must be true or false")


def shown(name: str) -> str:
    """Return what a message says of a name that a client chose."""
    return plain_text(name, _SHOWN_BYTES)
