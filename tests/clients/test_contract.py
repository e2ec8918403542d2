"""One contract for every HTTP client: Triton's (sync, aio), KServe's and ours (sync, async), unchanged.

The asynchronous ones run to their answer in a loop of their own.
"""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
import tritonclient.http as triton
from support import models
from support.clientmodels import ELEMENTS, sample, tensor
from support.clients import Blocked, connected
from support.process import Server
from support.standing import bearer
from tritonclient.utils import InferenceServerException

from loadledger import ServerError

BINARY = ((True, True), (True, False), (False, True), (False, False))
"""Whether inputs and outputs go as bytes; else they are JSON."""
NOT_IN_JSON = ("FP16", "BF16")
A, B = np.array([5, 7], np.float32), np.array([2, 3], np.float32)
Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Inference:
    """One request of the contract; a role of None sends no token."""

    model: str
    arrays: Arrays
    role: str | None = "predict"
    datatype: str = "FP32"
    binary: tuple[bool, bool] | None = None
    timeout_us: int | None = None


class Dialect(Protocol):
    """What the contract asks of a client."""

    encodings: ClassVar[tuple[tuple[bool, bool], ...]]
    datatypes: ClassVar[tuple[str, ...]] = tuple(ELEMENTS)
    error: ClassVar[type[Exception]]

    def is_live(self) -> bool: ...

    def is_model_ready(self, model: str, role: str | None) -> bool: ...

    def infer(self, request: Inference) -> Any: ...

    def status(self, error: Any) -> int: ...


class Triton(Dialect):
    """Triton's client; the one for asyncio is `Blocked`."""

    encodings = BINARY
    error = InferenceServerException

    def __init__(self, server: Server, client: Any) -> None:
        self._server, self._client = server, client

    def is_live(self) -> bool:
        return bool(self._client.is_server_live() and self._client.is_server_ready())

    def is_model_ready(self, model: str, role: str | None) -> bool:
        return bool(self._client.is_model_ready(model, headers=headers(self._server, role)))

    def infer(self, request: Inference) -> Any:
        binary = request.binary
        inputs = [
            tensor(name, array, request.datatype, binary=(binary or BINARY[0])[0])
            for name, array in request.arrays.items()
        ]
        result = self._client.infer(
            request.model,
            inputs,
            outputs=binary and [triton.InferRequestedOutput("y", binary_data=binary[1])],
            headers=headers(self._server, request.role),
            timeout=request.timeout_us,
        )
        if binary is not None:
            assert ("data" in result.get_output("y")) is not binary[1]
        return result.as_numpy(result.get_response()["outputs"][0]["name"])

    def status(self, error: Any) -> int:
        return int(error.status())

    def load(self, model: str) -> None:
        self._client.load_model(model, headers=headers(self._server, "admin"))

    def unload(self, model: str) -> None:
        self._client.unload_model(model, headers=headers(self._server, "admin"))


class KServe(Dialect):
    """KServe's client, which has no calls for loads and no BF16."""

    encodings = BINARY
    datatypes = tuple(datatype for datatype in ELEMENTS if datatype != "BF16")

    def __init__(self, server: Server, runner: asyncio.Runner, resources: ExitStack) -> None:
        self._kserve = pytest.importorskip("kserve", reason="KServe's client is not made for this Python")
        self._server, self._runner = server, runner
        client = self._kserve.InferenceRESTClient(self._kserve.RESTConfig(protocol="v2"))
        resources.callback(lambda: runner.run(client.close()))
        self._client = Blocked(client, runner)

    @property
    def error(self) -> type[Exception]:  # type: ignore[override]
        import httpx  # noqa: PLC0415 - it comes with KServe

        return httpx.HTTPStatusError

    def is_live(self) -> bool:
        url = self._server.url
        return bool(self._client.is_server_live(url) and self._client.is_server_ready(url))

    def is_model_ready(self, model: str, role: str | None) -> bool:
        ready = self._client.is_model_ready(self._server.url, model, headers=headers(self._server, role))
        return bool(ready)

    def infer(self, request: Inference) -> Any:
        there, back = request.binary or BINARY[0]
        inputs = []
        for name, array in request.arrays.items():
            inputs.append(self._kserve.InferInput(name, list(array.shape), request.datatype))
            inputs[-1].set_data_from_numpy(array, binary_data=there)
        parameters = {"binary_data_output": back} | (
            {"timeout": request.timeout_us} if request.timeout_us else {}
        )
        received: dict[str, str] = {}
        answer = self._client.infer(
            self._server.url,
            self._kserve.InferRequest(request.model, inputs, request_id="seven", parameters=parameters),
            request.model,
            headers=headers(self._server, request.role),
            response_headers=received,
        )
        assert (answer.id, answer.model_name) == ("seven", request.model)
        assert ("inference-header-content-length" in received) is back
        assert received["loadledger-model"].startswith(f"{request.model}/1;position=")
        return answer.outputs[0].as_numpy()

    def status(self, error: Any) -> int:
        return int(error.response.status_code)


