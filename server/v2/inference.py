"""The routes of inference, metadata and readiness of a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from aiohttp import hdrs, web

from runtime.process.pool import reading_bytes
from runtime.process.sharedmemory import SHARED_FROM_BYTES
from runtime.requestjson import LONG_JSON_BYTES, SHORT_JSON_BYTES
from runtime.router import InferenceRequest, ModelNotLoaded, ModelRoute, ModelUnloading, Router
from runtime.statistics import InferenceTimes
from runtime.wire import Buffer, Tensor
from server.api.models import find_signature
from server.appkeys import BODIES, CONFIG, DEMAND, POOL, ROUTER
from server.auth.gate import PRINCIPAL
from server.auth.ratelimit import QUOTA, Quota
from server.config import MAX_BODY_BYTES
from server.errors import ServerProblem
from server.http.bodies import BodyTooLarge, Share, read_body
from server.http.compression import COMPRESSED_FROM_BYTES, chosen_encoding, compress, decompress
from server.http.connection import ARRIVED_NS, read_body_into
from server.http.responses import DirectResponse
from server.http.validation import path_parameters
from server.routing import Access, Routes
from server.v2.codec import (
    HEADER_LENGTH,
    ReceivedBody,
    decode_raw,
    decode_request,
    encode_response,
    header_length,
)
from server.v2.forwarding import RECEIVED_BODY
from server.v2.metadata import (
    INFERENCE_BODY,
    INFERENCE_PARAMETERS,
    INFERENCE_RESPONSE,
    MetadataSchema,
    ReadySchema,
    metadata,
    model_routes,
)

routes = Routes(tag="inference")


class NotReady(ServerProblem):
    """The model is not ready."""

    code = "not_ready"


_INFER_ERRORS = (
    "invalid_input", "inference_failed", "not_representable", "unknown_model", "unknown_version",
    "body_too_large", "body_timeout", "model_not_loaded", "model_unloading", "worker_died",
    "inference_queue_full", "inference_timeout", "inference_cancelled", "bodies_full",
    "unsupported_media_type", "load_failed", "queue_full", "log_unavailable", "shutting_down",
    "node_unreachable", "fork_server_unavailable",
)  # fmt: skip


_METADATA_ERRORS = (
    "unknown_model", "unknown_version", "invalid_model", "unsafe_file", "model_changed", "repository_busy",
    "repository_unreadable", "model_not_loaded", "node_unreachable", "inference_timeout",
)  # fmt: skip


@model_routes(
    routes.post,
    "/infer",
    ("Run an inference", "Run an inference on a version"),
    of_version="infer_version",
    access=Access.PREDICT,
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
    answers={200: (MetadataSchema(), "The metadata, of a model that is not loaded as its file declares it.")},
    errors=_METADATA_ERRORS,
)
async def show_metadata(request: web.Request) -> web.Response:
    path = path_parameters(request)
    found = await find_signature(request.app, path["id"], path.get("version"))
    return web.json_response(metadata(path["id"], *found))


@model_routes(
    routes.get,
    "/ready",
    ("Whether a model is ready", "Whether a version is ready"),
    of_version="show_version_ready",
    access=Access.ANY,
    answers={200: (ReadySchema(), "It is ready.")},
    errors=("not_ready", "model_not_loaded", "node_unreachable", "inference_timeout"),
)
async def show_ready(request: web.Request) -> web.Response:
    """Answer 200 if an inference would be tried, else 400, as Triton's clients expect."""
    path = path_parameters(request)
    if not request.app[ROUTER].is_ready(path["id"], path.get("version")):
        raise NotReady(f"model '{path['id']}' is not ready")
    return web.json_response({"name": path["id"], "ready": True})


