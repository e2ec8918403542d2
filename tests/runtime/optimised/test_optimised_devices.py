"""Optimised models for a device: what its provider compiled, tried and used there, and on no other device."""

import asyncio
from pathlib import Path

import pytest
from msgspec import UNSET
from msgspec.structs import replace
from onnx import ModelProto, helper
from support import models
from support.openvino import DEVICE, openvino_path
from support.optimised import found, key_in, opened
from support.running import Engine, running
from support.workers import LAYERS, answer, tensor, until

from events.jobs import JobStatus
from events.types import LoadedFile, LoadParameters, LoadStarted, ModelLoaded, contents_of, digest_of
from runtime.devices import Devices
from runtime.errors import LoadRefused
from runtime.optimised.key import describe_target, make_key
from runtime.optimised.optimiser import KEPT, LEFT_OUT, Candidate, Optimiser
from runtime.optimised.store import Manifest, OptimisedStore
from runtime.process.pool import WorkerPool
from runtime.repository import Repository
from runtime.store.versions import Versions
from runtime.wire import FoundDevice, Load, Optimise, ProviderLibrary, ProviderNodes, TargetDevice

EP_NAME = "OpenVINOExecutionProvider"
FILES = [f"model_{EP_NAME}.bin", "model.onnx"]
ROW = tensor("x", "FP32", [[0.5] * 250])
FOUND = FoundDevice(DEVICE, "1.8.1", "a CPU")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ProviderLibrary:
    package = openvino_path(tmp_path_factory.mktemp("openvino")) / "onnxruntime_ep_openvino"
    return ProviderLibrary("openvino", str(package / "libonnxruntime_providers_openvino_plugin.so"), EP_NAME)


@pytest.fixture
def target(library: ProviderLibrary, pool: WorkerPool) -> TargetDevice:
    """OpenVINO on the CPU, which the pool knows."""
    pool.devices = Devices(found={DEVICE: FOUND}, libraries={"openvino": library})
    pool.applied_to_devices = pool.applied  # else OpenVINO finds other instructions of the processor
    return TargetDevice(DEVICE, library)


@pytest.fixture
def store(tmp_path: Path) -> OptimisedStore:
    return opened(tmp_path / "store")


@pytest.fixture
def optimiser(store: OptimisedStore, pool: WorkerPool, tmp_path: Path) -> Optimiser:
    return Optimiser(store, pool, Versions(Repository(tmp_path), None), lambda: None)


