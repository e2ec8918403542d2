"""`make bench` runs through; what it measures says nothing here, beside other tests."""

import subprocess
import sys
from pathlib import Path

from support.process import clean_environment

ROOT = Path(__file__).parents[2]


def test_the_bench_measures_the_installed_server_and_prints_its_table() -> None:
    # Some seconds: a round of 54 MB networks, three of them thrown away, and two cycles of one.
    command = [sys.executable, "-m", "bench", "--repeats", "1", "--cycles", "1"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for column in ("what", "ours", "beside", "ratio", "goal", "reached"):
        assert column in text
    for row in (
        "first load, 54 MB network ÷ bare first session",
        "memory of the process tree, after 1 loads",
    ):
        assert row in text
    assert "median of 1" in text
