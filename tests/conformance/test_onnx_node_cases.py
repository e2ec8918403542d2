"""ONNX's conformance cases over HTTP with binary tensors: all that bare ONNX Runtime passes.

`make conformance` runs all of them; without CONFORMANCE=all a sample runs.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conformance.onnxcases import Asked, Case, cases, compare
from support import models
from support.clients import Value, binary_answer, binary_request
from support.http import LIMIT_S
from support.servers import bearer, serving

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
    async with (
        serving(config, "--limit-management=off", "--limit-inference=off", *arguments) as server,
        aiohttp.ClientSession(server.url, headers=bearer(server, "admin")) as session,
    ):
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(ask_in_turn(waiting, session, config.repository, wrong))
        await post(session, "/v2/repository/index")
    return wrong


async def ask_in_turn(
    waiting: Iterator[Case], session: aiohttp.ClientSession, repository: Path, wrong: dict[str, str]
) -> None:
    for case in waiting:
        models.save_bytes(case.model, repository, case.name)
        (repository / case.name / DEFAULTS_FILE).write_text(NO_WARM_UP)
        try:
            await ask(case, session)
        except AssertionError as error:
            wrong[case.name] = str(error).strip()[:300]


async def ask(case: Case, session: aiohttp.ClientSession) -> None:
    await post(session, f"/v2/repository/models/{case.name}/load")
    for asked in case.asked:
        headers, body = binary_request(asked.inputs)
        answer = await post(session, f"/v2/models/{case.name}/infer", headers=headers, data=body)
        check(case, asked, binary_answer(*answer))
    await post(session, f"/v2/repository/models/{case.name}/unload")


async def post(session: aiohttp.ClientSession, path: str, **options: Any) -> tuple[Mapping[str, str], bytes]:
    async with asyncio.timeout(LIMIT_S), session.post(path, **options) as response:
        body = await response.read()
        assert response.status == 200, f"{path}: {response.status} {body[:300]!r}"
        return response.headers, body


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
        f"{len(found)} cases: {asked} asked over HTTP, {asked - len(wrong)} of them answered as expected",
        f"left out, types without a name in the protocol: {total(unnamed)}",
        f"left out, bare ONNX Runtime does not pass: {total(failed)}",
        *(f"{name}: {what}" for name, what in wrong.items()),
    ]
    return "\n".join(lines)


def total(counts: Counter[str]) -> str:
    parts = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    return f"{counts.total()} ({parts})"
