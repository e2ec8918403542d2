"""OpenVINO's plugin on processors that are not Intel's, where it lists no device.

It compares the vendor of each device with Intel's (microsoft/onnxruntime, pull request 31981). In a copy of
the library the number is that of this machine's vendor; the rest runs as it is.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from features.devices.names import CPU

PACKAGE = "onnxruntime_ep_openvino"
LIBRARY = "libonnxruntime_providers_openvino_plugin.so"
DEVICE = "openvino:cpu"
PRESENT = ([CPU], [CPU, DEVICE])
"""The devices that a server may have, for tests of what lists them."""
COMPARE, INTEL = b"\x3d", 0x8086
"""`cmp eax, 0x8086`: the instruction, and its number, little-endian."""
LIST = """
import json, sys
import onnxruntime as ort
ort.register_execution_provider_library("openvino", sys.argv[1])
print(json.dumps([[each.ep_name, each.device.vendor_id] for each in ort.get_ep_devices()]))
"""


@contextmanager
def visible_devices(devices: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    """Yield the settings of a server in this process that has exactly these devices, of `PRESENT`."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE in devices:
            patch.syspath_prepend(str(openvino_path(folder)))
        yield {"visible_devices": ",".join(devices)}


def openvino_environment(folder: Path) -> dict[str, str]:
    """Return the variables of a server that has `openvino:cpu`; for the argument see `openvino_path`."""
    return {"PYTHONPATH": str(openvino_path(folder)), "LOADLEDGER_VISIBLE_DEVICES": DEVICE}


def openvino_path(folder: Path) -> Path:
    """Make a folder for the import path with a package of the plugin that lists `openvino:cpu`; returns it.

    Args:
        folder: where it is made; all but the library are links.
    """
    if platform.machine() != "x86_64":
        pytest.skip("OpenVINO's plugin is made for x86_64 alone")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.fail(f"{PACKAGE} is not installed: pip install -e '.[test]'")
    installed, made = Path(spec.origin).parent, folder / "openvino" / PACKAGE
    made.mkdir(parents=True)
    for path in installed.iterdir():
        if path.name not in {LIBRARY, "__pycache__"}:
            (made / path.name).symlink_to(path)
    (made / LIBRARY).write_bytes(_patched_library(installed / LIBRARY))
    if not _lists_device(made / LIBRARY):
        pytest.fail(f"{PACKAGE} lists no device on this processor, although the vendor is replaced")
    return made.parent


@cache
def _patched_library(library: Path) -> bytes:
    """Return the library's bytes, with this processor's vendor unless it lists a device as it is."""
    data = library.read_bytes()
    if _lists_device(library):
        return data
    vendor = _list_vendors(library)["CPUExecutionProvider"]
    old, new = (COMPARE + number.to_bytes(4, "little") for number in (INTEL, vendor))
    return data.replace(old, new)


def _lists_device(library: Path) -> bool:
    return "OpenVINOExecutionProvider" in _list_vendors(library)


def _list_vendors(library: Path) -> dict[str, int]:
    """Return the vendors of devices by execution provider, as a process of its own sees them."""
    listed = subprocess.check_output([sys.executable, "-c", LIST, library], timeout=120)
    return dict(json.loads(listed))
