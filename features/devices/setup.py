"""The devices of this server as its operator and callers see them: limits, refusals, and what is used.

The drivers of devices are asked for their memory, which takes a millisecond or two, or for ever: see
`features.devices.found`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

from aiohttp import web

from answers.models import DeviceUseInfo
from answers.resources import ConfinementInfo, Device
from events.serving import Serving
from features.devices.found import (
    DEVICES_LIMIT_S,
    DeviceMemory,
    Devices,
    DeviceUnavailable,
    measure_memory,
    query_memory,
)
from features.devices.names import ANY, CPU, provider_of
from features.devices.room import DeviceUsage, limit_device, list_device_usage
from features.devices.wire import FoundDevice
from runtime.process.confinement import REQUIRE, describe
from runtime.process.pool import WorkerPool
from runtime.rooms import RoomLimits
from server.appkeys import CONSUMER, LIMIT, POLICY, POOL
from server.config import Config, ConfigError, parse_budget
from server.http.answers import show, show_optional
from server.observability.timeseries import measure

Gauge = tuple[str, str, Mapping[Any, float], str]
"""Name, text, values, and labels of a metric."""
ON_DEVICES = "workers of loads on devices"
DEFAULT_BUDGET = "90%"
"""Of a device's own memory: the rest is for fragments of it, and for other processes of the machine."""


def withhold_devices(pool: WorkerPool) -> None:
    """Leave out devices on hardware that another has, and all if --confine=require demands better workers."""
    _withhold_same_hardware(pool)
    confinement, found = pool.targets.applied.confinement, pool.targets.found
    if confinement.mode != REQUIRE or not confinement.not_prevented:
        return
    how = f"{describe(confinement, ON_DEVICES)}; --confine=require-cpu allows it"
    problems = (f"{name}: --confine=require: {how}" for name in sorted(set(map(provider_of, found))))
    pool.targets = replace(pool.targets, found={}, problems=(*pool.targets.problems, *problems))


def _withhold_same_hardware(pool: WorkerPool) -> None:
    """Leave out all devices on one hardware but the first: their loads would share its memory."""
    used, found, problems = dict[str, str](), dict[str, FoundDevice](), list[str]()
    for name, device in pool.targets.found.items():
        first = used.setdefault(device.pci_bus_id or name, name)
        if first == name:
            found[name] = device
        else:
            problems.append(f"{name}: is the same hardware as {first}, which is used")
    pool.targets = replace(pool.targets, found=found, problems=(*pool.targets.problems, *problems))


def choose_targets(config: Config) -> Devices:
    """Return the devices that a server may use, before they are found."""
    return Devices(visible=config.visible_device_names)


async def limit_devices(config: Config, pool: WorkerPool, machine_bytes: int) -> Mapping[str, RoomLimits]:
    """Return the limits of each device that is not withheld, whose driver says how much memory there is.

    One that does not answer is a problem of the pool's devices, and its device has no memory of its own.

    Raises:
        ConfigError: a setting names a device that is not here.
    """
    withhold_devices(pool)
    _check_settings(config, pool.targets)
    limits, budgets = dict[str, RoomLimits](), config.device_budgets
    for name, device in pool.targets.found.items():
        memory, text = await _query_memory(pool, device), budgets.get(name)
        text = text or (None if memory is None else DEFAULT_BUDGET)
        own_bytes = machine_bytes if memory is None else memory.total_bytes
        budget_bytes = None if text is None else parse_budget(text, own_bytes)
        limits[name] = limit_device(name, budget_bytes, has_memory=memory is not None)
    return limits


async def _query_memory(pool: WorkerPool, device: FoundDevice) -> DeviceMemory | None:
    try:
        return await query_memory(device, DEVICES_LIMIT_S)
    except TimeoutError:
        problem = f"{device.name}: its driver does not answer"
        pool.targets = replace(pool.targets, problems=(*pool.targets.problems, problem))
        return None


def _check_settings(config: Config, devices: Devices) -> None:
    visible = {name for name in config.visible_device_names if ANY not in name} - {CPU}
    for flag, named in (("--visible-devices", visible), ("--device-memory", config.device_budgets.keys())):
        if missing := sorted(named - devices.found.keys()):
            there = "; ".join([", ".join(devices.found) or "only the CPU", *devices.problems])
            raise ConfigError(
                f"{flag}: {', '.join(missing)} is not a device of this server, which has {there}"
            )
    if config.ledger is None and config.default_devices != (CPU,):  # with a ledger, others may have them
        try:
            devices.find_candidates(config.default_devices)
        except DeviceUnavailable as problem:
            raise ConfigError(f"--devices: {problem}") from None


