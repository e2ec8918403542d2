"""The routes of inference, metadata and readiness of a model; and the fast path of inferences."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from functools import partial

from aiohttp import hdrs, web

from answers.inference import ModelMetadata, ModelReady
from features.labels.fold import LABEL_NAME
from features.ondemand.app import DEMAND
from runtime.errors import InferenceTimeout
from runtime.process.pool import reading_bytes
from runtime.process.sharedmemory import SHARED_FROM_BYTES
from runtime.requestjson import LONG_JSON_BYTES, SHORT_JSON_BYTES
from runtime.router import Absent, Answered, Here, InferenceRequest, Target, There, Version
from runtime.statistics import InferenceTimes
from runtime.wire import Buffer
from server.api.models import find_tensors
from server.appkeys import BODIES, CONFIG, GATE, POOL, ROUTER
from server.auth.access import Access
from server.auth.gate import FORWARDED, PRINCIPAL
from server.auth.ratelimit import QUOTA
from server.cluster import CLUSTER, Cluster, forwardable
from server.errors import ANSWER_FIELDS, ServerProblem, error_response
from server.http.answers import respond
from server.http.bodies import BodyMemory, BodyTooLarge, read_body
from server.http.compression import COMPRESSED_FROM_BYTES, chosen_encoding, compress, decompress
from server.http.connection import ARRIVED_NS, read_body_into
from server.http.responses import DirectResponse, response_completer
from server.http.validation import path_parameters
from server.observability.output import REQUEST_ID, REQUEST_NAME, begin_context
from server.observability.requestlog import HTTP_COUNTS
from server.routing import RequestHandler, Routes, wrap_handler
from server.v2.codec import (
    HEADER_LENGTH,
    ReceivedBody,
    decode_raw,
    decode_request,
    encode_response,
    header_length,
)
from server.v2.metadata import (
    INFERENCE_BODY,
    INFERENCE_PARAMETERS,
    INFERENCE_RESPONSE,
    metadata,
    model_routes,
)
from server.v2.observer import OBSERVE, ObservedInference

routes = Routes(tag="inference")


_INFER_ERRORS = (
    "invalid_input", "inference_failed", "not_representable", "unknown_model", "unknown_version",
    "unknown_label", "body_too_large", "body_timeout", "model_not_loaded", "out_of_service", "bytes_gone",
    "model_unloading", "model_unloaded", "model_replaced", "model_evicted", "model_moved", "worker_died",
    "out_of_memory", "fork_server_died", "inference_queue_full", "inference_timeout", "inference_cancelled",
    "bodies_full", "unsupported_media_type", "load_failed", "queue_full",
    "log_unavailable", "shutting_down", "node_unreachable", "fork_server_unavailable",
    "repository_unreadable",
)  # fmt: skip


_METADATA_ERRORS = (
    "unknown_model", "unknown_version", "invalid_model", "unsafe_file", "model_changed", "repository_busy",
    "repository_unreadable", "model_not_loaded", "bytes_gone", "node_unreachable", "inference_timeout",
    "unknown_label",
)  # fmt: skip


@model_routes(
    routes.post,
    "/infer",
    ("Run an inference", "Run an inference on a version"),
    of_version="infer_version",
    access=Access.INFER,
    parameters=INFERENCE_PARAMETERS,
    request_body=INFERENCE_BODY,
    answers={200: INFERENCE_RESPONSE},
    errors=_INFER_ERRORS,
)
async def infer_model(request: web.Request) -> web.StreamResponse:
    path = path_parameters(request)
    return await infer(request, request.app, path["id"], path.get("version"))


@model_routes(
    routes.get,
    "",
    ("Inputs and outputs of a model", "Inputs and outputs of a version"),
    of_version="show_version_metadata",
    access=Access.ANY,
    answers={200: (ModelMetadata, "The metadata, of a model that is not loaded as its file declares it.")},
    errors=_METADATA_ERRORS,
)
@forwardable
async def show_metadata(request: web.Request) -> web.Response:
    path = path_parameters(request)
    found = await find_tensors(request.app, path["id"], path.get("version"))
    return respond(metadata(path["id"], *found))


@model_routes(
    routes.get,
    "/ready",
    ("Whether a model is ready", "Whether a version is ready"),
    of_version="show_version_ready",
    access=Access.ANY,
    answers={200: (ModelReady, "It is ready.")},
    errors=("not_ready", "model_not_loaded", "node_unreachable", "inference_timeout", "unknown_label"),
)
@forwardable
async def show_ready(request: web.Request) -> web.Response:
    """Answer 200 if an inference would be tried, else 400, as Triton's clients expect."""
    path = path_parameters(request)
    if not request.app[ROUTER].is_ready(path["id"], path.get("version")):
        raise ServerProblem(f"model '{path['id']}' is not ready", code="not_ready")
    return respond(ModelReady(name=path["id"], ready=True))


