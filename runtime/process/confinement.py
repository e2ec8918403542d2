"""Confinement of workers as the server sees it: which layers they apply, and what that does not prevent.

A throw-away worker applies the layers that this kernel has, and then tries forbidden things
(`runtime.worker.confine`). Workers of later loads apply the same layers, or end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from events.types import Confinement
from runtime.errors import RuntimeProblem, WorkerDied
from runtime.process.worker import Worker
from runtime.timeouts import FORK_LIMIT_S, timeout
from runtime.wire import ForbiddenAct, Layer, Probe, Probed

REQUIRE, OFF = "require", "off"
"""Modes: serve only if all forbidden acts are prevented; apply no layer. `auto` applies what there is."""
ALL_LAYERS: tuple[Layer, ...] = get_args(Layer)
ALL_ACTS: tuple[ForbiddenAct, ...] = get_args(ForbiddenAct)

IN_WORDS: Mapping[str, str] = {
    "read_files": "read files of this user",
    "write_files": "write files of this user",
    "use_network": "use the network",
    "start_processes": "start processes",
    "read_memory": "read the memory of other processes",
}


class NotConfined(RuntimeProblem):
    """Workers cannot be confined as --confine=require demands."""

    code = "not_confined"


@dataclass(frozen=True, slots=True)
class AppliedLayers:
    """The layers that every worker applies, and what is recorded about them."""

    layers: tuple[Layer, ...]
    confinement: Confinement
    problems: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what `require` does not allow.

        Raises:
            NotConfined: `not_confined`, something forbidden was not prevented.
        """
        if self.confinement.mode == REQUIRE and self.confinement.not_prevented:
            raise NotConfined(
                f"--confine=require: {describe(self.confinement)}{self.reasons}; allow Landlock and seccomp"
                " on this machine and in its containers, or give --confine=auto"
            )

    @property
    def reasons(self) -> str:
        """Why layers were not applied, in parentheses; empty if all were."""
        return f" ({'; '.join(self.problems)})" if self.problems else ""


UNCONFINED = AppliedLayers((), Confinement(OFF, 0, seccomp=False, not_prevented=ALL_ACTS))


def describe(confinement: Confinement) -> str:
    """Return in a sentence what confines the workers, and what it does not prevent."""
    applied = [f"Landlock {confinement.landlock_abi}"] if confinement.landlock_abi else []
    applied += ["seccomp"] if confinement.seccomp else []
    how = f"confined by {' and '.join(applied)}" if applied else "not confined"
    can = ", ".join(IN_WORDS[act] for act in confinement.not_prevented)
    return f"workers are {how}" + (f": a model that takes over its worker could {can}" if can else "")


async def probe(worker: Worker, mode: str, outside: Path) -> AppliedLayers:
    """Have a throw-away worker find out what can be applied, and what that does not prevent.

    Args:
        worker: it ends by itself.
        mode: `auto`, `require` or `off`.
        outside: a folder that no worker needs; nothing is left there.
    """
    order = Probe(str(outside), () if mode == OFF else ALL_LAYERS)
    try:
        async with timeout(FORK_LIMIT_S):
            found: Probed = await worker.execute(order)
    except (WorkerDied, TimeoutError) as error:
        said = "; ".join([str(error) or "the worker did not answer", *worker.stderr_tail()])
        found = Probed(0, (), ALL_ACTS, (f"the test failed: {said}",))
    recorded = Confinement(mode, found.landlock_abi, "seccomp" in found.layers, found.succeeded)
    return AppliedLayers(found.layers, recorded, found.problems)
