"""Confinement of workers as the server sees it: the layers that they apply, and what these do not prevent.

A throw-away worker applies the layers that this kernel has, and then tries forbidden acts
(`runtime.worker.confine`). Workers of later loads apply the same layers, or end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from events.values import Confinement
from features.wire import ACTS_IN_WORDS, FoundTarget, Library
from runtime.errors import RuntimeProblem, WorkerDied
from runtime.process.worker import Worker
from runtime.timeouts import timeout
from runtime.wire import ForbiddenAct, Layer, Probe, Probed

REQUIRE, REQUIRE_CPU, OFF = "require", "require-cpu", "off"
"""Modes: serve only if all forbidden acts are prevented, or all but those of workers with a target; apply no
layer. `auto` applies what there is."""
ALL_LAYERS: tuple[Layer, ...] = get_args(Layer)
ALL_ACTS: tuple[ForbiddenAct, ...] = get_args(ForbiddenAct)

IN_WORDS: Mapping[str, str] = {
    "read_files": "read files of this user",
    "write_files": "write files of this user",
    "use_network": "use the network",
    "start_processes": "start processes",
    "read_memory": "read the memory of other processes",
    "run_code": "run code of its own",
    "manage_server": "manage this server's tokens",
    **ACTS_IN_WORDS,
}


class NotConfined(RuntimeProblem):
    """Workers cannot be confined as --confine=require demands."""

    code = "not_confined"


@dataclass(frozen=True, slots=True)
class AppliedLayers:
    """The layers that every worker applies, and their record for the ledger.

    Attributes:
        layers: their names.
        confinement: how far they go.
        problems: why a layer was not applied, or a provider could not be used.
        targets: the targets that a provider has found in a worker with these layers.
    """

    layers: tuple[Layer, ...]
    confinement: Confinement
    problems: tuple[str, ...] = ()
    targets: tuple[FoundTarget, ...] = ()

    def check(self) -> None:
        """Refuse what `require` and `require-cpu` do not allow.

        Raises:
            NotConfined: `not_confined`, a forbidden act was not prevented.
        """
        mode = self.confinement.mode
        if mode in (REQUIRE, REQUIRE_CPU) and self.confinement.not_prevented:
            raise NotConfined(
                f"--confine={mode}: {describe(self.confinement)}{self.reasons}; allow Landlock and seccomp"
                " on this machine and in its containers, or give --confine=auto"
            )

    @property
    def reasons(self) -> str:
        """Why layers were not applied, in parentheses; empty if all were."""
        return f" ({'; '.join(self.problems)})" if self.problems else ""


UNCONFINED = AppliedLayers((), Confinement(OFF, 0, seccomp=False, not_prevented=ALL_ACTS))


def describe(confinement: Confinement, who: str = "workers") -> str:
    """Return in a sentence what confines the workers, and what it does not prevent.

    Args:
        confinement: that of these workers.
        who: the sentence's word for the workers, if they are not all.
    """
    applied = [f"Landlock {confinement.landlock_abi}"] if confinement.landlock_abi else []
    applied += ["seccomp"] if confinement.seccomp else []
    how = f"confined by {' and '.join(applied)}" if applied else "not confined"
    can = ", ".join(IN_WORDS[act] for act in confinement.not_prevented)
    return f"{who} are {how}" + (f": a model that takes over its worker could {can}" if can else "")


async def probe(
    worker: Worker, mode: str, outside: Path, provider: Library | None, limit_s: float
) -> AppliedLayers:
    """Have a throw-away worker find out which layers can be applied, and which acts they do not prevent.

    Args:
        worker: it ends by itself.
        mode: `auto`, `require`, `require-cpu` or `off`.
        outside: a folder that no worker needs; nothing is left there.
        provider: a provider of targets: the worker is confined like a load there, and finds them.
        limit_s: the time for the answer.
    """
    order = Probe(str(outside), () if mode == OFF else ALL_LAYERS, () if provider is None else (provider,))
    try:
        async with timeout(limit_s):
            found: Probed = await worker.execute(order)
    except (WorkerDied, TimeoutError) as error:
        said = "; ".join([str(error) or "the worker did not answer", *worker.stderr_tail()])
        tested = "" if provider is None else f"{provider.provider}: "
        found = Probed(0, (), ALL_ACTS, (f"{tested}the test failed: {said}",))
    recorded = Confinement(mode, found.landlock_abi, "seccomp" in found.layers, found.succeeded)
    return AppliedLayers(found.layers, recorded, found.problems, found.targets)


def weakest(probed: Sequence[AppliedLayers]) -> AppliedLayers:
    """Return the layers that all have in common, and the acts that any of them does not prevent."""
    confinements = [each.confinement for each in probed]
    return AppliedLayers(
        tuple(layer for layer in ALL_LAYERS if all(layer in each.layers for each in probed)),
        Confinement(
            confinements[0].mode,
            min(each.landlock_abi for each in confinements),
            seccomp=all(each.seccomp for each in confinements),
            not_prevented=tuple(
                act for act in ALL_ACTS if any(act in each.not_prevented for each in confinements)
            ),
        ),
    )
