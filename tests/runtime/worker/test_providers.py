"""Loads on a device, with OpenVINO's plugin on the CPU: where nodes run, what is refused, inferences."""

import asyncio
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace
from support import models
from support.models import save
from support.openvino import DEVICE, openvino_path
from support.shims import require_compiler
from support.workers import LAYERS, answer, floats, load, order_of, refusal, running_pool, tensor, trips

from events.types import LoadParameters
from features.devices import found
from features.devices.providers import _openvino_options
from features.devices.wire import ProviderLibrary, TargetDevice
from runtime.errors import Exit, InferenceFailed, InferenceTimeout
from runtime.process.pool import WorkerPool
from runtime.repository import Repository, read_warm_up
from runtime.store.versions import HeldVersion, Versions
from runtime.wire import Load, Tensor
from runtime.worker.examples import MAX_EXAMPLE_BYTES

MB = 10**6
DIGITS = Path(__file__).parents[3] / "examples" / "digits"
LIMITED = """
import resource, sys
from features.devices.wire import ProviderLibrary, TargetDevice
from runtime.worker.sessions import limit_memory
for provider in sys.argv[1:]:
    target = TargetDevice("it:0", ProviderLibrary(provider, "/", "x"))
    limit_memory(2**30, mapped_bytes=0, threads=1, address_bytes=target.address_bytes)
    print(resource.getrlimit(resource.RLIMIT_AS)[1])
"""
MANY_TRIPS = 2**31 - 1
"""Hours of a loop. OpenVINO computes whole numbers with 32 bits on the CPU."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerPool]:
    """A pool with the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(openvino_path(tmp_path_factory.mktemp("plugin"))))
        async with running_pool(visible_devices=[DEVICE]) as pool:
            yield pool


def on_device(pool: WorkerPool, order: Load, *, falls_back: bool = False) -> Load:
    """Return the order to load on the device, confined as `WorkerPool.build_load` has it."""
    target = pool.targets.target(DEVICE, falls_back=falls_back, memory_bytes=None)
    return replace(order, target=target, layers=pool.targets.applied.layers)


def placed(report: Any) -> dict[str, int]:
    """Return how many nodes of a load run where."""
    return {each.provider: each.operators for each in report.placed}


async def test_throw_away_worker_finds_the_device(pool: WorkerPool) -> None:
    found = pool.targets.found[DEVICE]
    assert pool.targets.find_candidates([DEVICE, "cpu"]) == (DEVICE, "cpu")
    assert (found.version[:1].isdigit(), found.hardware != "", found.pci_bus_id) == (True, True, "")
    assert pool.targets.applied.layers == pool.applied.layers
    beyond = {*pool.targets.applied.confinement.not_prevented} - {*pool.applied.confinement.not_prevented}
    assert beyond == {"run_code"}


BEGIN = "__attribute__((constructor)) static void begin(void)"
BROKEN = {
    "missing": (None, "missing: its library cannot be registered: "),
    "aborts": (f"void abort(void); {BEGIN} {{ abort(); }}", "aborts: the test failed: "),
    "hangs": (
        f"int pause(void); {BEGIN} {{ for (;;) pause(); }}",
        "hangs: the test failed: the worker did not answer",
    ),
}
"""Code of providers' libraries, and what is said of each."""


