"""Making an optimised model in a worker: its files, refusals, limits, and the alignment of its weights."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from onnx import ModelProto, TensorProto, helper
from support import models
from support.history import PLAIN
from support.models import save
from support.optimised import execute, in_background, optimise_order
from support.workers import computing, refusal, until

from runtime import wire
from runtime.errors import Exit, LoadRefused, WorkerDied
from runtime.process.pool import WorkerPool
from runtime.worker import optimising
from runtime.worker.optimising import FILES, align_weights


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a model `m` of eight layers, 2 MB."""
    save(models.weights(2), tmp_path / "models", "m")
    return tmp_path / "models"


def target_of(order: wire.Optimise) -> Path:
    return Path(order.target)


async def test_written_files_are_complete_and_private(pool: WorkerPool, root: Path) -> None:
    order = optimise_order(root)
    await execute(pool, order)
    assert {path.name for path in target_of(order).iterdir()} == {"model.onnx", "weights.bin"}
    assert {path.stat().st_mode & 0o777 for path in target_of(order).iterdir()} == {0o600}


async def test_target_folder_must_exist_and_be_empty(pool: WorkerPool, root: Path) -> None:
    order = optimise_order(root)
    ours = target_of(order) / "model.onnx"
    ours.write_text("ours")
    assert (await refusal(pool, order)).code == "optimise_failed"
    assert ours.read_text() == "ours"
    ours.rename(target_of(order).parent / "away")
    target_of(order).rmdir()
    refused = await refusal(pool, order)
    assert (refused.code, str(order.target) in str(refused)) == ("optimise_failed", True)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of this size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=60).returncode:
        pytest.skip("only who may mount has a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("megabytes", "spare", "fits"),
    [(40, 5, False), (40, 7, True), (8, 8, True)],
    ids=["full", "fits", "small"],
)
async def test_disk_reserve_is_kept_free(
    pool: WorkerPool, tmp_path: Path, megabytes: int, spare: int, *, fits: bool
) -> None:
    """Its files have 2 MB, a third of the room; a twentieth of the disk is reserved."""
    save(models.weights(1, layers=4), tmp_path / "models", "m")
    order = optimise_order(tmp_path / "models")
    with small_disk(target_of(order).parent, megabytes):
        target_of(order).mkdir()
        others, reserve = target_of(order).parent / "others", megabytes * 2**20 // 20
        free = os.statvfs(order.target).f_bavail * os.statvfs(order.target).f_frsize
        others.write_bytes(bytes(max(0, free - reserve - spare * 10**6)))
        if fits:
            await execute(pool, order)
        else:
            refused = await refusal(pool, order)
            assert (refused.code, "has room for files of" in str(refused)) == ("disk_full", True)
        used = os.statvfs(order.target)
        assert used.f_bavail * used.f_frsize >= reserve


REFUSED: dict[str, tuple[Callable[[], ModelProto | bytes], dict[str, Any], str, str]] = {
    "file too long": (lambda: models.weights(2), {"most_bytes": 10**6}, "optimise_failed", "1000000 bytes"),
    "folded weights too long": (models.grown, {}, "optimise_failed", "a file of it has more than"),
    "memory": (models.memory_bomb_on_load, {"memory_limit_bytes": 200_000_000}, "out_of_memory", "200000000"),
    "data outside": (lambda: models.external("../../secret"), {}, "unsafe_file", "secret"),
    "no model": (lambda: models.CORRUPT, {}, "optimise_failed", "copy it again"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_optimising_is_refused_with_code(pool: WorkerPool, tmp_path: Path, case: str) -> None:
    build, changes, code, words = REFUSED[case]
    model = build()
    models.save_bytes(
        model if isinstance(model, bytes) else model.SerializeToString(), tmp_path / "models", "m"
    )
    (tmp_path / "models" / "secret").write_bytes(models.external_bytes())
    order = replace(optimise_order(tmp_path / "models"), **changes)
    refused = await refusal(pool, order)
    assert (refused.code, words in str(refused)) == (code, True), refused
    written = [path.stat().st_size for path in target_of(order).iterdir()]
    assert max(written, default=0) <= min(order.most_bytes or 64 * 2**20, 64 * 2**20)


async def test_kill_while_optimising_is_a_death(pool: WorkerPool, tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(models.slow_model(), root, "m")
    worker = await pool.start("w")
    preparing = asyncio.ensure_future(worker.execute(optimise_order(root)))
    await until(computing(worker.pid))
    await until(lambda: in_background(worker.pid))
    worker.kill()
    with pytest.raises(WorkerDied):
        await preparing
    assert worker.ended.result() == Exit(None, signal.SIGKILL)


def weight(name: str, offset: int, data: bytes, packed: str | None = None) -> TensorProto:
    """Make a tensor of bytes that lie in another file."""
    tensor = TensorProto(
        name=name, data_type=TensorProto.UINT8, dims=[len(data)], data_location=TensorProto.EXTERNAL
    )
    entries = {"location": "unaligned.bin", "offset": str(offset), "length": str(len(data))}
    if packed is not None:
        entries["prepacked_0"] = packed
    for key, text in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return tensor


def with_weights(tensors: list[TensorProto], inner: list[TensorProto]) -> onnx.ModelProto:
    """Put weights into a graph, and others into a branch of it."""
    branch = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], [f"{tensor.name}_out"]) for tensor in inner],
        "branch",
        [],
        [models.value(f"{tensor.name}_out", TensorProto.UINT8, [None]) for tensor in inner],
        inner,
    )
    node = helper.make_node("If", ["go"], ["y"], then_branch=branch, else_branch=branch)
    outputs = [models.value("y", TensorProto.UINT8, [None])]
    return models.model([node], [models.value("go", models.BOOL, [])], outputs, tensors)


