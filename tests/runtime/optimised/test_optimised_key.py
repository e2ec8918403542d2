"""The key of an optimised model: the CPU and the ONNX Runtime that a worker has."""

import mmap
import os
import subprocess
from pathlib import Path

import pytest
from support.history import child

from runtime.optimised.key import cpu_features, runtime_was_replaced

X86 = """\
processor	: {number}
vendor_id	: GenuineIntel
cpu family	: 6
model		: {model}
model name	: A CPU @ 2.60GHz
stepping	: 7
microcode	: {microcode}
cpu MHz		: {mhz}
core id		: {number}
flags		: {flags}
bogomips	: 5187.81
"""
ARM = """\
processor	: {number}
BogoMIPS	: 243.75
Features	: {flags}
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: {model}
CPU revision	: 1
"""
FIRST = {"number": "0", "model": "85", "microcode": "0x1", "mhz": "2600.000", "flags": "fpu avx2 avx512f"}


def machine(tmp_path: Path, *processors: str) -> str:
    """Return the features of a machine whose /proc/cpuinfo has these processors."""
    proc = tmp_path / f"proc-{len(list(tmp_path.iterdir()))}"
    proc.mkdir()
    (proc / "cpuinfo").write_text("\n".join(processors))
    return cpu_features(proc)


def cpu(text: str, **changes: str) -> str:
    return text.format(**FIRST | changes)


@pytest.mark.parametrize("text", [X86, ARM], ids=["x86", "arm"])
def test_cpu_differs_by_model_and_features_only(tmp_path: Path, text: str) -> None:
    first = machine(tmp_path, cpu(text))
    for change in ("model", "flags"):
        assert machine(tmp_path, cpu(text, **{change: FIRST[change] + "9"})) != first
    same = cpu(text, microcode="0x2", mhz="800.001", number="3", flags="avx512f fpu avx2")
    assert machine(tmp_path, same) == machine(tmp_path, cpu(text), same) == first


def test_cpu_covers_all_cores_in_any_order(tmp_path: Path) -> None:
    large, small = cpu(ARM, model="0xd4d"), cpu(ARM, model="0xd46", flags="fp asimd")
    both = machine(tmp_path, large, small)
    assert machine(tmp_path, small, large, small) == both
    assert both not in {machine(tmp_path, large), machine(tmp_path, small)}


def test_unknown_cpus_are_equal(tmp_path: Path) -> None:
    nothing = cpu_features(tmp_path / "nowhere")
    assert machine(tmp_path, "") == machine(tmp_path, "Hardware\t: a board\n", "\x00\xff: \n") == nothing
    assert machine(tmp_path, cpu(X86)) != nothing
    assert cpu_features() == cpu_features() != nothing


KEYS = """
import os
from pathlib import Path
from runtime.optimised.key import make_key
folder = Path(sys.argv[1], "onnxruntime", "capi")
def key(name, data, mtime):
    (folder / name).write_bytes(data)
    os.utime(folder, ns=(mtime, mtime))  # as a new file of another name would
    return make_key([])
says = "build_and_package_info.py"
keys = [
    key("libonnxruntime.so.1.31.1", b"12", 1),
    key(says, b"package_name = 'onnxruntime'", 2),
    key(says, b"package_name = 'onnxruntime-gpu'", 3),
    key("libonnxruntime.so.1.31.1", b"123", 4),
]
assert len(set(keys)) == 4, keys
assert key("other.py", b"", 5) == keys[-1] == key("libonnxruntime.so.1.31.1", b"456", 6)
assert "onnxruntime" not in sys.modules
"""


def test_key_covers_the_onnxruntime_package(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    subprocess.run(child(KEYS, tmp_path, first=tmp_path), check=True)
    without = tmp_path / "without"
    without.mkdir()
    (without / "onnxruntime.py").touch()
    script = "from runtime.optimised.key import make_key; assert len(make_key([])) == 64"
    subprocess.run(child(script, first=without), check=True)


def test_replaced_library_is_found_in_mapped_files(tmp_path: Path) -> None:
    library = tmp_path / "onnxruntime" / "capi" / "libonnxruntime.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"1" * mmap.PAGESIZE)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert not runtime_was_replaced(os.getpid())
        library.unlink()
        assert runtime_was_replaced(os.getpid())
    assert not runtime_was_replaced(os.getpid())
    assert not runtime_was_replaced(1, tmp_path)  # no such process
