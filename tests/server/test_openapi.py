"""`openapi.yaml`: generated from the routes, valid, complete, and served."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.http import LocalApi

from answers.tokens import ROLES
from events.jobs import JobKind, JobStatus
from events.models import RELOADS, ModelState
from events.presence import ServerState
from events.types import Cause
from features.approvals.facts import ApprovalResult
from features.nodes.facts import NodeState
from features.nodes.register import NodePhase
from features.signatures.rules import TrustMode
from server.app import all_routes, create_app
from server.auth.access import Access
from server.config import Config
from server.openapi.components import share_components
from server.openapi.document import openapi_document, openapi_yaml
from server.routing import ROUTES, Routes
from server.routing import ROUTES as ROUTE_TABLE

COMMITTED = Path(__file__).parents[2] / "openapi.yaml"
DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    read: dict[str, Any] = yaml.load(COMMITTED.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return read


def generated(folder: Path) -> str:
    app = create_app(Config(repository=folder, data=folder / "data"))
    return openapi_yaml(dict.fromkeys(app[ROUTES].values()))


def test_committed_document_is_generated(tmp_path: Path) -> None:
    assert COMMITTED.read_text(encoding="utf-8") == generated(tmp_path), "run `make generated`"


def test_committed_document_is_valid(committed: dict[str, Any]) -> None:
    OpenAPIV30SpecValidator(committed).validate()
    assert committed["openapi"] == "3.0.3"


def test_committed_document_has_every_route(committed: dict[str, Any], tmp_path: Path) -> None:
    app = create_app(Config(repository=tmp_path, data=tmp_path))
    served = {
        (route.method.lower(), re.sub(r"\{(\w+)[^}]*\}", r"{\1}", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(method, path) for path, item in committed["paths"].items() for method in item}
    assert served == documented
    assert len(app[ROUTE_TABLE]) == len(app.router.routes())


def resolve(document: dict[str, Any], value: Any) -> Any:
    """Return a part of the document with what its references lead to; no component leads to itself."""
    if isinstance(value, list):
        return [resolve(document, each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" not in value:
        return {name: resolve(document, each) for name, each in value.items()}
    found = document
    for name in value["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return resolve(document, found)


def operations_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for item in document["paths"].values() for operation in item.values()]


def test_components_change_no_operation() -> None:
    alone = openapi_document(all_routes())
    shared = share_components(alone)
    assert {*alone["components"]} == {"schemas", "securitySchemes"}
    for one, other in zip(operations_of(alone), operations_of(shared), strict=True):
        assert resolve(shared, other) == resolve(alone, one)


def test_no_two_operations_write_the_same_out(committed: dict[str, Any]) -> None:
    """Error codes of several operations that make no name of a response get one in `_RESPONSE_NAMES`."""
    written = Counter(
        json.dumps(each)
        for operation in operations_of(committed)
        for each in (
            *operation["parameters"],
            *(operation["responses"][name] for name in operation["responses"]),
        )
        if "$ref" not in each and ("name" in each or "Problem" in json.dumps(each))
    )
    assert [text for text, count in written.items() if count > 1] == []


VALUES: dict[tuple[str, str], Iterable[str]] = {
    ("JobInfo", "kind"): JobKind,
    ("JobInfo", "status"): JobStatus,
    ("JobInfo", "cause"): Cause,
    ("NodeJob", "kind"): JobKind,
    ("NodeJob", "status"): JobStatus,
    ("NodeModel", "state"): ModelState,
    ("NodeInfo", "phase"): NodePhase,
    ("ModelInfo", "state"): ModelState,
    ("ModelInfo", "brought_back"): RELOADS,
    ("ModelRulesInfo", "trust"): (TrustMode.ENFORCE, TrustMode.WARN),
    ("LoadApprovalInfo", "result"): ApprovalResult,
    ("ServerPresence", "state"): ServerState,
    ("NodePresence", "state"): NodeState,
    ("Segment", "state"): ModelState,
    ("ServerSegment", "state"): ServerState,
    ("NodeSegment", "state"): NodeState,
}
"""Members of answers that have the values of the ledger."""


@pytest.mark.parametrize(("answer", "member"), VALUES)
def test_answers_document_the_values_of_the_ledger(
    committed: dict[str, Any], answer: str, member: str
) -> None:
    documented = committed["components"]["schemas"][answer]["properties"][member]["enum"]
    assert {*documented} - {None} == {*VALUES[answer, member]}


TRIED = {
    "ready": "GET /health/ready",
    "issue": "POST /api/v1/tokens",
    "load_model": "POST /api/v1/models/digits/load",
    "show_job": "GET /api/v1/jobs/{job}",
    "list_models": "GET /api/v1/models",
    "show_model": "GET /api/v1/models/digits",
    "show_metadata": "GET /v2/models/digits",
    "infer_model": "POST /v2/models/digits/infer",
    "list_events": "GET /api/v1/events?type=LoadRequested&limit=1",
    "unload_model": "POST /api/v1/models/digits/unload",
}
"""The operations with an example, as a person tries them in turn."""


async def test_examples_are_requests_and_answers_of_a_server(
    committed: dict[str, Any], shared: LocalApi
) -> None:
    shutil.copytree(DIGITS, shared.config.repository / "digits")
    documented = {operation["operationId"]: operation for operation in operations_of(committed)}
    job = ""
    for name, request in TRIED.items():
        method, path = request.format(job=job).split()
        operation = documented.pop(name)
        [(status, expected)] = examples_of(operation)
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        answer = await shared.send(method, path, roles=ROLES, wait=60, json=body.get("example"))
        assert answer.status == int(status), name
        assert outline(answer.json) == outline(expected), name
        job = answer.json["id"] if name == "load_model" else job
    assert [name for name, operation in documented.items() if examples_of(operation)] == []


def examples_of(operation: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (status, content["example"])
        for status, response in operation["responses"].items()
        for media_type, content in response.get("content", {}).items()
        if media_type == "application/json" and "example" in content
    ]


def outline(value: Any) -> Any:
    """Return JSON with the names of its members, and types in place of their values."""
    if isinstance(value, dict):
        return {name: outline(each) for name, each in value.items()}
    if isinstance(value, list):
        return [outline(each) for each in value]
    return type(value).__name__


def test_each_operation_has_summary_tags_and_answers(committed: dict[str, Any]) -> None:
    operations = [
        (path, operation) for path, item in committed["paths"].items() for operation in item.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"], path
        assert operation["tags"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        responses = resolve(committed, operation["responses"])
        assert all(response["description"] for response in responses.values()), path


def find_patterns(value: Any) -> Iterator[str]:
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, each in members:
        if name == "pattern" and isinstance(each, str):
            yield each
        yield from find_patterns(each)


def test_patterns_are_anchored_and_of_json_schema(committed: dict[str, Any]) -> None:
    patterns = set(find_patterns(committed))
    assert patterns
    assert all(re.fullmatch(r"\^.+(?<!\\Z)\$", pattern) for pattern in patterns), patterns
    model_id = committed["components"]["parameters"]["ModelId"]["schema"]["pattern"]
    assert re.search(model_id, "digits")
    assert not re.search(model_id, "../digits")


async def test_server_serves_the_committed_document(shared: LocalApi) -> None:
    answer = await shared.get("/openapi.yaml", roles=())
    assert (answer.status, answer.media_type) == (200, "application/yaml")
    assert answer.body == COMMITTED.read_bytes()


def test_route_takes_known_error_codes_only() -> None:
    declare = Routes("x").get("/x", access=Access.ANY, summary="X", answers={}, errors=["no such code"])
    with pytest.raises(KeyError):
        declare(lambda request: request)