async def infer(
    request: web.BaseRequest, app: web.Application, model_id: str, version: Version | None
) -> web.StreamResponse:
    """Resolve the target, read and decode the body for it, run, encode.

    The gate has admitted the request. A model at another server is left to that, and of several that have it
    the less busy one answers, or another one if it fails before it has begun. A model that is not loaded, in
    this version if there is one, is loaded on demand once the body is decoded, if that is configured, and
    within the inference's own time. The client's timeout runs from the first byte, the server's from the end
    of the body. The `Loadledger-Model` header names the load behind the answer.
    """
    times = InferenceTimes(request.get(ARRIVED_NS) or time.monotonic_ns())
    subject = request[PRINCIPAL].subject
    router, memory, loop = app[ROUTER], app[BODIES].memory_of(subject), asyncio.get_running_loop()
    observe = app.get(OBSERVE)
    observed = None if observe is None else observe(request, model_id, subject, times)
    try:
        cluster, spreads = app[CLUSTER], FORWARDED not in request.headers
        await cluster.catch_up(request, model_id)
        demand = app[DEMAND]
        target = router.resolve(model_id, version, spreads=spreads, returns=demand.on)
        if isinstance(target, There):
            _note_sent(request, observed)
            return await cluster.forward(request, target, model_id, memory)
        if not request.content.is_eof():  # a body is not read in vain
            if isinstance(target, Absent):
                demand.check_queue(model_id)
            elif not target.has_copies:  # else another copy may answer
                target.check_queue()
        body = await _receive(request, memory, target)
        ends_ns = time.monotonic_ns() + int(app[CONFIG].inference_timeout_s * 1e9)
        decoded = await _decode(app, subject, memory, body)
        if decoded is not None and decoded.timeout_us:
            ends_ns = min(ends_ns, times.arrived_ns + decoded.timeout_us * 1000)
        # Again: reading the body may take long.
        result: Answered | Target = router.resolve(model_id, version, returns=demand.on)
        while not isinstance(result, Answered):
            left_s = _left_s(ends_ns)
            match result:
                case Here() as here:
                    question = _decode_for(here, decoded, body, observed)
                    result = await router.infer(
                        here, question, left_s, times, version=version, worker=body.worker, spreads=spreads
                    )
                case There():
                    _note_sent(request, observed)
                    return await cluster.forward(
                        request, result, model_id, memory, body=body.join(), ends_at_s=loop.time() + left_s
                    )
                case Absent():
                    missed_ns, ends_at_s = time.monotonic_ns(), loop.time() + left_s
                    async with demand.keep_loaded(model_id, version, subject, ends_at_s) as found:
                        times.waited_ns += time.monotonic_ns() - missed_ns
                        result = found
                        if isinstance(found, Here):
                            question, left_s = _decode_for(found, decoded, body, observed), _left_s(ends_ns)
                            result = await router.infer(
                                found, question, left_s, times, version=version, worker=body.worker
                            )
        return await _respond(request, result, decoded, times, memory, cluster=cluster, observed=observed)
    except BaseException as error:
        memory.give_back()
        if observed is not None:
            request[REQUEST_NAME] = observed.request_id
            observed.end(error)
        raise


