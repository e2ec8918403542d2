"""SIGKILL and SIGSTOP of workers, the fork server and the server, at random moments under load."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from support.campaign import Attack, attacked
from support.fleet import Fleet, Source, check_ledger, new_dice, of_both
from support.traffic import traffic

from server.config import Config

LIVES = of_both(short=1, long=25)
ROUNDS = of_both(short=4, long=20)
"""Of each life of the server, which ends by SIGKILL, the last one by SIGTERM."""
PAUSE_S = 0.2
"""Between two rounds at most."""
STOP_S = 0.5
"""Most for which a process is stopped; the good model's worker is stopped until the server kills it."""
MODELS = 4


@dataclass
class Rounds:
    """Signals at random moments of one server's life."""

    attack: Attack
    dice: random.Random
    resumed: list[asyncio.Task[None]] = field(default_factory=list)

    def choose(self) -> list[Callable[[], Awaitable[None]]]:
        """Return what to do in each round; in the short form, some of it once."""
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self._kill_good: 12,
            self._kill_fork_server: 8,
            self._stop_server: 10,
            self._kill_other: 35,
            self._stop_other: 20,
            self._stop_fork_server: 10,
            self._stop_good: 5,
        }
        return of_both(
            short=list(kinds)[:ROUNDS], long=self.dice.choices([*kinds], [*kinds.values()], k=ROUNDS)
        )

    async def play(self, chosen: Callable[[], Awaitable[None]]) -> None:
        """Wait for a random moment, and hurt one process."""
        await asyncio.sleep(self.dice.uniform(0, PAUSE_S))
        await chosen()
        self.attack.counts[getattr(chosen, "__name__", "").strip("_").replace("_", " ")] += 1

    async def end(self) -> None:
        """Wait until no worker is stopped."""
        await asyncio.gather(*self.resumed)

    async def _kill_other(self) -> None:
        if workers := self.attack.other_workers():
            with suppress(ProcessLookupError):
                os.kill(self.dice.choice(workers), signal.SIGKILL)

    async def _stop_other(self) -> None:
        if workers := self.attack.other_workers():
            stopped = self._stop(self.dice.choice(workers), 4 * STOP_S)
            self.resumed.append(asyncio.create_task(stopped))

    async def _kill_good(self) -> None:
        async with self.attack.disturbing():
            await self.attack.kill(self.attack.good_worker)

    async def _stop_good(self) -> None:
        async with self.attack.disturbing():
            os.kill(self.attack.good_worker, signal.SIGSTOP)
            await self.attack.refused()

    async def _kill_fork_server(self) -> None:
        async with self.attack.disturbing():
            await self.attack.kill(self.attack.fork_server)

    async def _stop_fork_server(self) -> None:
        async with self.attack.disturbing():
            await self._stop(self.attack.fork_server, STOP_S)

    async def _stop_server(self) -> None:
        async with self.attack.disturbing():
            await self._stop(self.attack.server.pid, STOP_S)

    async def _stop(self, pid: int, most_s: float) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                await asyncio.sleep(self.dice.uniform(0, most_s))
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            finally:
                os.close(pidfd)


async def test_signals_at_random_moments_leave_good_model_serving(config: Config) -> None:
    dice, fleet = new_dice(), Fleet(config.repository, MODELS)
    accepted, sources = set[str](), set[Source]()  # of all lives
    for life in range(LIVES):
        async with attacked(config) as attack, traffic(attack, fleet, dice) as requests:
            rounds = Rounds(attack, dice)
            for chosen in rounds.choose():
                await rounds.play(chosen)
            await rounds.end()
            if life < LIVES - 1:
                async with attack.disturbing():
                    await attack.server.kill()
                attack.counts["kill server"] += 1
        accepted |= requests.accepted.keys()
        sources |= requests.sources
    ends, _ = await check_ledger(config, sources, failures=None)
    assert accepted <= ends.keys()
