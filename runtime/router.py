"""Who answers for a model: taken from the recorded state at each request, so routing moves with its event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from events.log import Log
from events.models import Model, ModelState
from runtime.consumer.loads import RunningLoad
from runtime.errors import QueueFull, RuntimeProblem, WorkerDied
from runtime.process.requests import Answer
from runtime.process.worker import Worker
from runtime.repository import Repository
from runtime.wire import Tensor, TensorSpec, WantedOutput


class ModelNotLoaded(RuntimeProblem):
    """The model is not loaded."""

    code = "model_not_loaded"


class ModelUnloading(RuntimeProblem):
    """The model is being unloaded and takes no more requests."""

    code = "model_unloading"


class ModelRecovering(ModelNotLoaded):
    """The model lost its worker and is being loaded again."""


class ModelReplaced(ModelRecovering):
    """The model is being replaced by another version, for which it had to go first."""


class OtherVersionLoaded(ModelNotLoaded):
    """The version that is named is not the one that is loaded."""


class Question(Protocol):
    """What a model is asked."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The inputs."""

    @property
    def outputs(self) -> tuple[WantedOutput, ...]:
        """The outputs that are wanted; none means all that are tensors."""

    @property
    def text(self) -> bool:
        """Whether all come as JSON, where none are named."""


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """Who answers for a model, and what stands behind it: `position` is that of its `ModelLoaded`."""

    model_id: str
    version: int
    position: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: RunningLoad

    @property
    def max_batch_size(self) -> int:
        """How many may run together along the batch dimension; 0 if the model was loaded without one."""
        return self.load.parameters.max_batch_size

    @property
    def source(self) -> str:
        """Name the load behind an answer, for the header that leads from it to the ledger."""
        return f"{self.model_id}/{self.version};position={self.position}"

    def worker(self, max_queue: int) -> Worker:
        """Return the worker that has the least to do.

        Raises:
            QueueFull: `inference_queue_full`, they have as much to do as they may.
        """
        workers = self.load.serving
        if len(workers) == 1:
            worker = workers[0]
            in_flight = worker.in_flight
        else:
            worker = min(workers, key=_in_flight)
            in_flight = sum(map(_in_flight, workers))
        if in_flight >= max_queue:
            raise QueueFull(f"{max_queue} inferences of model '{self.model_id}' are queued or running")
        return worker