def _note_sent(request: web.BaseRequest, observed: ObservedInference | None) -> None:
    """Note that an inference goes to another server, with its id."""
    if observed is not None:
        request[REQUEST_NAME], observed.was_sent = observed.request_id, True


def _left_s(ends_ns: int) -> float:
    """Return the seconds that are left to an inference.

    Raises:
        InferenceTimeout: `inference_timeout`.
    """
    left_ns = ends_ns - time.monotonic_ns()
    if left_ns <= 0:
        raise InferenceTimeout("the time of the inference was over before it could go to the model")
    return left_ns / 1e9


async def _receive(request: web.BaseRequest, memory: BodyMemory, target: Here | Absent) -> ReceivedBody:
    """Read the body: long tensors in place, into the memory of the worker chosen for them.

    Raises:
        BodyTooLarge: `body_too_large`; a compressed body is decompressed up to the limit only.
        ServerProblem: `bodies_full`.
    """
    header_bytes = header_length(request.headers.getall(HEADER_LENGTH, ()))
    max_bytes = memory.max_request_bytes
    if header_bytes is not None:
        if header_bytes > max_bytes:
            raise BodyTooLarge(max_bytes, memory)
        tensor_bytes = _expected_tensor_bytes(request, header_bytes, max_bytes)
        if tensor_bytes and isinstance(target, Here):
            worker = target.choose_worker()
            region = worker.tensor_memory.requests.reserve(tensor_bytes)
            if region is not None:
                memory.take(header_bytes + tensor_bytes)
                text = await read_body_into(request, header_bytes, region.buffer)
                return ReceivedBody(text, header_bytes, region, worker)
    content = await read_body(request, max_bytes, memory)
    encoding = request.headers.get(hdrs.CONTENT_ENCODING)
    if encoding is not None:
        try:
            content = await decompress(content, encoding, max_bytes, memory.inflating)
        except BodyTooLarge:
            raise BodyTooLarge(max_bytes, memory) from None
        memory.give_back()  # the compressed one
        memory.take(len(content))
    return ReceivedBody(content, header_bytes)


def _expected_tensor_bytes(request: web.BaseRequest, header_bytes: int, max_bytes: int) -> int:
    """Return the length of tensors that are still arriving, or 0 if they are short or of unknown length."""
    if request.content.is_eof() or hdrs.CONTENT_ENCODING in request.headers:
        return 0
    tensor_bytes = (request.content_length or 0) - header_bytes
    return tensor_bytes if SHARED_FROM_BYTES <= tensor_bytes <= max_bytes else 0


async def _decode(
    app: web.Application, subject: str, memory: BodyMemory, body: ReceivedBody
) -> InferenceRequest | None:
    """Decode a body; returns None for a raw one, whose meaning depends on the model's input."""
    if body.header_bytes == 0:
        return None
    json_bytes = body.json_bytes
    if json_bytes <= SHORT_JSON_BYTES:
        return decode_request(body.content, body.header_bytes, body.region)
    async with app[BODIES].turn(subject):  # long texts block the event loop, so subjects take turns
        read = None
        if json_bytes > LONG_JSON_BYTES:
            with memory.holding(reading_bytes(json_bytes)):
                read = await app[POOL].read_json(body.json, app[CONFIG].inference_timeout_s)
        return decode_request(body.content, body.header_bytes, body.region, read)


def _decode_for(
    here: Here, decoded: InferenceRequest | None, body: ReceivedBody, observed: ObservedInference | None
) -> InferenceRequest:
    """Return the request for a load: a raw body is decoded by the inputs of that."""
    if observed is not None:
        observed.here, observed.question = here, decoded
    if decoded is not None:
        return decoded
    raw = body.content if body.region is None else body.region.buffer
    question = decode_raw(raw, here.inputs, max_batch_size=here.max_batch_size, region=body.region)
    if observed is not None:
        observed.question = question
    return question


