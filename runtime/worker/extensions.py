"""ONNX Runtime Extensions: operators for text, images and tokenisers, with `loadledger[extensions]`.

A worker may not map code once it is confined, so the fork server maps the library for all workers. Only the
session of a model that names one of its operator sets registers the library.
"""

import ctypes
import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import onnxruntime as ort

from runtime.onnxfile import read_domains

DOMAINS = frozenset({"ai.onnx.contrib", "com.microsoft.extensions"})
"""The operator sets of the library."""
INSTALL = "pip install 'loadledger[extensions]'"


def find_library() -> str | None:
    """Return the path of the library, or None if it is not installed. Its Python package is not imported."""
    found = importlib.util.find_spec("onnxruntime_extensions")
    folders = [] if found is None else found.submodule_search_locations or []
    paths = (
        Path(folder) / f"_extensions_pydll{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES
    )
    return next((str(path) for path in paths if path.exists()), None)


LIBRARY = find_library()


def map_library() -> None:
    """Map the library into this process, in the fork server; if that fails, the loads fail."""
    if LIBRARY is not None:
        try:
            ctypes.CDLL(LIBRARY)
        except OSError:
            return


def are_named(path: Path) -> bool:
    return not DOMAINS.isdisjoint(read_domains(path))


def register(path: Path, chosen: ort.SessionOptions) -> bool:
    """Register the operators for the session of a model that names them.

    Returns:
        Whether the model names operators and the library is not installed.
    """
    if not are_named(path):
        return False
    if LIBRARY is None:
        return True
    chosen.register_custom_ops_library(LIBRARY)
    return False
