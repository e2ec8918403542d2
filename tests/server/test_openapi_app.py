"""The committed `openapi.yaml` is what the code generates, and it is whole."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV30SpecValidator
from support.http import LocalApi

from server.app import all_routes, create_app
from server.appkeys import OPENAPI
from server.config import Config
from server.errors import ERRORS
from server.openapi import error_codes
from server.routes import ROUTES

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "openapi.yaml"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))
    return read


def generated(folder: Path) -> str:
    return create_app(Config(repository=folder, data=folder / "data"))[OPENAPI]()


def test_the_committed_document_is_what_the_code_generates(tmp_path: Path) -> None:
    assert COMMITTED.read_text(encoding="utf-8") == generated(tmp_path), "run `make generated`"


def test_the_validator_accepts_it(document: dict[str, Any]) -> None:
    OpenAPIV30SpecValidator(document).validate()
    assert document["openapi"] == "3.0.3"


def test_every_route_of_the_application_is_in_it_and_no_other(
    document: dict[str, Any], tmp_path: Path
) -> None:
    app = create_app(Config(repository=tmp_path, data=tmp_path))
    served = {
        (route.method.lower(), re.sub(r"\{(\w+)[^}]*\}", r"{\1}", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    documented = {(method, path) for path, item in document["paths"].items() for method in item}
    assert served == documented
    assert len(app[ROUTES]) == len(app.router.routes())


def test_every_code_of_a_route_is_in_it_under_its_status(document: dict[str, Any]) -> None:
    for route in all_routes():
        responses = document["paths"][route.path][route.method.lower()]["responses"]
        for code in error_codes(route):
            [content] = responses[str(ERRORS[code].status)]["content"].values()
            [allowed] = [part["properties"]["code"]["enum"] for part in content["schema"]["allOf"][1:]]
            assert code in allowed
            assert ERRORS[code].title in responses[str(ERRORS[code].status)]["description"]


def test_every_operation_says_what_it_is_for_and_what_it_answers(document: dict[str, Any]) -> None:
    operations = [
        (path, operation) for path, item in document["paths"].items() for operation in item.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"], path
        assert operation["tags"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        assert all(response["description"] for response in operation["responses"].values()), path


async def test_the_server_serves_it(api: LocalApi) -> None:
    answer = await api.get("/openapi.yaml", roles=())
    assert (answer.status, answer.media_type) == (200, "application/yaml")
    assert answer.body == COMMITTED.read_bytes()
