"""What a CPU is told by, on texts as the kernel writes them."""

from pathlib import Path

import pytest

from runtime.prepared.cpu import cpu_features

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
    """Return what a machine with such a text is told by."""
    proc = tmp_path / f"proc-{len(list(tmp_path.iterdir()))}"
    proc.mkdir()
    (proc / "cpuinfo").write_text("\n".join(processors))
    return cpu_features(proc)


def cpu(text: str, **changes: str) -> str:
    return text.format(**FIRST | changes)


@pytest.mark.parametrize("text", [X86, ARM], ids=["x86", "arm"])
@pytest.mark.parametrize("change", ["model", "flags"])
def test_another_model_or_other_features_are_another_cpu(tmp_path: Path, text: str, change: str) -> None:
    first = machine(tmp_path, cpu(text))
    assert machine(tmp_path, cpu(text)) == first
    assert machine(tmp_path, cpu(text, **{change: FIRST[change] + "9"})) != first


@pytest.mark.parametrize("text", [X86, ARM], ids=["x86", "arm"])
def test_what_changes_while_a_cpu_is_what_it_is_does_not_count(tmp_path: Path, text: str) -> None:
    first = machine(tmp_path, cpu(text))
    changed = cpu(text, microcode="0x2", mhz="800.001", number="3", flags="avx512f fpu avx2")
    assert machine(tmp_path, changed) == first
    assert machine(tmp_path, cpu(text), changed) == first


def test_small_cores_beside_large_ones_are_seen_in_any_order(tmp_path: Path) -> None:
    large, small = cpu(ARM, model="0xd4d"), cpu(ARM, model="0xd46", flags="fp asimd")
    both = machine(tmp_path, large, small)
    assert machine(tmp_path, small, large, small) == both
    assert both not in {machine(tmp_path, large), machine(tmp_path, small)}


def test_machines_that_do_not_say_are_all_the_same(tmp_path: Path) -> None:
    nothing = cpu_features(tmp_path / "nowhere")
    assert machine(tmp_path, "") == machine(tmp_path, "Hardware\t: a board\n", "\x00\xff: \n") == nothing
    assert machine(tmp_path, cpu(X86)) != nothing


def test_this_machine_says_what_it_is() -> None:
    assert cpu_features() == cpu_features()
    assert cpu_features() != cpu_features(Path("/nowhere"))