class Router:
    """Finds the worker of a model, in the recorded state and among the live loads."""

    def __init__(
        self,
        log: Log,
        live: Mapping[str, RunningLoad],
        repository: Repository,
        *,
        max_queue: int,
    ) -> None:
        self._log = log
        self._live = live
        self._repository = repository
        self._max_queue = max_queue
        self._routes: dict[str, tuple[Model, ModelRoute]] = {}

    async def infer(
        self, model_id: str, version: int | None, question: Question, timeout_s: float
    ) -> tuple[ModelRoute, Answer]:
        """Run one inference, at most `timeout_s` seconds; cancelling this stops the run.

        What waited behind the inference that its worker died of is tried once more, when the model is back.

        Raises:
            QueueFull: `inference_queue_full`.
            RuntimeProblem: what `route` raises, or the worker answered.
        """
        began_ns = time.monotonic_ns()
        route = self.route(model_id, version)
        try:
            try:
                answer = await self._ask(route, question, timeout_s)
            except WorkerDied as death:
                left_s = timeout_s - (time.monotonic_ns() - began_ns) / 1e9
                if death.begun or left_s <= 0:
                    raise
                route, left_s = await self._recovered(model_id, version, left_s, death)
                answer = await self._ask(route, question, left_s)
        except BaseException as error:  # who gave up has used the model, too
            route.load.last_used_ns = ended_ns = time.monotonic_ns()
            if isinstance(error, RuntimeProblem):
                route.load.statistics.failure(ended_ns - began_ns)
            raise
        route.load.last_used_ns = ended_ns = time.monotonic_ns()
        route.load.statistics.success(answer[0], ended_ns - began_ns, time.time_ns() // 10**6)
        return route, answer

    def _ask(self, route: ModelRoute, question: Question, timeout_s: float) -> Awaitable[Answer]:
        worker = route.worker(self._max_queue)
        return worker.infer(question.tensors, question.outputs, text=question.text, timeout_s=timeout_s)

    async def _recovered(
        self, model_id: str, version: int | None, timeout_s: float, death: WorkerDied
    ) -> tuple[ModelRoute, float]:
        """Wait until the model serves again; return who does, and the seconds that are left then.

        Raises:
            WorkerDied: `worker_died`, the one that was waited out, if it takes too long.
            ModelNotLoaded: it does not come back.
        """
        wakeup = self._log.subscribe()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(ends_at):
                while True:
                    wakeup.clear()
                    with suppress(ModelRecovering):
                        return self.route(model_id, version), ends_at - loop.time()
                    await wakeup.wait()
        except TimeoutError:
            raise death from None
        finally:
            self._log.unsubscribe(wakeup)

    async def route_or_why(self, model_id: str, version: int | None = None) -> ModelRoute:
        """Return who answers for the model now; only a refusal looks into the repository.

        Raises:
            UnknownModel: `unknown_model`, it is neither loaded nor in the repository.
            ModelNotLoaded: `model_not_loaded`; it may be on its way (`ModelRecovering`).
            OtherVersionLoaded: `model_not_loaded`, another version is.
            ModelUnloading: `model_unloading`.
        """
        try:
            return self.route(model_id, version)
        except ModelNotLoaded:
            model = self._log.state.models.get(model_id)
            if model is None or model.state in (ModelState.UNLOADED, ModelState.FAILED):
                await asyncio.to_thread(self._repository.versions, model_id)
            raise

    def is_ready(self, model_id: str, version: int | None = None) -> bool:
        """Whether `route` would name somebody."""
        try:
            self.route(model_id, version)
        except (ModelNotLoaded, ModelUnloading):
            return False
        return True

    def route(self, model_id: str, version: int | None = None) -> ModelRoute:
        """Return who answers for the model now.

        Raises:
            ModelNotLoaded: `model_not_loaded`; it may be on its way (`ModelRecovering`).
            OtherVersionLoaded: `model_not_loaded`, another version is.
            ModelUnloading: `model_unloading`.
        """
        model = self._log.state.models.get(model_id)
        known = self._routes.get(model_id)
        if known is None or known[0] is not model:
            known = self._remember(model_id, model)
        route = known[1]
        if version not in (None, route.version):
            raise OtherVersionLoaded(
                f"version {version} of model '{model_id}' is not loaded, version {route.version} is; "
                f'load it with POST /api/v1/models/{model_id}/load and body {{"version": {version}}}',
            )
        if not route.load.serving:
            if route.load.draining:
                raise ModelUnloading(f"model '{model_id}' is being unloaded")
            raise ModelRecovering(
                f"the worker of model '{model_id}' has just died; it is being started again"
            )
        return route

    def _remember(self, model_id: str, model: Model | None) -> tuple[Model, ModelRoute]:
        """Make the route of a model that is loaded; it holds as long as the recorded model is this one."""
        self._routes.pop(model_id, None)
        serving = model.serving if model is not None else None
        if model is None or serving is None or model.phase is not ModelState.LOADED:
            raise _absent(model_id, model)
        load = self._live.get(serving.load_job_id)
        if load is None or load.report is None:
            raise ModelRecovering(
                f"the worker of model '{model_id}' has just died; it is being started again"
            )
        inputs, outputs = load.report.inputs, load.report.outputs
        route = ModelRoute(model_id, serving.version, serving.position, inputs, outputs, load)
        self._routes[model_id] = known = (model, route)
        return known


def _absent(model_id: str, model: Model | None) -> RuntimeProblem:
    state = model.state if model is not None else ModelState.UNLOADED
    if model is not None and model.previous is not None:
        return ModelReplaced(f"model '{model_id}' is being replaced by another version")
    if state is ModelState.UNLOADING:
        return ModelUnloading(f"model '{model_id}' is being unloaded")
    if model is not None and model.phase is ModelState.LOST:
        return ModelRecovering(f"model '{model_id}' lost its worker and is being loaded again")
    if state is ModelState.LOADING:
        return ModelNotLoaded(f"model '{model_id}' is still loading")
    return ModelNotLoaded(
        f"model '{model_id}' is not loaded; load it with POST /api/v1/models/{model_id}/load"
    )


def _in_flight(worker: Worker) -> int:
    return worker.in_flight