async def infer(
    request: web.BaseRequest, app: web.Application, model_id: str, version: int | None
) -> web.StreamResponse:
    """Decode, run, encode. The `Loadledger-Model` header names the load behind the answer.

    The gate has admitted the request. A model that is not loaded, in this version if there is one, is loaded
    on demand, if that is configured, within the inference's own time.
    """
    times = InferenceTimes(request.get(ARRIVED_NS) or time.monotonic_ns())
    subject = request[PRINCIPAL].subject
    router, share = app[ROUTER], app[BODIES].share(subject)
    loop, longest_s = asyncio.get_running_loop(), app[CONFIG].inference_timeout_s
    try:
        body = await _receive(request, app, share, model_id, version)
        began_s = loop.time()
        decoded = None
        if body.json_bytes > SHORT_JSON_BYTES:  # it would block the event loop, so its subjects take turns
            async with app[BODIES].turn(subject):
                read = None
                if body.json_bytes > LONG_JSON_BYTES:
                    with share.holding(reading_bytes(body.json_bytes)):
                        read = await app[POOL].read_json(body.json, longest_s)
                decoded = decode_request(body.content, body.header_bytes, body.region, read)
        try:
            decoded = decoded or _decode(router, model_id, version, body)
            timeout_s = _timeout_s(decoded, longest_s)
            route, (outcome, outputs) = await router.infer(model_id, version, decoded, timeout_s, times)
        except (ModelNotLoaded, ModelUnloading):  # load it within the inference's time, and try once more
            request[RECEIVED_BODY] = body  # for another node, if the model is there
            ends_at_s = began_s + (longest_s if decoded is None else _timeout_s(decoded, longest_s))
            missed_ns = time.monotonic_ns()
            async with app[DEMAND].keep_loaded(model_id, version, subject, ends_at_s):
                times.waited_ns += time.monotonic_ns() - missed_ns
                decoded = decoded or _decode(router, model_id, version, body)
                left_s = ends_at_s - loop.time()
                route, (outcome, outputs) = await router.infer(model_id, version, decoded, left_s, times)
        count = partial(route.count_answer, outcome, times)
        try:
            fields, answer = _encode(route, decoded, outputs, request.get(QUOTA))
            encoding = _encoding(request, answer)
            if encoding is not None:
                fields |= {hdrs.CONTENT_ENCODING: encoding, hdrs.VARY: hdrs.ACCEPT_ENCODING}
                answer = [await compress(answer, encoding)]
        except BaseException:  # the model has answered, whoever does not get it
            count()
            raise
        return DirectResponse(fields, answer, share, count)
    except BaseException:
        share.give_back()
        raise


async def _receive(
    request: web.BaseRequest, app: web.Application, share: Share, model_id: str, version: int | None
) -> ReceivedBody:
    """Return the body.

    Raises:
        BodyTooLarge: `body_too_large`; of a compressed body, no more than the limit was decompressed.
        BodiesFull: `bodies_full`.
    """
    header_bytes = header_length(request.headers.getall(HEADER_LENGTH, ()))
    if header_bytes is not None and header_bytes > MAX_BODY_BYTES:
        raise BodyTooLarge(MAX_BODY_BYTES)
    tensor_bytes = 0 if header_bytes is None else _expected_tensor_bytes(request, header_bytes)
    region = app[ROUTER].reserve(model_id, version, tensor_bytes) if tensor_bytes else None
    if header_bytes is not None and region is not None:
        share.take(header_bytes + len(region.buffer))
        content: Buffer = await read_body_into(request, header_bytes, region.buffer)
    else:
        content = await _read_decompressed(request, share)
    json_bytes = len(content) if header_bytes is None else min(header_bytes, len(content))
    return ReceivedBody(content, header_bytes, json_bytes, region)


def _expected_tensor_bytes(request: web.BaseRequest, header_bytes: int) -> int:
    """Return the length of tensors that are still arriving; 0 if they are short, or no length is known."""
    if request.content.is_eof() or hdrs.CONTENT_ENCODING in request.headers:
        return 0
    tensor_bytes = (request.content_length or 0) - header_bytes
    return tensor_bytes if SHARED_FROM_BYTES <= tensor_bytes <= MAX_BODY_BYTES else 0


async def _read_decompressed(request: web.BaseRequest, share: Share) -> bytes:
    body = await read_body(request, MAX_BODY_BYTES, share)
    encoding = request.headers.get(hdrs.CONTENT_ENCODING)
    if encoding is not None:
        body = await decompress(body, encoding, MAX_BODY_BYTES)
        share.take(len(body))
    return body


def _decode(router: Router, model_id: str, version: int | None, body: ReceivedBody) -> InferenceRequest:
    """Decode a body; the model's input says what a raw one is."""
    if body.header_bytes != 0:
        return decode_request(body.content, body.header_bytes, body.region)
    route = router.route(model_id, version)
    raw = body.content if body.region is None else body.region.buffer
    return decode_raw(raw, route.inputs, max_batch_size=route.max_batch_size, region=body.region)


def _timeout_s(decoded: InferenceRequest, longest_s: float) -> float:
    if not decoded.timeout_us:
        return longest_s
    return min(longest_s, decoded.timeout_us / 1e6)


def _encode(
    route: ModelRoute, decoded: InferenceRequest, outputs: Sequence[Tensor], quota: Quota | None
) -> tuple[dict[str, object], list[Buffer]]:
    body, header_bytes = encode_response(route.model_id, route.version, decoded.id, outputs)
    fields: dict[str, object] = {"Content-Type": "application/json"}
    if header_bytes is not None:
        fields = {"Content-Type": "application/octet-stream", HEADER_LENGTH: header_bytes}
    fields["Loadledger-Model"] = route.source
    if quota is not None:
        fields |= quota.headers()
    return fields, body


def _encoding(request: web.BaseRequest, body: Sequence[Buffer]) -> str | None:
    accepted = request.headers.get(hdrs.ACCEPT_ENCODING)
    if accepted is None or sum(map(len, body)) < COMPRESSED_FROM_BYTES:
        return None
    return chosen_encoding(accepted)
