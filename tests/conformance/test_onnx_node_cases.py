"""ONNX's conformance cases over HTTP and gRPC with binary tensors: all that bare ONNX Runtime passes.

`make conformance` runs all of them; without CONFORMANCE=all a sample runs.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from conformance.onnxcases import Asked, Case, cases, compare
from support import models
from support.clients import Value, binary_answer, binary_request
from support.http import LIMIT_S
from support.servers import INFORMED, bearer, grpc_address, serving
from support.tritongrpc import triton_message

from runtime.repository import DEFAULTS_FILE
from server.config import Config

ALL = os.environ.get("CONFORMANCE") == "all"
LEAST = 1300 if ALL else 34
"""Cases that have to be asked; all are 1,379 with onnx 1.23 and ONNX Runtime 1.31."""
AT_ONCE = 4
"""Two cores stay busy while models are written or loaded."""
NO_WARM_UP = "warm_up.enabled = false\n"
"""For each case's loadledger.toml: 82 cases (onnx 1.23) take no zeros, as for a shape or a divisor."""
NAMELESS = {"sequence", "optional sequence", "map", "sparse_tensor"}
"""Left out, with the element types below; nothing else may be."""
NAMELESS_ELEMENTS = ("FLOAT8", "FLOAT4", "INT4", "UINT4", "INT2", "UINT2", "COMPLEX")


@pytest.fixture(scope="module", params=[1, 2] if ALL else [2], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> int:
    """Threads of each model, and of each bare session."""
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, threads: int) -> list[Case]:
    """The cases, and the answers of bare ONNX Runtime."""
    return cases(tmp_path_factory.mktemp("cases"), threads=threads, sample=not ALL)


async def test_answers_equal_those_of_bare_onnx_runtime(
    found: list[Case], threads: int, tmp_path: Path
) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    wrong = await answers(found, config, f"--threads={threads}")
    print(summary(found, wrong))
    assert list(wrong) == []
    assert sum(bool(case.asked) for case in found) >= LEAST


def test_only_types_unknown_to_the_protocol_are_left_out(found: list[Case]) -> None:
    left_out = {case.unnamed for case in found if case.unnamed}
    elements = {name for name in left_out if name.startswith(NAMELESS_ELEMENTS)}
    assert elements
    assert left_out - elements <= NAMELESS
    assert all(bool(case.asked) + bool(case.unnamed) + bool(case.failed) == 1 for case in found)


async def answers(found: Sequence[Case], config: Config, *arguments: str) -> dict[str, str]:
    """Load, ask and unload each case, some at once; return what is wrong with which."""
    config.repository.mkdir()
    wrong: dict[str, str] = {}
    waiting = iter([case for case in found if case.asked])
    limits = ("--limit-management=off", "--limit-inference=off")
    async with (
        serving(config, "--grpc-port=0", *limits, *arguments, environment=INFORMED) as server,
        aiohttp.ClientSession(server.url, headers=bearer(server, "admin")) as session,
        grpc.aio.insecure_channel(grpc_address(server), [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        asker = Asker(session, channel, bearer(server, "infer")["Authorization"], config.repository)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(asker.ask_in_turn(waiting, wrong))
        await asker.post("/v2/repository/index")
    return wrong


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks a server for the answers to cases, over HTTP and over gRPC."""

    session: aiohttp.ClientSession
    channel: grpc.aio.Channel
    authorization: str
    repository: Path

    async def ask_in_turn(self, waiting: Iterator[Case], wrong: dict[str, str]) -> None:
        for case in waiting:
            models.save_bytes(case.model, self.repository, case.name)
            (self.repository / case.name / DEFAULTS_FILE).write_text(NO_WARM_UP)
            try:
                await self.ask(case)
            except (AssertionError, grpc.aio.AioRpcError) as error:
                wrong[case.name] = str(error).strip()[:300]

    async def ask(self, case: Case) -> None:
        await self.post(f"/v2/repository/models/{case.name}/load")
        for asked in case.asked:
            headers, body = binary_request(asked.inputs)
            answer = await self.post(f"/v2/models/{case.name}/infer", headers=headers, data=body)
            check(case, asked, binary_answer(*answer))
            check(case, asked, await self.infer(case.name, asked.inputs))
        await self.post(f"/v2/repository/models/{case.name}/unload")

    async def post(self, path: str, **options: Any) -> tuple[Mapping[str, str], bytes]:
        async with asyncio.timeout(LIMIT_S), self.session.post(path, **options) as response:
            body = await response.read()
            assert response.status == 200, f"{path}: {response.status} {body[:300]!r}"
            return response.headers, body

    async def infer(self, name: str, inputs: Sequence[Value]) -> dict[str, Value]:
        """Return the outputs of ModelInfer; each has a raw tensor."""
        request = triton_message("ModelInferRequest")(model_name=name)
        for value in inputs:
            request.inputs.add(name=value.name, datatype=value.datatype, shape=value.shape)
            request.raw_input_contents.append(value.data)
        call = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=type(request).SerializeToString,
            response_deserializer=triton_message("ModelInferResponse").FromString,
        )
        metadata = (("authorization", self.authorization),)
        response = await call(request, timeout=LIMIT_S, metadata=metadata)
        pairs = zip(response.outputs, response.raw_output_contents, strict=True)
        return {each.name: Value(each.name, each.datatype, tuple(each.shape), raw) for each, raw in pairs}


def check(case: Case, asked: Asked, outputs: Mapping[str, Value]) -> None:
    compare(asked.expected, outputs, case.rtol, case.atol)
    if asked.repeats:
        assert outputs == asked.answered


def summary(found: Sequence[Case], wrong: Mapping[str, str]) -> str:
    """Return the counts, and what is wrong with which."""
    asked = sum(bool(case.asked) for case in found)
    unnamed = Counter(case.unnamed for case in found if case.unnamed)
    failed = Counter(case.failed.partition(":")[0] for case in found if case.failed)
    lines = [
        f"{len(found)} cases: {asked} asked over HTTP and gRPC, {asked - len(wrong)} answered as expected",
        f"left out, types without a name in the protocol: {total(unnamed)}",
        f"left out, bare ONNX Runtime does not pass: {total(failed)}",
        *(f"{name}: {what}" for name, what in wrong.items()),
    ]
    return "\n".join(lines)


def total(counts: Counter[str]) -> str:
    parts = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    return f"{counts.total()} ({parts})"