def describe_setup(pool: WorkerPool, limits: Mapping[str, RoomLimits]) -> Iterator[str]:
    """Yield a sentence about each device, about what confines their workers, and about each problem."""
    for problem in pool.targets.problems:
        is_used = problem.partition(": ")[0] in pool.targets.found
        yield f"{'device' if is_used else 'no device of'} {problem}"
    if pool.targets.found:
        yield describe(pool.targets.applied.confinement, ON_DEVICES)
    for name, device in pool.targets.found.items():
        budget = limits[name].budget_bytes
        memory = "no memory budget" if budget is None else f"budget {budget} bytes"
        provider = f"{device.hardware or 'no name'}, provider {provider_of(name)} {device.version}"
        yield f"device {name}: {provider}, {memory}"


async def read_device_memory(app: web.Application) -> Mapping[str, DeviceMemory]:
    """Return the memory of the devices that have their own, now, and whose driver says it."""
    has_memory = [name for name, limits in app[POLICY].rooms.items() if limits.is_measured]
    found = app[POOL].targets.found
    read = {name: await measure_memory(found[name]) for name in has_memory}
    return {name: memory for name, memory in read.items() if memory is not None}


def list_devices(app: web.Application, memory: Mapping[str, DeviceMemory]) -> list[Device]:
    """Return the CPU and all devices with their use, as the API has them.

    Args:
        app: the application.
        memory: of the devices that have their own.
    """
    consumer, limit = app[CONSUMER], app[LIMIT]
    taken, on_cpu = measure(consumer, limit), {use.model_id for use in consumer.uses() if use.device is None}
    cpu = Device(
        device=CPU,
        provider=CPU,
        version=_find_version(),
        hardware="",
        total_bytes=limit.bytes,
        free_bytes=None,
        budget_bytes=taken.budget_bytes,
        reserved_bytes=taken.reserved_bytes,
        used_bytes=taken.used_bytes,
        models=len(on_cpu),
    )
    uses = list_device_usage(consumer.loads.values(), consumer.policy.rooms)
    return [cpu, *(_describe_device(app, use, memory.get(use.device)) for use in uses)]


def _describe_device(app: web.Application, use: DeviceUsage, own: DeviceMemory | None) -> Device:
    device = app[POOL].targets.found[use.device]
    return Device(
        device=use.device,
        provider=provider_of(use.device),
        version=device.version,
        hardware=device.hardware,
        total_bytes=None if own is None else own.total_bytes,
        free_bytes=None if own is None else own.free_bytes,
        budget_bytes=app[POLICY].rooms[use.device].budget_bytes,
        reserved_bytes=use.reserved_bytes,
        used_bytes=use.used_bytes,
        models=use.models,
    )


async def read_resources(app: web.Application) -> Mapping[str, Any]:
    """Return the members of `Resources` about devices."""
    memory, targets = await read_device_memory(app), app[POOL].targets
    confinement = targets.applied.confinement if targets.found else None
    return {
        "devices": list_devices(app, memory),
        "device_problems": list(targets.problems),
        "confinement_of_devices": show_optional(confinement, ConfinementInfo),
    }


async def read_gauges(app: web.Application) -> Sequence[Gauge]:
    """Return the metrics of devices but the CPU."""
    return list_gauges(list_devices(app, await read_device_memory(app))[1:])


def list_gauges(devices: Sequence[Device]) -> Sequence[Gauge]:
    kinds = ("total", "free", "budget", "reserved", "used")
    memory = {(each.device, kind): getattr(each, f"{kind}_bytes") for each, kind in product(devices, kinds)}
    return (
        (
            "device_memory_bytes",
            "Memory of a device but the CPU: total and free, as its driver says, budget, reserved and used.",
            {labels: size for labels, size in memory.items() if size is not None},
            "device kind",
        ),
        (
            "device_models",
            "Models that have a process on a device but the CPU.",
            {each.device: each.models for each in devices},
            "device",
        ),
    )


def show_load(load: Serving | None) -> Mapping[str, Any]:
    """Return the members of `ModelInfo` about the devices of a load."""
    return {"devices": show(load.targets or (), list[DeviceUseInfo]) if load else []}


@cache
def _find_version() -> str:
    """Return the version of ONNX Runtime, which is installed under one of two names."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