class Ours(Dialect):
    """`loadledger.Client` or `AsyncClient`, which send JSON; each has one token."""

    encodings = ((False, False),)
    error = ServerError

    def __init__(self, server: Server, kind: str, resources: ExitStack) -> None:
        self._clients = {
            role: resources.enter_context(connected(kind, server.url, role and server.api.token(role)))
            for role in (None, "predict", "audit", "admin")
        }

    def is_live(self) -> bool:
        return self._clients[None].health().status == "ok"

    def is_model_ready(self, model: str, role: str | None) -> bool:
        try:
            return self._clients[role].model(model).state == "loaded"
        except ServerError:
            return False

    def infer(self, request: Inference) -> Any:
        inputs = [
            {"name": name, "shape": array.shape, "datatype": request.datatype, "data": array.ravel().tolist()}
            for name, array in request.arrays.items()
        ]
        parameters = {"timeout": request.timeout_us} if request.timeout_us else None
        answer = self._clients[request.role].infer(request.model, inputs, parameters=parameters)
        [output] = answer["outputs"]
        return np.array(output["data"], object).reshape(output["shape"])

    def status(self, error: Any) -> int:
        return int(error.status)

    def load(self, model: str) -> None:
        self._clients["admin"].load(model, wait=True)

    def unload(self, model: str) -> None:
        self._clients["admin"].unload(model, wait=True)


def headers(server: Server, role: str | None) -> dict[str, str]:
    """Return new headers for each call: Triton's client and KServe's write theirs into them."""
    return {} if role is None else dict(bearer(server, role))


@pytest.fixture(scope="module", params=["Triton sync", "Triton aio", "KServe", "Client", "AsyncClient"])
def dialect(
    request: pytest.FixtureRequest,
    server: Server,
    runner: asyncio.Runner,
    triton_clients: dict[str, Any],
    resources: ExitStack,
) -> Dialect:
    kind = request.param
    if kind.startswith("Triton"):
        return Triton(server, triton_clients[kind.split()[1]])
    return KServe(server, runner, resources) if kind == "KServe" else Ours(server, kind, resources)


# The contract


def test_health_needs_no_token(dialect: Dialect) -> None:
    assert dialect.is_live()


def test_readiness_follows_model_state(dialect: Dialect) -> None:
    ready = {name: dialect.is_model_ready(name, "admin") for name in ("subtract", "idle", "nothing")}
    assert ready == {"subtract": True, "idle": False, "nothing": False}
    assert not dialect.is_model_ready("subtract", None)


@pytest.mark.parametrize("datatype", ELEMENTS)
def test_datatype_round_trips_in_each_encoding(dialect: Dialect, datatype: str) -> None:
    for binary in dialect.encodings:
        if datatype not in dialect.datatypes or (datatype in NOT_IN_JSON and not all(binary)):
            continue
        array = sample(datatype)
        if "FP" in datatype and not all(binary):
            array[~np.isfinite(array)] = 7  # JSON has no infinity
        answer = dialect.infer(
            Inference(f"identity-{datatype}", {"x": array}, datatype=datatype, binary=binary)
        )
        assert text(answer) == text(array), binary
        assert answer.shape == (2, 3)


def text(array: Any) -> list[Any]:
    """List the elements; Triton's client gives texts as bytes."""
    return [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (Inference("nothing", {"x": A}), 404, "nothing"),
        (Inference("idle", {"x": A}), 503, "not loaded"),
        (Inference("subtract", {"a": A, "b": B}, role=None), 401, "token"),
        (Inference("subtract", {"a": A, "b": B}, role="audit"), 403, "predict"),
        (Inference("subtract", {"a": A}), 400, "'b'"),
        (Inference("subtract", {"a": A, "b": B, "c": A}), 400, "'c'"),
    ],
    ids=["unknown", "not loaded", "no token", "wrong role", "missing input", "unknown input"],
)
def test_refused_inference_names_reason(
    dialect: Dialect, request_: Inference, status: int, words: str
) -> None:
    with pytest.raises(dialect.error) as raised:
        dialect.infer(request_)
    assert dialect.status(raised.value) == status
    assert words in str(raised.value)


def test_inference_past_timeout_is_stopped(dialect: Dialect) -> None:
    endless, three = np.array(models.ENDLESS, np.int64), np.array(3, np.int64)
    with pytest.raises(dialect.error, match="did not end within") as raised:
        dialect.infer(Inference("loop", {"trips": endless}, datatype="INT64", timeout_us=100_000))
    assert dialect.status(raised.value) == 504
    assert dialect.infer(Inference("loop", {"trips": three}, datatype="INT64")).tolist() == 3


def test_model_is_loaded_inferred_and_unloaded(dialect: Dialect, server: Server) -> None:
    if not isinstance(dialect, Triton | Ours):
        pytest.skip("KServe's client has no call for it")
    models.save(models.add(1), server.api.config.repository, "again")
    for _ in range(2):
        dialect.load("again")
        assert dialect.infer(Inference("again", {"x": A})).tolist() == [6, 8]
        dialect.unload("again")
        with pytest.raises(dialect.error, match="not loaded"):
            dialect.infer(Inference("again", {"x": A}))


# KServe's own


def test_kserve_explain_and_v1_are_refused(server: Server, runner: asyncio.Runner) -> None:
    kserve = pytest.importorskip("kserve", reason="KServe's client is not made for this Python")
    import httpx  # noqa: PLC0415 - it comes with KServe

    for protocol, call, error in (
        ("v2", "explain", kserve.errors.UnsupportedProtocol),
        ("v1", "explain", httpx.HTTPStatusError),
        ("v1", "infer", httpx.HTTPStatusError),
    ):
        client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol=protocol))
        with pytest.raises(error):
            getattr(Blocked(client, runner), call)(
                server.url, {"instances": []}, "subtract", headers=headers(server, "predict")
            )
        runner.run(client.close())
