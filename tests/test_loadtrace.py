"""The way of a load through the product is short."""

import re
import subprocess
import sys

from tools.loadtrace import BESIDE, ROOT

MOST_MODULES = 56
"""It is 55, and one more while the files of the load before are synced: those of features are small, and none
belongs to another one's."""
PART = re.compile(r"^(\S.*): (\d+) modules\n((?:  .+\n)+)", re.MULTILINE)


def test_load_enters_few_modules() -> None:
    """In a process of its own: what the garbage collector closes of other tests would count as entered."""
    command = [sys.executable, "-m", "tools.loadtrace"]
    shown = subprocess.check_output(command, cwd=ROOT, timeout=120, text=True)
    found = {name: (int(count), modules) for name, count, modules in PART.findall(shown)}
    assert found.pop(BESIDE, None), shown
    assert len(found) == 2, shown
    for count, modules in found.values():
        assert {"loads", "log"} <= set(modules.split())
        assert count <= MOST_MODULES, shown
