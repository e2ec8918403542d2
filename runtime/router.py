"""Routing: finds the worker of an inference in the recorded state, so that routing moves with its event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import msgspec

from events.log import Log
from events.models import Model, ModelState
from events.nodes import Node
from runtime.consumer.running import RunningLoad
from runtime.errors import QueueFull, RuntimeProblem, WorkerDied
from runtime.filesystem import REQUEST_LIMIT_S, RepositoryBusy
from runtime.process.requests import Answer
from runtime.process.sharedmemory import Region
from runtime.process.worker import Worker
from runtime.repository import Repository
from runtime.statistics import InferenceTimes
from runtime.wire import Outcome, Tensor, TensorSpec, WantedOutput


class ModelNotLoaded(RuntimeProblem):
    """The model is not loaded."""

    code = "model_not_loaded"


class ModelUnloading(RuntimeProblem):
    """The model is being unloaded and takes no more inferences."""

    code = "model_unloading"


class ModelRecovering(ModelNotLoaded):
    """The model lost its worker and is being reloaded."""


class ModelReplaced(ModelRecovering):
    """The model is being replaced in place: the old version was unloaded first."""


class OtherVersionLoaded(ModelNotLoaded):
    """Another version than the named one is loaded."""


class NodeAway(ModelNotLoaded):
    """This node has not renewed its lease: its models may be loaded at other nodes; ask one of them."""


class ModelElsewhere(ModelNotLoaded):
    """The model is loaded at another node."""

    def __init__(self, model_id: str, node_id: str) -> None:
        super().__init__(f"model '{model_id}' is loaded at node '{node_id}', not here")


class InferenceRequest(msgspec.Struct, frozen=True, gc=False):
    """A decoded request.

    Without `outputs`, all outputs are requested. `text` is the form of those that are not listed: JSON, or
    else binary. `timeout_us` is the client's timeout in microseconds, or None. `region` is
    where binary tensors lie, if that is the memory that a worker shares.
    """

    id: str | None
    timeout_us: int | None
    tensors: tuple[Tensor, ...]
    outputs: tuple[WantedOutput, ...] = ()
    text: bool = False
    region: Region | None = None


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """The running load that answers for a model; `position` is that of its `ModelLoaded`."""

    model_id: str
    version: int
    position: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: RunningLoad

    @property
    def max_batch_size(self) -> int:
        """Requests that may run together; 0 without batching."""
        return self.load.parameters.max_batch_size

    @property
    def source(self) -> str:
        """The load behind an answer, for the response header that refers to the ledger."""
        return f"{self.model_id}/{self.version};position={self.position}"

    def count_answer(self, outcome: Outcome, times: InferenceTimes) -> None:
        """Count an answered inference, now that its response is written."""
        # The load's statistics of now: they are replaced when it ends.
        statistics, now_ms = self.load.statistics, time.time_ns() // 10**6
        statistics.count_success(outcome, times, time.monotonic_ns(), now_ms)

    def worker(self, max_queue: int, region: Region | None = None) -> Worker:
        """Return the worker in whose memory the inputs lie, or that with the fewest inferences.

        Raises:
            QueueFull: `inference_queue_full`.
        """
        workers = self.load.serving
        if len(workers) == 1:
            worker = workers[0]
            in_flight = worker.in_flight
        else:
            worker = _find_holder(workers, region) or min(workers, key=_in_flight)
            in_flight = sum(map(_in_flight, workers))
        if in_flight >= max_queue:
            raise QueueFull(f"{max_queue} inferences of model '{self.model_id}' are queued or running")
        return worker


class Router:
    """Finds the load of a model among the running ones; the repository only says why there is none.

    At most `max_queue` inferences of one model may be queued or running. `node_id` is this node, and
    `may_serve` says whether it may answer; None for a server alone, which always may. `untrusted` returns the
    nodes to which nothing may be sent.
    """

    def __init__(
        self,
        log: Log,
        loads: Mapping[str, RunningLoad],
        repository: Repository,
        *,
        max_queue: int,
        node_id: str | None = None,
        may_serve: Callable[[], bool] = lambda: True,
        untrusted: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._may_serve = may_serve
        self._untrusted = untrusted
        self._log = log
        self._loads = loads
        self._repository = repository
        self._max_queue = max_queue
        self._node_id = node_id
        self._routes: dict[str, tuple[Model, ModelRoute]] = {}

    async def infer(
        self,
        model_id: str,
        version: int | None,
        request: InferenceRequest,
        timeout_s: float,
        times: InferenceTimes,
    ) -> tuple[ModelRoute, Answer]:
        """Run one inference, at most `timeout_s` seconds; cancelling this stops the run.

        Inferences that were queued when their worker died are repeated once, when the model is reloaded. A
        failure is counted; the caller counts an answer with `ModelRoute.count_answer` when it is written.

        Args:
            model_id: the model.
            version: the version that must serve; None is any.
            request: the inputs.
            timeout_s: its limit.
            times: of this request; what happens here is added.

        Raises:
            QueueFull: `inference_queue_full`.
            RuntimeProblem: what `route` raises, or the worker answered.
        """
        times.asked_ns = began_ns = time.monotonic_ns()
        route = self.route(model_id, version)
        try:
            try:
                answer = await self._ask(route, request, timeout_s)
            except WorkerDied as death:
                left_s = timeout_s - (time.monotonic_ns() - began_ns) / 1e9
                if death.begun or left_s <= 0:
                    raise
                route, left_s = await self._wait_for_recovery(model_id, version, left_s, death)
                times.asked_ns = time.monotonic_ns()
                times.waited_ns += times.asked_ns - began_ns
                answer = await self._ask(route, request, left_s)
        except BaseException as error:  # a cancelled request is a use, too
            route.load.last_used_ns = ended_ns = time.monotonic_ns()
            if isinstance(error, RuntimeProblem):
                route.load.statistics.count_failure(ended_ns - times.arrived_ns)
            raise
        route.load.last_used_ns = times.answered_ns = time.monotonic_ns()
        return route, answer

    def _ask(self, route: ModelRoute, request: InferenceRequest, timeout_s: float) -> Awaitable[Answer]:
        region = request.region
        worker = route.worker(self._max_queue, region)
        return worker.infer(
            request.tensors, request.outputs, text=request.text, timeout_s=timeout_s, region=region
        )

    def reserve(self, model_id: str, version: int | None, count: int) -> Region | None:
        """Return shared memory for a request of so many bytes, of the worker that has the least to do.

        Returns None if there is none: the request is sent without, or refused when it is routed.
        """
        try:
            workers = self.route(model_id, version).load.serving
        except RuntimeProblem:
            return None
        return min(workers, key=_expected).tensor_memory.requests.reserve(count)

    async def _wait_for_recovery(
        self, model_id: str, version: int | None, timeout_s: float, death: WorkerDied
    ) -> tuple[ModelRoute, float]:
        """Wait until the model serves again; return its route and the remaining seconds.

        Raises:
            WorkerDied: `worker_died`, the given one, if that takes too long.
            ModelNotLoaded: the model is not reloaded.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        try:
            with self._log.subscribed() as wakeup:
                async with asyncio.timeout_at(ends_at):
                    while True:
                        wakeup.clear()
                        with suppress(ModelRecovering):
                            return self.route(model_id, version), ends_at - loop.time()
                        await wakeup.wait()
        except TimeoutError:
            raise death from None

    def find_node(self, model_id: str) -> Node | None:
        """Return the present, trusted node at which a model is loaded; None if there is none, or no nodes."""
        state = self._log.state
        model = state.models.get(model_id)
        serving = model.serving if model is not None and model.phase is ModelState.LOADED else None
        if self._node_id is None or serving is None or serving.node_id is None:
            return None
        node = state.nodes.get(serving.node_id)
        return None if node is None or not node.is_present or node.id in self._untrusted() else node

    def find_other_node(self, model_id: str) -> Node | None:
        """Return the other node at which a model is loaded; None if it is loaded here, or nowhere."""
        node = self.find_node(model_id)
        return None if node is None or node.id == self._node_id else node

    async def find_route(self, model_id: str, version: int | None = None) -> ModelRoute:
        """Return the route of a model; a refusal also checks whether the repository has the model.

        Raises:
            UnknownModel: `unknown_model`, neither loaded nor in the repository.
            RuntimeProblem: what `route` raises.
        """
        try:
            return self.route(model_id, version)
        except ModelNotLoaded:
            model = self._log.state.models.get(model_id)
            if model is None or model.state in (ModelState.UNLOADED, ModelState.FAILED):
                look = partial(self._repository.versions, model_id)
                with suppress(RepositoryBusy):
                    await self._repository.file_system.run(model_id, look, REQUEST_LIMIT_S)
            raise

    def is_ready(self, model_id: str, version: int | None = None) -> bool:
        try:
            self.route(model_id, version)
        except (ModelNotLoaded, ModelUnloading):
            return False
        return True

    def route(self, model_id: str, version: int | None = None) -> ModelRoute:
        """Return the route of a model.

        Raises:
            ModelNotLoaded: `model_not_loaded`; `ModelRecovering` while it is being reloaded.
            ModelElsewhere: `model_not_loaded`, it is loaded at another node.
            NodeAway: `model_not_loaded`, this node may not answer.
            OtherVersionLoaded: `model_not_loaded`, another version is.
            ModelUnloading: `model_unloading`.
        """
        model = self._log.state.models.get(model_id)
        known = self._routes.get(model_id)
        if known is None or known[0] is not model:
            known = self._make_route(model_id, model)
        route = known[1]
        if not self._may_serve():
            raise NodeAway
        if version not in (None, route.version):
            raise OtherVersionLoaded(
                f"version {version} of model '{model_id}' is not loaded, version {route.version} is; "
                f'load it with POST /api/v1/models/{model_id}/load and body {{"version": {version}}}',
            )
        if not route.load.serving:
            if route.load.draining:
                raise ModelUnloading(f"model '{model_id}' is being unloaded")
            raise _recovering_error(model_id)
        return route

    def _make_route(self, model_id: str, model: Model | None) -> tuple[Model, ModelRoute]:
        """Make and cache the route of a loaded model, until its recorded state changes."""
        self._routes.pop(model_id, None)
        serving = model.serving if model is not None else None
        if model is None or serving is None or model.phase is not ModelState.LOADED:
            raise _not_loaded_error(model_id, model)
        node = self.find_other_node(model_id)
        if node is not None:
            raise ModelElsewhere(model_id, node.id)
        load = self._loads.get(serving.load_job_id)
        if load is None or load.report is None:
            raise _recovering_error(model_id)
        inputs, outputs = load.report.inputs, load.report.outputs
        route = ModelRoute(model_id, serving.version, serving.position, inputs, outputs, load)
        self._routes[model_id] = known = (model, route)
        return known


def _not_loaded_error(model_id: str, model: Model | None) -> RuntimeProblem:
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


def _recovering_error(model_id: str) -> ModelRecovering:
    return ModelRecovering(f"the worker of model '{model_id}' has just died; it is being started again")


def _in_flight(worker: Worker) -> int:
    return worker.in_flight


def _expected(worker: Worker) -> int:
    """Return how many inferences a worker has, with those whose bodies are still arriving."""
    return worker.in_flight + worker.tensor_memory.requests.regions


def _find_holder(workers: Sequence[Worker], region: Region | None) -> Worker | None:
    if region is None:
        return None
    return next((each for each in workers if each.tensor_memory.requests is region.memory), None)
