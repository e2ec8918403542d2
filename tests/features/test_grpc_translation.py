"""Calls of gRPC but ModelInfer: as HTTP, and back; errors, addresses, memory, and the protocol's messages."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from support.tritongrpc import triton_pool

from features.grpc.calls import address_of
from features.grpc.errors import CODE, PUSHBACK, STATUSES, CallRefused, refusal_of
from features.grpc.gatewaywire import PROCESS_BYTES, gateway_bytes, messages_bytes
from features.grpc.memory import CallMemory, MessageRoom
from features.grpc.messages import HEALTH, SERVICE, message_class, pool
from features.grpc.translation import CHECK, METHODS, HttpAnswer, HttpRequest
from server.errors import ERRORS


def method(name: str) -> Any:
    return METHODS[name if name == CHECK else f"/{SERVICE}/{name}"]


def ask(name: str, fields: dict[str, Any]) -> HttpRequest:
    found: HttpRequest = method(name).ask(method(name).request(**fields))
    return found


def answer(name: str, status: int, body: object) -> Any:
    return method(name).answer(HttpAnswer(status, {}, json.dumps(body).encode()))


# Requests

VERSION = {"name": "a/b ?", "version": "stable"}
FILES = {"config": {"string_param": "{}"}, "file:1/m": {"bytes_param": b"x"}}
LOAD, LOADED = {"model_name": "é", "parameters": FILES}, {"parameters": {"config": "{}", "file:1/m": ""}}
FLAG = {"unload_dependents": {"bool_param": True}}
UNLOAD, UNLOADED = {"model_name": "m", "parameters": FLAG}, {"parameters": {"unload_dependents": True}}
REQUESTS: list[tuple[str, dict[str, Any], str, object]] = [
    (CHECK, {}, "/health/ready", None),
    (CHECK, {"service": SERVICE}, "/health/ready", None),
    ("ServerLive", {}, "/v2/health/live", None),
    ("ServerReady", {}, "/v2/health/ready", None),
    ("ServerMetadata", {}, "/v2", None),
    ("ModelReady", {"name": "m"}, "/v2/models/m/ready", None),
    ("ModelReady", {"name": "m", "version": "2"}, "/v2/models/m/versions/2/ready", None),
    ("ModelMetadata", VERSION, "/v2/models/a%2Fb%20%3F/versions/stable", None),
    ("ModelConfig", {"name": "é", "version": "a#b"}, "/v2/models/%C3%A9/versions/a%23b/config", None),
    ("ModelStatistics", {}, "/v2/models/stats", None),
    ("ModelStatistics", VERSION, "/v2/models/a%2Fb%20%3F/versions/stable/stats", None),
    ("RepositoryIndex", {"ready": True}, "/v2/repository/index", {"ready": True}),
    ("RepositoryModelLoad", {"model_name": "a/b"}, "/v2/repository/models/a%2Fb/load", {"parameters": {}}),
    ("RepositoryModelLoad", LOAD, "/v2/repository/models/%C3%A9/load", LOADED),
    ("RepositoryModelUnload", UNLOAD, "/v2/repository/models/m/unload", UNLOADED),
]


@pytest.mark.parametrize(("name", "fields", "path", "body"), REQUESTS)
def test_request_becomes_one_of_http(name: str, fields: dict[str, Any], path: str, body: object) -> None:
    found = ask(name, fields)
    assert (found.path, found.body and json.loads(found.body)) == (path, body)


OTHER = "there is one repository; leave it out"


@pytest.mark.parametrize(
    ("name", "fields", "status", "text"),
    [
        ("ModelReady", {"version": "1"}, "INVALID_ARGUMENT", "the model's name is empty"),
        ("ModelMetadata", {"name": ".."}, "INVALID_ARGUMENT", "'..' is no name of a model or version"),
        ("ModelConfig", {"name": "m", "version": "."}, "INVALID_ARGUMENT", "'.' is no name"),
        ("RepositoryModelLoad", {}, "INVALID_ARGUMENT", "the model's name is empty"),
        ("RepositoryModelUnload", {"model_name": ".."}, "INVALID_ARGUMENT", "'..' is no name"),
        ("RepositoryIndex", {"repository_name": "r"}, "UNIMPLEMENTED", OTHER),
        ("RepositoryModelLoad", {"repository_name": "r", "model_name": "m"}, "UNIMPLEMENTED", OTHER),
        ("RepositoryModelUnload", {"repository_name": "r", "model_name": "m"}, "UNIMPLEMENTED", OTHER),
        (CHECK, {"service": "other"}, "NOT_FOUND", f"known is {SERVICE}"),
    ],
)
def test_request_is_refused(name: str, fields: dict[str, Any], status: str, text: str) -> None:
    with pytest.raises(CallRefused, match=re.escape(text)) as refused:
        ask(name, fields)
    assert refused.value.status == status


# Answers

UNHEALTHY, STOPPING, NOT_READY = (
    {"error": "", "code": code} for code in ("unhealthy", "shutting_down", "not_ready")
)
INPUT = {"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 2]}
CONFIG = {"name": "m", "backend": "onnxruntime", "input": [INPUT]}
METADATA = {"name": "m", "versions": ["1"], "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]}
INDEX = [{"name": "m", "state": "READY"}]
SERVER = {"name": "s", "extensions": ["a", "b"]}
STATISTICS = {"name": "m", "inference_count": 2**63, "inference_stats": {"queue": {"count": 1, "ns": 5}}}
ANSWERS: list[tuple[str, int, object, dict[str, Any]]] = [
    (CHECK, 200, {}, {"status": "SERVING"}),
    (CHECK, 503, UNHEALTHY, {"status": "NOT_SERVING"}),
    ("ServerLive", 200, {}, {"live": True}),
    ("ServerReady", 200, {}, {"ready": True}),
    ("ServerReady", 503, UNHEALTHY, {"ready": False}),
    ("ServerReady", 503, STOPPING, {"ready": False}),
    ("ModelReady", 200, {}, {"ready": True}),
    ("ModelReady", 400, NOT_READY, {"ready": False}),
    ("ServerMetadata", 200, SERVER, SERVER),
    ("ModelMetadata", 200, {**METADATA, "new": {"a": [1]}}, METADATA),
    ("ModelConfig", 200, CONFIG, {"config": CONFIG}),
    ("ModelStatistics", 200, {"model_stats": [STATISTICS]}, {"model_stats": [STATISTICS]}),
    ("RepositoryIndex", 200, INDEX, {"models": INDEX}),
    ("RepositoryModelLoad", 200, {}, {}),
    ("RepositoryModelUnload", 200, {}, {}),
]


@pytest.mark.parametrize(("name", "status", "body", "fields"), ANSWERS)
def test_answer_becomes_a_message(name: str, status: int, body: object, fields: dict[str, Any]) -> None:
    response = message_class(f"{HEALTH}CheckResponse" if name == CHECK else f"inference.{name}Response")
    assert answer(name, status, body) == response(**fields)


@pytest.mark.parametrize("table", [REQUESTS, ANSWERS], ids=["requests", "answers"])
def test_tables_have_each_method(table: list[tuple[str, Any, Any, Any]]) -> None:
    assert {id(method(name)) for name, *_ in table} == {id(each) for each in METHODS.values()}


@pytest.mark.parametrize("name", [name for name in METHODS if name != CHECK])
def test_other_error_of_a_method_is_raised(name: str) -> None:
    problem = {"error": "no such model: 'm'", "code": "unknown_model", "instance": "i"}
    with pytest.raises(CallRefused, match="no such model: 'm'") as refused:
        answer(name.rpartition("/")[2], 404, problem)
    assert (refused.value.status, refused.value.metadata) == ("NOT_FOUND", ((CODE, "unknown_model"),))


# Errors


def test_each_status_of_http_has_one_of_grpc() -> None:
    assert STATUSES.keys() == {kind.status for kind in ERRORS.values()}
    assert set(STATUSES.values()) <= set(grpc.StatusCode.__members__)


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"{}", b'{"error": 1, "code": "x"}'])
def test_answer_that_is_no_problem_is_internal(body: bytes) -> None:
    refused = refusal_of(502, body, "", ())
    assert (refused.status, str(refused), refused.code) == ("INTERNAL", "the server answered 502", "internal")


@pytest.mark.parametrize(
    ("retry_after", "pushback"),
    [("3", [(PUSHBACK, "3000")]), ("Mon, 30 Nov 2026 09:24:55 GMT", []), ("", [])],
)
def test_retry_after_becomes_pushback(retry_after: str, pushback: list[tuple[str, str]]) -> None:
    refused = refusal_of(429, b'{"error": "e", "code": "rate_limited"}', retry_after, (("x", "y"),))
    assert refused.status == "RESOURCE_EXHAUSTED"
    assert [*refused.metadata] == [(CODE, "rate_limited"), *pushback, ("x", "y")]


@pytest.mark.parametrize(
    ("text", "most"), [("a" * 4096, 4096), ("a" * 9000, 6145), ("é" * 1000, 1000), ("模" * 4096, 683)]
)
def test_text_of_an_error_fits_into_metadata(text: str, most: int) -> None:
    refused = refusal_of(400, json.dumps({"error": text, "code": "invalid_model"}).encode(), "", ())
    assert len(str(refused)) == most
    assert len(quote(str(refused))) < 8000


# Addresses and memory


def test_address_of_a_peer_has_no_port() -> None:
    assert address_of("ipv4:192.0.2.7:50051") == "192.0.2.7"
    assert address_of("ipv6:%5B2001:db8::1%5D:50051") == "2001:db8::1"
    assert address_of("ipv6:[::1]:50051") == "::1"


def test_calls_of_one_address_have_half_of_the_memory() -> None:
    room = MessageRoom(100, 30)
    first, second, other = (CallMemory(room, address, f"{address}:1") for address in ("a", "a", "b"))
    first.take(40)
    second.take(10)
    other.take(45)
    for memory, count in ((first, 1), (second, 1), (other, 6)):
        with pytest.raises(CallRefused, match="try again") as refused:
            memory.take(count)
        assert (refused.value.status, refused.value.code) == ("RESOURCE_EXHAUSTED", "bodies_full")
    other.take(5)
    assert room.taken_bytes == 100
    first.give_back()
    first.give_back()
    second.take(40)
    second.give_back()
    other.give_back()
    assert (room.taken_bytes, room._by_address) == (0, {})


@pytest.mark.parametrize(("limit", "expected"), [(2**40, 2**29), (2**33, 2**28), (2**29, 2**27)])
def test_memory_for_messages_depends_on_the_limit(limit: int, expected: int) -> None:
    assert messages_bytes(limit, 2**26) == expected
    assert gateway_bytes(limit, 2**26) == 2 * expected + PROCESS_BYTES


# The protocol


def facts(found: DescriptorPool, file: str) -> Iterator[tuple[str, object]]:
    """Yield the fields, enum values and methods of a file by their names, as a client knows them."""
    descriptor = found.FindFileByName(file)  # type: ignore[no-untyped-call]
    messages, enums = [*descriptor.message_types_by_name.values()], [*descriptor.enum_types_by_name.values()]
    for message in messages:  # and those that are added
        messages += message.nested_types
        enums += message.enum_types
        for each in message.fields:
            kind, oneof = each.message_type or each.enum_type, each.containing_oneof
            names = kind and kind.full_name, oneof and oneof.name
            yield each.full_name, (each.number, each.type, each.is_repeated, *names)
    for enum in enums:
        yield from ((f"{enum.full_name}.{value.name}", value.number) for value in enum.values)
    for service in descriptor.services_by_name.values():
        for each in service.methods:
            yield each.full_name, (each.input_type.full_name, each.output_type.full_name)


@pytest.mark.parametrize("file", ["open_inference.proto", "health.proto"])
def test_messages_are_those_of_the_protocol(file: str) -> None:
    """The protocol is that of Triton's client, which has more, and of gRPC's health checks."""
    health, triton = health_pb2.DESCRIPTOR, triton_pool
    theirs = {
        **dict(facts(health.pool, health.name)),
        **dict(facts(triton, "grpc_service.proto")),
        **dict(facts(triton, "model_config.proto")),
    }
    ours = dict(facts(pool, file))
    assert ours
    assert ours == {name: theirs.get(name) for name in ours}
