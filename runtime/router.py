"""Who answers for a model: taken from the recorded state at each request, so routing moves with its event."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from events.log import Log
from events.models import Model, ModelState
from runtime.errors import RuntimeProblem
from runtime.live import LiveLoad
from runtime.repository import Repository
from runtime.wire import Tensor, TensorSpec
from runtime.workers import Worker


class ModelNotLoaded(RuntimeProblem):
    """The model is not loaded."""

    code = "model_not_loaded"


class ModelUnloading(RuntimeProblem):
    """The model is being unloaded and takes no more requests."""

    code = "model_unloading"


class InferenceTimeout(RuntimeProblem):
    """The inference did not end in time and was stopped."""

    code = "inference_timeout"


@dataclass(frozen=True, slots=True)
class Route:
    """The worker that answers, and what stands behind it: `position` is that of its `ModelLoaded`."""

    model_id: str
    version: int
    position: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    worker: Worker


class Router:
    """Finds the worker of a model, in the recorded state and among the live loads."""

    def __init__(self, log: Log, live: Mapping[str, LiveLoad], repository: Repository) -> None:
        self._log = log
        self._live = live
        self._repository = repository

    async def route_or_why(self, model_id: str, version: int | None = None) -> Route:
        """Return who answers for the model now; only a refusal looks into the repository.

        Raises:
            UnknownModel: `unknown_model`, it is neither loaded nor in the repository.
            ModelNotLoaded: `model_not_loaded`, or another version is.
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

    def route(self, model_id: str, version: int | None = None) -> Route:
        """Return who answers for the model now.

        Raises:
            ModelNotLoaded: `model_not_loaded`, or another version is.
            ModelUnloading: `model_unloading`.
        """
        model = self._log.state.models.get(model_id)
        serving = model.serving if model is not None else None
        if model is None or serving is None or model.phase is not ModelState.LOADED:
            raise _absent(model_id, model)
        if version not in (None, serving.version):
            raise ModelNotLoaded(
                f"version {version} of model '{model_id}' is not loaded, version {serving.version} is; "
                f'load it with POST /api/v1/models/{model_id}/load and body {{"version": {version}}}',
            )
        load = self._live.get(serving.load_job_id)
        if load is None or load.worker is None or load.report is None or load.gone:
            raise ModelNotLoaded(f"the worker of model '{model_id}' has just died; it is being started again")
        if load.draining:
            raise ModelUnloading(f"model '{model_id}' is being unloaded")
        report = load.report
        return Route(model_id, serving.version, serving.position, report.inputs, report.outputs, load.worker)


def _absent(model_id: str, model: Model | None) -> RuntimeProblem:
    state = model.state if model is not None else ModelState.UNLOADED
    if state is ModelState.UNLOADING:
        return ModelUnloading(f"model '{model_id}' is being unloaded")
    if state is ModelState.LOST:
        return ModelNotLoaded(f"model '{model_id}' lost its worker and is being loaded again")
    if state is ModelState.LOADING:
        return ModelNotLoaded(f"model '{model_id}' is still loading")
    return ModelNotLoaded(
        f"model '{model_id}' is not loaded; load it with POST /api/v1/models/{model_id}/load"
    )


async def infer(
    route: Route, inputs: Sequence[Tensor], outputs: Sequence[str], timeout_s: float
) -> list[Tensor]:
    """Run one inference, at most `timeout_s` seconds; cancelling it stops the run.

    Raises:
        InferenceTimeout: `inference_timeout`.
        RuntimeProblem: what the worker answered (`invalid_input`, `inference_failed`, `worker_died`).
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await route.worker.infer(inputs, outputs)
    except TimeoutError:
        raise InferenceTimeout(f"the inference did not end within {timeout_s:g} s and was stopped") from None
