"""`loadledger` where the kernel tells of no pressure: what waits for spare time goes on beside other tests.

Otherwise a model would be prepared when the machine that runs the tests has little else to do, or never.
"""

from pathlib import Path

from loadledger.cli.main import main
from runtime import memory


def unknown(
    proc: Path = memory.PROC,  # noqa: ARG001 - as `pressure` is called
    cgroups: Path = memory.CGROUPS,  # noqa: ARG001
) -> memory.Pressure | None:
    """Say what is said where the kernel does not tell."""
    return None


if __name__ == "__main__":
    memory.pressure = unknown
    main()
