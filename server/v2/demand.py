"""Load on demand: an inference for a model that is not loaded has it loaded, and waits, where that is on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtime.errors import InferenceTimeout
from runtime.leases import Leases
from runtime.router import ModelNotLoaded, ModelUnloading, OtherVersionLoaded
from server.v2.awaited import Awaited, Means


class Demand:
    """The models that inferences wait for.

    Args:
        means: what it takes to have them loaded.
        leases: held as long as an inference waits, and until it is answered.
        on: whether inferences have models loaded at all.
    """

    def __init__(self, means: Means, leases: Leases, *, on: bool) -> None:
        self._means = means
        self._leases = leases
        self._on = on
        self._awaited: dict[str, Awaited] = {}

    async def close(self) -> None:
        """End all waits; what was asked for goes on."""
        await asyncio.gather(*(awaited.close() for awaited in self._awaited.values()))

    def waiting(self, model_id: str) -> int:
        """Return how many inferences wait for a model."""
        awaited = self._awaited.get(model_id)
        return awaited.waiting if awaited is not None else 0

    @asynccontextmanager
    async def loaded(
        self, model_id: str, version: int | None, subject: str, ends_at_s: float
    ) -> AsyncIterator[None]:
        """Have a model loaded that nobody could be asked of, and keep it from being evicted meanwhile.

        On entry it can be asked, if it is asked at once.

        Args:
            model_id: which.
            version: the one that is named, or None.
            subject: who asks; the load is requested in the name of the first who does.
            ends_at_s: on the loop's clock, when the inference is given up.

        Raises:
            RuntimeProblem: where this is off, what `Router.route_or_why` raises.
            ModelNotLoaded: `model_not_loaded`, another version is loaded: that is not replaced on demand.
            InferenceTimeout: `inference_timeout`.
            Exception: what `Awaited.wait` raises.
        """
        if not self._on:
            await self._means.router.route_or_why(model_id, version)
            yield
            return
        with self._leases.hold(model_id):
            while not self._can_be_asked(model_id, version):
                await self._wait(model_id, version, subject, ends_at_s)
            yield

    def _can_be_asked(self, model_id: str, version: int | None) -> bool:
        try:
            self._means.router.route(model_id, version)
        except OtherVersionLoaded:
            raise
        except (ModelNotLoaded, ModelUnloading):
            return False
        return True

    async def _wait(self, model_id: str, version: int | None, subject: str, ends_at_s: float) -> None:
        awaited = self._awaited.get(model_id)
        if awaited is None:
            awaited = Awaited(model_id, self._means, lambda: self._forget(model_id))
            self._awaited[model_id] = awaited
        try:
            async with asyncio.timeout_at(ends_at_s):
                await awaited.wait(version, subject)
        except TimeoutError:
            told = f"model '{model_id}' could not be asked within the inference's time: {awaited.reason()}"
            raise InferenceTimeout(told) from None

    def _forget(self, model_id: str) -> None:
        self._awaited.pop(model_id, None)
