"""`loadledger` where the kernel tells of no pressure: what waits for spare time goes on beside other tests.

Otherwise a model would be prepared when the machine that runs the tests has little else to do, or never.
"""

from pathlib import Path

from loadledger.cli.main import main
from runtime import machine


def unknown(
    proc: Path = machine.PROC,  # noqa: ARG001 - as `pressure` is called
    cgroups: Path = machine.CGROUPS,  # noqa: ARG001
) -> machine.Pressure | None:
    """Say what is said where the kernel does not tell."""
    return None


if __name__ == "__main__":
    machine.pressure = unknown
    main()