@pytest.fixture
def _all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have any measurement pass: this machine may be busy."""
    monkeypatch.setattr("runtime.optimised.trial.verdict", lambda _: None)
    monkeypatch.setattr("runtime.optimised.trial.RUN_S", 0.01)


def candidate(root: Path, device: TargetDevice | None) -> Candidate:
    files = found(root / "m" / "1")
    loaded = tuple(LoadedFile(file.path, file.bytes, file.mtime_ns, file.sha256) for file in files)
    return Candidate("m", 1, loaded, 100 * 10**6, device=device)


async def attempt(optimiser: Optimiser, offered: Candidate) -> None:
    """Offer a version, and attempt to optimise it if it became a candidate."""
    optimiser.offer(offered)
    await asyncio.gather(*optimiser._tasks)
    optimiser.allow(allowed=True)
    await until(lambda: optimiser.running is None)


def load_of(root: Path, target: TargetDevice, **changes: object) -> Load:
    folder = root / "m" / "1"
    size = sum(path.stat().st_size for path in folder.iterdir())
    return replace(Load(str(root), str(folder), size, 1, layers=LAYERS, device=target), **changes)


def partly_supported() -> ModelProto:
    """Return a model of five nodes, of which OpenVINO does not support the third."""
    scale = helper.make_node("Scaler", ["b"], ["c"], domain="ai.onnx.ml", offset=[0.5], scale=[2.0])
    nodes = [helper.make_node(*each) for each in (("Relu", ["x"], ["a"]), ("Exp", ["a"], ["b"]))]
    nodes += [scale, helper.make_node("Tanh", ["c"], ["d"]), helper.make_node("Neg", ["d"], ["y"])]
    shape = [None, 4]
    made = models.model(nodes, [models.value("x", 1, shape)], [models.value("y", 1, shape)], [])
    made.graph.value_info.append(models.value("c", 1, shape))
    made.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    return made


@pytest.mark.usefixtures("_all_pass")
async def test_optimised_model_of_device_answers_as_its_original(
    optimiser: Optimiser, target: TargetDevice, pool: WorkerPool, tmp_path: Path
) -> None:
    models.save(models.weights(2), tmp_path, "m")
    await attempt(optimiser, offered := candidate(tmp_path, target))
    assert optimiser.counts.attempts == {KEPT: 1}
    optimised = optimiser.find(offered.files, target)
    assert optimised is not None
    assert [file.path for file in found(optimised.folder)] == sorted(FILES)
    assert optimised.placed == (ProviderNodes("openvino", optimised.placed[0].version, 8),)
    answers = []
    for order in (load_of(tmp_path, target), load_of(tmp_path, target, optimised=optimised)):
        worker = await pool.start("w")
        report = await worker.load(order, lambda _: None)
        assert report.placed == optimised.placed
        answers.append(await answer(worker, ROW))
    assert answers[0] == answers[1]


@pytest.mark.usefixtures("_all_pass")
async def test_device_and_cpu_have_optimised_models_of_their_own(
    optimiser: Optimiser, target: TargetDevice, store: OptimisedStore, tmp_path: Path
) -> None:
    models.save(models.weights(1), tmp_path, "m")
    on_cpu, on_device = candidate(tmp_path, None), candidate(tmp_path, target)
    await attempt(optimiser, on_device)
    assert (optimiser.find(on_cpu.files), optimiser.find(on_cpu.files, target) is None) == (None, False)
    await attempt(optimiser, on_cpu)
    found_on = [optimiser.find(on_cpu.files, each) for each in (None, target)]
    assert len({each.sha256 for each in found_on if each is not None}) == 2
    assert store.use(key_in(tmp_path, "m")) == found_on[0]
    assert {each.device for each in store.entries()} == {UNSET, DEVICE}


def test_key_of_device_differs_by_all_that_it_depends_on(library: ProviderLibrary) -> None:
    target = TargetDevice(DEVICE, library)
    changes = [
        (target, FOUND),
        (replace(target, falls_back=True), FOUND),
        (replace(target, name=f"{DEVICE}.1"), FOUND),
        (replace(target, library=replace(library, ep_name="Other")), FOUND),
        (target, replace(FOUND, version="1.8.2")),
        (target, replace(FOUND, hardware="another CPU")),
    ]
    keys = {make_key("", describe_target(*each)) for each in changes} | {make_key("")}
    assert len(keys) == len(changes) + 1
    assert make_key("", describe_target(replace(target, options={"a": "b"}), FOUND)) in keys


async def test_device_with_own_memory_or_gone_has_none(
    optimiser: Optimiser, target: TargetDevice, pool: WorkerPool, tmp_path: Path
) -> None:
    """An attempt reserves none of that memory."""
    models.save(models.add(), tmp_path, "m")
    for devices in ({DEVICE: replace(FOUND, pci_bus_id="0000:01:00.0")}, {}):
        pool.devices = Devices(found=devices, libraries=pool.devices.libraries)
        await attempt(optimiser, offered := candidate(tmp_path, target))
        assert optimiser.find(offered.files, target) is None
    assert optimiser.counts.attempts == {}


@pytest.mark.usefixtures("_all_pass")
async def test_nodes_on_cpu_are_counted_as_in_the_original(
    optimiser: Optimiser, target: TargetDevice, pool: WorkerPool, tmp_path: Path
) -> None:
    models.save(partly_supported(), tmp_path, "m")
    falls_back = replace(target, falls_back=True)
    await attempt(optimiser, offered := candidate(tmp_path, falls_back))
    assert optimiser.find(offered.files, target) is None
    optimised = optimiser.find(offered.files, falls_back)
    assert optimised is not None
    assert [(each.provider, each.nodes) for each in optimised.placed] == [("openvino", 4), ("cpu", 1)]
    worker = await pool.start("w")
    report = await worker.load(load_of(tmp_path, falls_back, optimised=optimised), lambda _: None)
    assert report.placed == optimised.placed


async def test_model_that_device_cannot_compile_is_left_out(
    optimiser: Optimiser, target: TargetDevice, store: OptimisedStore, tmp_path: Path
) -> None:
    shape = [None, 4]
    scale = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.5], scale=[2.0])
    unsupported = models.model([scale], [models.value("x", 1, shape)], [models.value("y", 1, shape)], [])
    unsupported.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    models.save(unsupported, tmp_path, "m")
    await attempt(optimiser, candidate(tmp_path, replace(target, falls_back=True)))
    assert optimiser.counts.attempts == {LEFT_OUT: 1}
    [entry] = store.entries()
    assert "Unable to compile any nodes" in str(entry.reason)


async def test_damaged_context_is_refused_in_words(
    pool: WorkerPool, target: TargetDevice, store: OptimisedStore, tmp_path: Path
) -> None:
    models.save(models.add(), tmp_path, "m")
    draft = store.draft()
    order = load_of(tmp_path, target)
    optimise = Optimise(
        order.root, order.folder, order.bytes, 1, None, str(draft), layers=LAYERS, device=target
    )
    worker = await pool.start("w")
    await worker.execute(optimise)
    (draft / FILES[0]).write_bytes(b"no context")
    _, optimised = store.seal(Manifest(key="0" * 64, model_id="m", version=1), draft)
    worker = await pool.start("w")
    with pytest.raises(LoadRefused) as refused:
        await worker.load(replace(order, optimised=optimised), lambda _: None)
    assert refused.value.code == "invalid_model"


@pytest.mark.usefixtures("_all_pass", "target")
async def test_load_on_device_uses_its_prepared_model(
    pool: WorkerPool, store: OptimisedStore, tmp_path: Path
) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    there, elsewhere = (DEVICE, "cpu"), ("cpu", DEVICE)
    async with running(tmp_path, pool=pool, store=store) as engine:
        first = await load(engine, there)
        await until(lambda: bool(store.entries()) and engine.consumer.optimiser.running is None)
        [entry] = store.entries()
        assert (first.prepared, entry.reason, entry.device) == (None, None, DEVICE)
        again = await load(engine, there)
        assert again.prepared is not None
        assert (again.prepared.sha256, again.devices) == (entry.sha256, first.devices)
        assert await engine.ask("m", 3) == 4
        assert (await load(engine, elsewhere)).prepared is None


async def test_broken_prepared_model_is_dropped_in_the_same_job(
    target: TargetDevice, pool: WorkerPool, store: OptimisedStore, tmp_path: Path
) -> None:
    models.save(models.add(1), tmp_path / "models", "m")
    async with running(tmp_path, pool=pool) as engine:
        loaded = await load(engine, (DEVICE,))
        await engine.unload("m")
    key = make_key(digest_of(contents_of(loaded.files)), describe_target(target, FOUND))
    draft = store.draft()
    (draft / "model.onnx").write_bytes(b"no model")
    sealed, _ = store.seal(Manifest(key=key, model_id="m", version=1, device=DEVICE), draft)
    store.keep(sealed, draft)
    async with running(tmp_path, pool=pool, store=store) as engine:
        again = await load(engine, (DEVICE,))
        assert (again.prepared, again.devices) == (None, loaded.devices)
        await until(lambda: store.entries()[0].reason is not None)
        assert len(await engine.facts(LoadStarted)) == 3


async def load(engine: Engine, devices: tuple[str, ...]) -> ModelLoaded:
    """Load the model anew on the first of these devices that has room."""
    model = engine.log.state.models.get("m")
    if model is not None and model.serving is not None:
        await engine.unload("m")
    job = await engine.load("m", parameters=LoadParameters(devices=devices))
    assert job.status is JobStatus.COMPLETED, job.error
    return (await engine.facts(ModelLoaded, of="m"))[-1]
