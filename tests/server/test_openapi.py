"""`openapi.yaml`: generated from the routes, valid, complete, and served."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.http import LocalApi

from server.app import create_app
from server.auth.access import Access
from server.config import Config
from server.openapi import openapi_yaml
from server.routing import ROUTES, Routes
from server.routing import ROUTES as ROUTE_TABLE

COMMITTED = Path(__file__).parents[2] / "openapi.yaml"


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


def test_each_operation_has_summary_tags_and_answers(committed: dict[str, Any]) -> None:
    operations = [
        (path, operation) for path, item in committed["paths"].items() for operation in item.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"], path
        assert operation["tags"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        assert all(response["description"] for response in operation["responses"].values()), path


def test_patterns_are_anchored_and_of_json_schema(committed: dict[str, Any]) -> None:
    patterns = set(re.findall(r"^ +pattern: (.+)$", COMMITTED.read_text(encoding="utf-8"), re.MULTILINE))
    assert patterns
    assert all(re.fullmatch(r"'?\^.+(?<!\\Z)\$'?", pattern) for pattern in patterns), patterns
    [model_id] = [
        parameter["schema"]["pattern"]
        for parameter in committed["paths"]["/api/v1/models/{id}"]["get"]["parameters"]
        if parameter["name"] == "id"
    ]
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