async def _respond(
    request: web.BaseRequest,
    answered: Answered,
    decoded: InferenceRequest | None,
    times: InferenceTimes,
    memory: BodyMemory,
    *,
    cluster: Cluster,
    observed: ObservedInference | None,
) -> DirectResponse:
    """Encode an answer; when its response is written, it is counted, and its observer gets it."""
    here, request_id, quota = answered.here, None if decoded is None else decoded.id, request.get(QUOTA)
    count = partial(here.count_answer, answered.outcome, times)
    answer_bytes = sum([len(tensor.data) for tensor in answered.outputs])
    if answer_bytes >= SHARED_FROM_BYTES:  # at once: the memory for arriving answers counts it no more
        memory.add_answer(answer_bytes)
    try:
        body, header_bytes = encode_response(here.model_id, here.version, request_id, answered.outputs)
        fields: dict[str, object] = {"Content-Type": "application/json"}
        if header_bytes is not None:
            fields = {"Content-Type": "application/octet-stream", HEADER_LENGTH: header_bytes}
        fields["Loadledger-Model"] = here.source
        fields |= request.get(ANSWER_FIELDS, {})
        if here.has_copies:
            fields |= cluster.describe_copy(request, here)
        if quota is not None:
            fields |= quota.headers()
        encoding = _encoding(request, body)
        if encoding is not None:
            fields |= {hdrs.CONTENT_ENCODING: encoding, hdrs.VARY: hdrs.ACCEPT_ENCODING}
            body = [await compress(body, encoding)]
    except BaseException:  # the model has answered, even if the client does not receive it
        count()
        raise
    if observed is None:
        return DirectResponse(fields, body, memory, count)
    fields[REQUEST_ID] = observed.request_id
    return DirectResponse(fields, body, memory, partial(_count_and_end, count, observed, answered))


def _count_and_end(count: Callable[[], None], observed: ObservedInference, answered: Answered) -> None:
    count()
    observed.end(answered)


def _encoding(request: web.BaseRequest, body: Sequence[Buffer]) -> str | None:
    accepted = request.headers.get(hdrs.ACCEPT_ENCODING)
    if accepted is None or sum(map(len, body)) < COMPRESSED_FROM_BYTES:
        return None
    return chosen_encoding(accepted)


_VERSION = rf"[1-9][0-9]{{0,8}}|{LABEL_NAME.pattern}"
_INFER = re.compile(rf"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{{0,127}})(?:/versions/({_VERSION}))?/infer")
"""The version has as many digits as fit into any integer; the router's path refuses others with a reason."""

_PATH, _PATH_OF_VERSION = "/v2/models/{id}/infer", "/v2/models/{id}/versions/{version}/infer"
"""The paths of the routes, for counts and for denials in the ledger."""


def add_fast_path(server: web.Server, app: web.Application) -> None:
    """Put the fast path before the application: it skips aiohttp's router and middlewares.

    Gate, limits, handler and errors are those of all requests. An unusual request takes the router.
    """
    gate, counts = app[GATE], app[HTTP_COUNTS]
    complete = response_completer(gate.proxies)

    def wrap(router_path: RequestHandler) -> RequestHandler:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            found = _INFER.fullmatch(request.raw_path) if request.method == hdrs.METH_POST else None
            if found is None or hdrs.EXPECT in request.headers:
                return await router_path(request)
            model_id, version = found.groups()
            path = _PATH_OF_VERSION if version else _PATH
            response: web.StreamResponse
            try:
                await gate.admit(request, Access.INFER, f"POST {path}", model_id)
                number = int(version) if version and version.isdigit() else version
                response = await infer(request, app, model_id, number)
            except asyncio.CancelledError:
                counts.count("POST", path, None)
                raise
            except Exception as error:  # noqa: BLE001 - every error becomes a response, as in the middlewares
                response = error_response(request, error)
            if isinstance(response, DirectResponse):
                counts.requests["POST", path, "2xx"] += 1
                return response
            begin_context(request)
            await complete(request, response)
            counts.count("POST", path, response)
            return response

        return handle

    wrap_handler(server, wrap)