def write_files(folder: Path, model: bytes, weights: bytes) -> None:
    """Write an optimised model as ONNX Runtime does, in files that are there."""
    for name, content in zip(FILES, (model, b"", weights), strict=True):
        (folder / name).write_bytes(content)


def align(
    folder: Path, content: bytes, tensors: list[TensorProto], inner: list[TensorProto] | None = None
) -> onnx.ModelProto:
    """Align the weights of a graph and of a branch of it, which `unaligned.bin` has; returns the model."""
    model = with_weights(tensors, inner or [])
    write_files(folder, model.SerializeToString(), content)
    align_weights(folder)
    moved: onnx.ModelProto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert without_places(moved) == without_places(model)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "weights.bin"]
    return moved


def without_places(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    branches = [attribute.g for attribute in copy.graph.node[0].attribute]
    for tensor in [tensor for graph in (copy.graph, *branches) for tensor in graph.initializer]:
        tensor.ClearField("external_data")
    return copy


def external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@PLAIN
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=8), gap=st.integers(0, 70), inside=st.data()
)
def test_weights_are_aligned_and_keep_their_content(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], gap: int, inside: st.DataObject
) -> None:
    folder, content, tensors = tmp_path_factory.mktemp("optimised"), b"", []
    for number, length in enumerate(lengths):
        content += bytes(gap)
        data, packed = bytes([number + 1]) * length, bytes([number + 101]) * (length // 2)
        offset, behind = len(content), len(content) + length
        entry = f"MatMul+1|{behind};{len(packed)};0|{offset};{length};0"
        tensors.append(weight(f"w{number}", offset, data, entry if inside.draw(st.booleans()) else None))
        content += data + packed
    split = inside.draw(st.integers(0, len(tensors)))
    moved = align(folder, content, tensors[:split], tensors[split:])
    branch = moved.graph.node[0].attribute[0].g.initializer
    written = (folder / "weights.bin").read_bytes()
    for number, tensor in enumerate([*moved.graph.initializer, *branch]):
        places = [f"{external(tensor)['offset']};{external(tensor)['length']};0"]
        fills = [number + 1]
        if "prepacked_0" in external(tensor):
            packed_as, *blobs = external(tensor)["prepacked_0"].split("|")
            assert packed_as == "MatMul+1"
            places, fills = [*places, *blobs], [number + 1, number + 101, number + 1]
        for place, fill in zip(places, fills, strict=True):
            offset, length, _ = map(int, place.split(";"))
            assert offset % 64 == 0
            assert written[offset : offset + length] == bytes([fill]) * length


def test_long_weights_start_at_a_page(tmp_path: Path) -> None:
    long = bytes(2**20)
    moved = align(tmp_path, b"12345" + long, [weight("a", 0, b"12345"), weight("b", 5, long)])
    assert [external(tensor)["offset"] for tensor in moved.graph.initializer] == ["0", "4096"]


@PLAIN
@given(
    places=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6),
    piece=st.integers(1, 70),
)
def test_overlapping_weights_are_moved_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]], piece: int
) -> None:
    folder, content = tmp_path_factory.mktemp("optimised"), bytes(range(120))
    tensors = [weight(f"w{at}", offset, bytes(length)) for at, (offset, length) in enumerate(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimising, "PIECE_BYTES", piece)
        moved = align(folder, content, tensors)
    written = (folder / "weights.bin").read_bytes()
    for (offset, length), tensor in zip(places, moved.graph.initializer, strict=True):
        place = int(external(tensor)["offset"])
        assert written[place : place + length] == content[offset : offset + length]


def test_graph_without_weights_file_is_unchanged(tmp_path: Path) -> None:
    write_files(tmp_path, models.CORRUPT, b"")
    (tmp_path / "unaligned.bin").unlink()
    align_weights(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [models.CORRUPT]


@pytest.mark.parametrize(
    "tensor",
    [
        models.external_tensor("w", "other.bin"),
        weight("w", 7, bytes(10)),
        weight("w", 0, bytes(4), "MatMul+1|0;4"),
        weight("w", 0, bytes(4), "MatMul+1|0;4;0;0"),
        weight("w", 0, bytes(4), "MatMul+1|8;4;0"),
        weight("w", -1, bytes(4)),
    ],
    ids=["elsewhere", "beyond_the_end", "short_packed", "long_packed", "packed_beyond_the_end", "negative"],
)
def test_weights_written_in_unknown_ways_are_refused(tmp_path: Path, tensor: TensorProto) -> None:
    with pytest.raises(LoadRefused) as refused:
        align(tmp_path, bytes(10), [tensor])
    assert refused.value.code == "optimise_failed"


def test_group_beside_weights_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, models.add().SerializeToString() + b"\xa3\x06\x08\x01\xa4\x06", b"w")
    with pytest.raises(LoadRefused, match="a group") as refused:
        align_weights(tmp_path)
    assert refused.value.code == "optimise_failed"


@PLAIN
@given(data=st.binary(max_size=60))
def test_any_bytes_are_aligned_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("optimised")
    write_files(folder, b"\x3a" + bytes([len(data)]) + data, b"w")
    with contextlib.suppress(LoadRefused):
        align_weights(folder)
