"""Huge pages for a worker's memory, or not: the fork server asks for them, and here one goes without."""

import ctypes

from runtime.wire import Prepared

PR_SET_THP_DISABLE = 41
"""linux/prctl.h"""
ENOUGH_BYTES = 2_000_000
"""Of weights that are copied or packed while a session is made. With less it is made no faster, and can take
2 MB more; with 5 MB it is made in two thirds of the time, with 50 MB in half (measured, decision 22)."""


def are_better(source_bytes: int, prepared: Prepared | None) -> bool:
    """Tell whether a session is better with huge pages.

    Args:
        source_bytes: of the files that it is, or its form was, made of.
        prepared: the form that it is made of. What is in that twice, as it was and packed, is packed again to
            find it there (ONNX Runtime 1.31), and the rest only mapped.
    """
    if prepared is None or prepared.form == "optimised":
        return source_bytes >= ENOUGH_BYTES
    return sum(file.bytes for file in prepared.files) - source_bytes >= ENOUGH_BYTES


def go_without() -> None:
    """Have this process take no huge pages from here on, whatever malloc asks for.

    A kernel that refuses leaves it with what it has.
    """
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
