"""The key of what is prepared holds the ONNX Runtime that workers have, wherever it came from."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

from runtime.prepared.key import runtime_was_replaced

KEYS = """
import os, sys
from pathlib import Path
from runtime.prepared.key import key_of
folder = Path(sys.argv[1], "onnxruntime", "capi")
def key(name, data, mtime):
    (folder / name).write_bytes(data)
    os.utime(folder, ns=(mtime, mtime))  # as a new file of another name would
    return key_of([], 1)
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


def run(script: str, *arguments: str) -> None:
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([*arguments, str(root)])
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script, *arguments], env=environment, check=True)


def test_the_package_that_is_imported_and_its_libraries_are_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    run(KEYS, str(tmp_path))


def test_a_process_whose_runtime_was_replaced_is_told_by_what_it_has_mapped(tmp_path: Path) -> None:
    library = tmp_path / "onnxruntime" / "capi" / "libonnxruntime.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"1" * mmap.PAGESIZE)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert not runtime_was_replaced(os.getpid())
        library.unlink()
        assert runtime_was_replaced(os.getpid())
    assert not runtime_was_replaced(os.getpid())


def test_without_the_package_there_is_a_key_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").touch()
    run("from runtime.prepared.key import key_of; assert len(key_of([], 1)) == 64", str(tmp_path))


def test_of_a_process_that_is_gone_nothing_was_replaced(tmp_path: Path) -> None:
    assert not runtime_was_replaced(1, tmp_path)
