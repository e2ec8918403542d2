"""Each method but ModelInfer: its request as an HTTP request, and the answer's JSON as a message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from google.protobuf.json_format import ParseDict

from features.grpc.errors import CallRefused, InvalidCall, Metadata, refusal_of
from features.grpc.inference import parameter_value
from features.grpc.messages import HEALTH, MALFORMED, SERVICE, message_class

INFER = f"/{SERVICE}/ModelInfer"
CHECK = f"/{HEALTH}/Check"

MAX_MESSAGE_BYTES = 2**20
"""Longest request, as the server's limit for JSON."""

RETURNED = ("Loadledger-Model", "X-Request-ID")
"""Header fields of an answer that become trailing metadata."""

_health = message_class(f"{HEALTH}CheckResponse")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request of the HTTP API; with a body, its method is POST."""

    path: str
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer of the HTTP API."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def check(self) -> None:
        """Raise the error of an answer that is one.

        Raises:
            CallRefused: with the status, text and code of the error.
        """
        if self.status != HTTPStatus.OK:
            raise refusal_of(self.status, self.body, self.headers.get("Retry-After", ""), self.metadata)

    @property
    def metadata(self) -> Metadata:
        """The trailing metadata of the call: the load that answered, and the request's id."""
        return tuple((name.lower(), self.headers[name]) for name in RETURNED if name in self.headers)


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a service.

    Attributes:
        request: the class of its request.
        ask: returns the HTTP request for one.
        answer: returns the message of an HTTP answer.
    """

    request: Any
    ask: Callable[[Any], HttpRequest]
    answer: Callable[[HttpAnswer], Any]

    def read(self, message: bytes) -> HttpRequest:
        """Return the HTTP request for an encoded request.

        Raises:
            CallRefused: INVALID_ARGUMENT, or RESOURCE_EXHAUSTED.
        """
        if len(message) > MAX_MESSAGE_BYTES:
            text = f"the message has {len(message)} bytes, and may have {MAX_MESSAGE_BYTES}"
            raise CallRefused("RESOURCE_EXHAUSTED", text, "body_too_large")
        try:
            return self.ask(self.request.FromString(message))
        except MALFORMED as error:
            raise InvalidCall(f"the message is no {self.request.DESCRIPTOR.name}: {error}") from None


def model_path(name: str, version: str, suffix: str = "") -> str:
    """Return the path of a model, or of a version of it, which may be a label.

    Raises:
        InvalidCall: INVALID_ARGUMENT, the name is empty, or a path would lead elsewhere.
    """
    if not name:
        raise InvalidCall("the model's name is empty")
    for part in (name, version):
        if part in (".", ".."):
            raise InvalidCall(f"'{part}' is no name of a model or version")
    of_version = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(name, safe='')}{of_version}{suffix}"


def _model(suffix: str) -> Callable[[Any], HttpRequest]:
    return lambda request: HttpRequest(model_path(request.name, request.version, suffix))


def _ask_statistics(request: Any) -> HttpRequest:
    if not request.name:
        return HttpRequest("/v2/models/stats")
    return HttpRequest(model_path(request.name, request.version, "/stats"))


def _ask_index(request: Any) -> HttpRequest:
    _check_repository(request)
    return HttpRequest("/v2/repository/index", msgspec.json.encode({"ready": request.ready}))


def _change(verb: str) -> Callable[[Any], HttpRequest]:
    def ask(request: Any) -> HttpRequest:
        _check_repository(request)
        model_path(request.model_name, "")
        given = {name: parameter_value(each) for name, each in request.parameters.items()}
        # The server supports no parameter of bytes, and refuses each by its name.
        parameters = {name: "" if isinstance(value, bytes) else value for name, value in given.items()}
        path = f"/v2/repository/models/{quote(request.model_name, safe='')}/{verb}"
        return HttpRequest(path, msgspec.json.encode({"parameters": parameters}))

    return ask


def _check_repository(request: Any) -> None:
    if request.repository_name:
        text = "repository_name is not supported, there is one repository; leave it out"
        raise CallRefused("UNIMPLEMENTED", text, "not_supported")


def _is_ok(name: str, member: str, *codes: str) -> Callable[[HttpAnswer], Any]:
    """Return a function that answers whether the status is 200; other errors than of `codes` are raised."""
    response = message_class(f"inference.{name}")

    def answer(given: HttpAnswer) -> Any:
        try:
            given.check()
        except CallRefused as refused:
            if refused.code not in codes:
                raise
            return response(**{member: False})
        return response(**{member: True})

    return answer


def _json(name: str, member: str | None = None) -> Callable[[HttpAnswer], Any]:
    """Return a function that makes a message of an answer's JSON; `member` is the field that holds it."""
    response = message_class(f"inference.{name}")

    def answer(given: HttpAnswer) -> Any:
        given.check()
        members = msgspec.json.decode(given.body)
        # HTTP may have more members than the protocol's messages, such as the time of transport.
        return ParseDict(
            members if member is None else {member: members}, response(), ignore_unknown_fields=True
        )

    return answer


def _done(name: str) -> Callable[[HttpAnswer], Any]:
    response = message_class(f"inference.{name}")

    def answer(given: HttpAnswer) -> Any:
        given.check()
        return response()

    return answer


def _ask_health(request: Any) -> HttpRequest:
    if request.service not in ("", SERVICE):
        text = f"no such service; known is {SERVICE}, or none for the server"
        raise CallRefused("NOT_FOUND", text, "not_found")
    return HttpRequest("/health/ready")


def health(*, serving: bool) -> Any:
    return _health(status="SERVING" if serving else "NOT_SERVING")


def _get(path: str) -> Callable[[Any], HttpRequest]:
    return lambda _: HttpRequest(path)


METHODS: Mapping[str, Method] = {
    CHECK: Method(
        message_class(f"{HEALTH}CheckRequest"),
        _ask_health,
        lambda given: health(serving=given.status == HTTPStatus.OK),
    ),
    **{
        f"/{SERVICE}/{name}": Method(message_class(f"inference.{name}Request"), ask, answer)
        for name, ask, answer in (
            ("ServerLive", _get("/v2/health/live"), _is_ok("ServerLiveResponse", "live")),
            (
                "ServerReady",
                _get("/v2/health/ready"),
                _is_ok("ServerReadyResponse", "ready", "unhealthy", "shutting_down"),
            ),
            ("ModelReady", _model("/ready"), _is_ok("ModelReadyResponse", "ready", "not_ready")),
            ("ServerMetadata", _get("/v2"), _json("ServerMetadataResponse")),
            ("ModelMetadata", _model(""), _json("ModelMetadataResponse")),
            ("ModelConfig", _model("/config"), _json("ModelConfigResponse", "config")),
            ("ModelStatistics", _ask_statistics, _json("ModelStatisticsResponse")),
            ("RepositoryIndex", _ask_index, _json("RepositoryIndexResponse", "models")),
            ("RepositoryModelLoad", _change("load"), _done("RepositoryModelLoadResponse")),
            ("RepositoryModelUnload", _change("unload"), _done("RepositoryModelUnloadResponse")),
        )
    },
}
"""The methods by their paths, without ModelInfer."""
