"""Execution providers in a worker: it registers a provider's library, names its devices and counts operators.

ONNX Runtime's "plugin execution providers". A library is registered after the confinement, in the process
that uses it, and only for a load on a device.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import onnxruntime as ort

from features.devices.names import CPU, CUDA, OPENVINO
from features.devices.wire import FoundDevice, ProviderLibrary, TargetDevice
from runtime.errors import LoadRefused
from runtime.wire import ProviderOperators, TensorSpec
from runtime.worker.refusals import strip_noise

RECORD_NODES = ("session.record_ep_graph_assignment_info", "1")
"""onnxruntime_session_options_config_keys.h: without it, nobody can tell where operators run."""
HARDWARE_NAMES = ("FULL_DEVICE_NAME", "cuda_device_name")
"""Keys of the metadata in which providers have a name for people: OpenVINO's, CUDA's."""
MOST_OPERATORS = 8
"""That an error lists."""
NOT_RUN = (
    "no inputs were found on which the model runs, and on a device it has to before it is loaded: give inputs"
    " that it takes as [[warm_up.inputs]] in its loadledger.toml"
)
NOT_TAKEN = "the device of the load does not take the model: load it on cpu"
NO_THREAD = "Resource temporarily unavailable"
"""The error text of OpenVINO if there is no memory for a thread: EAGAIN of pthread_create(3)."""


def find_targets(library: ProviderLibrary) -> list[FoundDevice]:
    """Register the library of a provider, and return the devices that it finds.

    Raises:
        LoadRefused: `device_unavailable`, the library cannot be registered, or finds no device.
    """
    return [_describe_device(*each) for each in _list_devices(library).items()]


def _list_devices(library: ProviderLibrary) -> dict[str, ort.OrtEpDevice]:
    """Register the library of a provider, and return the devices that it finds, by name.

    Devices of CUDA have its numbers. Others have the name of their kind, like `openvino:cpu`; further ones of
    the same kind have `.1`, `.2` and so on at its end.

    Raises:
        LoadRefused: `device_unavailable`, the library cannot be registered, or finds no device.
    """
    try:
        if library.provider == CUDA:  # not tried: NVIDIA's libraries may be packages of Python, too
            ort.preload_dlls(msvc=False)
        listed = _list_own(library) or _register(library)
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions have no base but this one
        reason = f"{library.provider}: its library cannot be registered: {strip_noise(str(error))}"
        raise LoadRefused("device_unavailable", reason) from None
    if not listed:
        raise LoadRefused("device_unavailable", f"{library.provider}: it supports no device of this machine")
    devices = dict[str, ort.OrtEpDevice]()
    for device in listed:
        kind = device.ep_metadata.get("cuda_device_id") or device.device.type.name.lower()
        name = f"{library.provider}:{kind}"
        same = sum(each == name or each.startswith(f"{name}.") for each in devices)
        devices[f"{name}.{same}" if same else name] = device
    return devices


def _describe_device(name: str, device: ort.OrtEpDevice) -> FoundDevice:
    metadata = device.ep_metadata
    hardware = next((metadata[key] for key in HARDWARE_NAMES if metadata.get(key)), device.device.vendor)
    address = device.device.metadata.get("pci_bus_id", "")
    return FoundDevice(name, _version_of(device), hardware, address)


def add_target(target: TargetDevice, threads: int, chosen: ort.SessionOptions) -> ort.OrtEpDevice:
    """Add the device of a load to the options of its session, and return it.

    Raises:
        LoadRefused: `device_unavailable`.
    """
    devices = _list_devices(target.library)
    device = devices.get(target.name)
    if device is None:
        there = ", ".join(devices)
        raise LoadRefused("device_unavailable", f"{target.name} is not there any more; there is {there}")
    chosen.add_provider_for_devices([device], {**_openvino_options(target, threads), **target.options})
    chosen.add_session_config_entry(*RECORD_NODES)
    return device


def count_operators(
    session: ort.InferenceSession, target: TargetDevice, device: ort.OrtEpDevice
) -> tuple[ProviderOperators, ...]:
    """Return how many operators of a session's graph run on its device, and then how many on the CPU, if any.

    Raises:
        LoadRefused: `fallback_refused`, some do not run on the device, and may not run elsewhere.
    """
    placed: dict[bool, list[str]] = {True: [], False: []}
    for part in session.get_provider_graph_assignment_info():
        placed[part.ep_name == target.library.ep_name] += [each.op_type for each in part.get_nodes()]
    ours, others = len(placed[True]), len(placed[False])
    if others and not target.falls_back:
        reason = f"{others} of the {ours + others} nodes of its graph do not run on {target.name}"
        advice = f'load it with fallback "{CPU}" to run them on the CPU'
        raise LoadRefused("fallback_refused", f"{reason}: {_list_operators(placed[False])}; {advice}")
    count = ProviderOperators(target.library.provider, _version_of(device), ours)
    return (count, ProviderOperators(CPU, ort.__version__, others)) if others else (count,)


def check_tensors(target: TargetDevice, specs: Iterable[TensorSpec]) -> None:
    """Refuse a model with tensors that the device's provider spoils.

    OpenVINO's plugin (1.8.1) takes operators on strings, and then frees memory of others (measured).

    Raises:
        LoadRefused: `invalid_model`.
    """
    name = next((spec.name for spec in specs if spec.datatype == "BYTES"), None)
    if target.library.provider == OPENVINO and name is not None:
        reason = f"{name!r} is a tensor of strings, which {target.name} does not support"
        raise LoadRefused("invalid_model", f"{reason}: load the model on {CPU}")


def _register(library: ProviderLibrary) -> list[ort.OrtEpDevice]:
    ort.register_execution_provider_library(library.ep_name, library.path)
    return _list_own(library)


def _list_own(library: ProviderLibrary) -> list[ort.OrtEpDevice]:
    """Return the devices of a provider; those of `OpenVINOExecutionProvider.AUTO`, say, are not its own."""
    return [each for each in ort.get_ep_devices() if each.ep_name == library.ep_name]


def _openvino_options(target: TargetDevice, threads: int) -> dict[str, str]:
    """Return the options by which OpenVINO keeps the model's precision, and on the CPU so many threads.

    By itself it computes in bfloat16 where the processor has that: outputs of a CNN then differ from ONNX
    Runtime's by 4e-3 of the largest one, and with this by 6e-7 (measured). With one thread, it has to be the
    calling one, without a stream: where the plugin (1.8.1) makes a thread for it, it drops errors of a run,
    and answers with the outputs of the run before (measured).
    """
    if target.library.provider != OPENVINO:
        return {}
    kind = target.name.partition(":")[2].partition(".")[0]
    chosen: dict[str, object] = {"EXECUTION_MODE_HINT": "ACCURACY"}
    usable = min(threads, len(os.sched_getaffinity(0)))
    if kind == CPU and usable > 1:
        chosen |= {"INFERENCE_NUM_THREADS": usable, "ENABLE_HYPER_THREADING": True}
    elif kind == CPU:
        chosen |= {"NUM_STREAMS": 0}
    return {"load_config": json.dumps({kind.upper(): chosen})}


def _version_of(device: ort.OrtEpDevice) -> str:
    return str(device.ep_metadata.get("version") or ort.__version__)


def _list_operators(operators: Sequence[str]) -> str:
    counts = Counter(operators).most_common()
    named = [f"{operator} ({count})" for operator, count in counts[:MOST_OPERATORS]]
    more = len(counts) - len(named)
    return ", ".join(named + ([f"{more} operators more"] if more else []))