async def test_provider_that_cannot_be_used_takes_no_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiler()
    for name, (code, _) in BROKEN.items():
        package = tmp_path / f"onnxruntime_ep_{name}"
        package.mkdir()
        library, source = package / "broken.so", tmp_path / "broken.c"
        says = f"def get_library_path(): return {str(library)!r}\ndef get_ep_name(): return 'Broken'\n"
        (package / "__init__.py").write_text(says)
        if code is not None:
            source.write_text(code)
            compiler = await asyncio.create_subprocess_exec("cc", "-shared", "-fPIC", "-o", library, source)
            assert await compiler.wait() == 0
    monkeypatch.syspath_prepend(str(openvino_path(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(found, "DEVICES_LIMIT_S", 3.0)
    async with running_pool(visible_devices=[DEVICE, *(f"{name}:*" for name in BROKEN)]) as pool:
        problems = sorted(pool.targets.problems)
        words = sorted(problem for _, problem in BROKEN.values())
        assert [problem.startswith(said) for problem, said in zip(problems, words, strict=True)] == [True] * 3
        assert DEVICE in pool.targets.found
        assert {*pool.applied.layers} == {*pool.targets.applied.layers} == {*LAYERS}
        could, could_beside = (
            each.confinement.not_prevented for each in (pool.targets.applied, pool.applied)
        )
        assert ("write_files" in could) == ("write_files" in could_beside)


async def test_load_on_device_reports_its_nodes(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.misaligned(), tmp_path, "m")
    worker, report = await load(pool, on_device(pool, order_of(tmp_path)))
    assert placed(report) == {"openvino": 3}
    assert report.placed[0].version == pool.targets.found[DEVICE].version
    assert report.warming_up_us is not None
    cpu, on_cpu = await load(pool, order_of(tmp_path))
    assert on_cpu.placed == ()
    given = tensor("x", "FP32", [[1.0] * 250])
    [here], [there] = await answer(worker, given), await answer(cpu, given)
    assert here == pytest.approx(there, abs=1e-5)


async def test_nodes_elsewhere_are_counted_where_they_may_be(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.optional_output(), tmp_path, "m")
    _, report = await load(pool, on_device(pool, order_of(tmp_path), falls_back=True))
    assert placed(report) == {"openvino": 1, "cpu": 3}
    assert [each.provider for each in report.placed] == ["openvino", "cpu"]


async def test_error_of_the_provider_is_one_clear_line(pool: WorkerPool, tmp_path: Path) -> None:
    shutil.copytree(DIGITS, tmp_path / "digits")
    refused = await refusal(pool, on_device(pool, order_of(tmp_path, "digits", 2), falls_back=True))
    assert refused.code == "invalid_model"
    assert re.search(
        r"^the device of the load does not take the model: load it on cpu. ONNX Runtime says: "
        r"While validating ONNX node '<Node.*>': Axis 1 out of the tensor",
        str(refused),
    ), str(refused)


MANY = models.identity(shape=(MAX_EXAMPLE_BYTES // 4 + 1,))
BAD_SIDES = tensor("x", "FP32", [0] * 6), tensor("sides", "INT64", [4, 4])


@pytest.mark.parametrize(
    ("model", "given", "code", "words"),
    [
        (
            models.optional_output(),
            (),
            "fallback_refused",
            r'^3 of the 4 nodes .* not run on openvino:cpu: Optional \(2\), If \(1\); .* fallback "cpu"',
        ),
        (
            models.strings(),
            (),
            "invalid_model",
            "^'x' is a tensor of strings, which openvino:cpu does not support: load the model on cpu$",
        ),
        (MANY, (), "warm_up_failed", "no inputs were found on which the model runs"),
        (models.reshape(), (), "warm_up_failed", "does not run on zeros or ones .*: the shape of input"),
        (
            models.reshape(),
            BAD_SIDES,
            "warm_up_failed",
            "gives as .*: correct them, or, for loads on the CPU, .*: the shape of input data",
        ),
    ],
)
async def test_load_on_device_is_refused(
    pool: WorkerPool, tmp_path: Path, model: Any, given: tuple[Tensor, ...], *, code: str, words: str
) -> None:
    save(model, tmp_path, "m")
    order = replace(order_of(tmp_path), warm_up_required=code != "warm_up_failed")
    order = on_device(pool, order, falls_back=code == "warm_up_failed")
    refused = await refusal(pool, order, *given)
    assert refused.code == code
    assert re.search(words, str(refused)), str(refused)


async def test_load_on_device_is_warmed_up_whatever_its_file_says(pool: WorkerPool, tmp_path: Path) -> None:
    folder = save(models.add(), tmp_path, "m")
    (folder.parent / "loadledger.toml").write_text("[warm_up]\nenabled = false\n")
    repository = Repository(tmp_path)
    warm_up = read_warm_up(repository, "m")
    target = pool.targets.target(DEVICE, falls_back=False, memory_bytes=None)
    files = HeldVersion(Versions(repository, None), "m", 1)
    orders = [pool.build_load(files, LoadParameters(), warm_up, device) for device in (None, target)]
    assert [(each.warm_up, each.target) for each in orders] == [(False, None), (True, target)]
    assert orders[1].layers == pool.targets.applied.layers


async def test_device_that_is_gone_is_unavailable(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.add(), tmp_path, "m")
    order = on_device(pool, order_of(tmp_path))
    assert order.target is not None
    refused = await refusal(pool, replace(order, target=replace(order.target, name="openvino:gpu")))
    assert (refused.code, str(refused)) == (
        "device_unavailable",
        "openvino:gpu is not there any more; there is openvino:cpu",
    )
    moved = replace(order.target, library=replace(order.target.library, path=f"{tmp_path}/moved.so"))
    refused = await refusal(pool, replace(order, target=moved))
    assert refused.code == "device_unavailable"
    assert str(refused).startswith("openvino: its library cannot be registered: ")


async def test_failed_inference_on_one_thread_is_no_earlier_answer(pool: WorkerPool, tmp_path: Path) -> None:
    """The plugin's own thread would drop the error, and answer with what the run before did."""
    save(models.reshape(), tmp_path, "m")
    x, good, bad = floats("x", *range(6)), [2, 3], [4, 4]
    worker, _ = await load(pool, on_device(pool, order_of(tmp_path)), x, tensor("sides", "INT64", good))
    for _ in range(2):
        with pytest.raises(InferenceFailed, match="the shape of input data"):
            await answer(worker, x, tensor("sides", "INT64", bad))
        assert await answer(worker, x, tensor("sides", "INT64", [3, 2])) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openvino:cpu", {"CPU": {"EXECUTION_MODE_HINT": "ACCURACY", "NUM_STREAMS": 0}}),
        ("openvino:gpu.1", {"GPU": {"EXECUTION_MODE_HINT": "ACCURACY"}}),
        ("tpu:cpu", None),
    ],
)
def test_openvino_alone_is_told_to_keep_precision_and_threads(name: str, options: object) -> None:
    target = TargetDevice(name, ProviderLibrary(name.partition(":")[0], "/", "x"))
    found = _openvino_options(target, 1)
    assert (json.loads(found["load_config"]) if options else found) == (options or {})


async def test_memory_limit_leaves_room_for_what_the_provider_maps(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.weights(2), tmp_path, "m")
    await load(pool, on_device(pool, order_of(tmp_path, load_limit_bytes=20 * MB)))


async def test_memory_limit_counts_data_and_addresses(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.filled(), tmp_path, "m")
    worker, _ = await load(pool, on_device(pool, order_of(tmp_path, memory_limit_bytes=300 * MB)))
    assert resource.prlimit(worker.pid, resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY
    assert resource.prlimit(worker.pid, resource.RLIMIT_DATA)[1] < 600 * MB
    with pytest.raises(InferenceFailed, match="Failed to allocate"):
        await answer(worker, tensor("count", "INT64", [150 * MB]))
    assert await answer(worker, tensor("count", "INT64", [4])) == [1.5] * 4


def test_addresses_of_drivers_have_no_limit() -> None:
    """In a process of its own, since the limit is for good."""
    command = [sys.executable, "-I", "-c", LIMITED, "cuda", "openvino"]
    limits = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert [int(limit) == resource.RLIM_INFINITY for limit in limits] == [True, False]


async def test_inference_that_ignores_its_cancellation_is_killed(pool: WorkerPool, tmp_path: Path) -> None:
    save(models.counting_loop(), tmp_path, "m")
    worker, _ = await load(pool, on_device(pool, order_of(tmp_path)))
    worker._in_flight.patience_s = 0.05
    with pytest.raises(InferenceTimeout):
        await worker.infer([trips(MANY_TRIPS)], timeout_s=0.05)
    assert await asyncio.shield(worker.ended) == Exit(None, signal.SIGKILL)
