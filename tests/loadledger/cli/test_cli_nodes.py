"""`loadledger nodes` and `drain`: against real nodes, and what ends a wait."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from support.answers import fill
from support.clients import Shell
from support.http import LocalApi
from support.models import add
from support.nodes import list_nodes, local_node
from support.postgres import Database

from answers.nodes import NodeInfo, NodeJob, NodeModel
from features.nodes.cli import _wait_until_drained


async def run(api: LocalApi, command: str, **environment: Any) -> Result:
    """Run a command against a server of this process."""
    return await asyncio.to_thread(Shell(api, "admin").run, *command.split(), **environment)


async def prints(api: LocalApi, command: str, **environment: Any) -> str:
    result = await run(api, command, **environment)
    assert result.exit_code == 0, result.output
    return result.stdout


async def test_nodes_lists_what_runs_where_and_drain_waits(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a, local_node(ledger, tmp_path, "b") as b:
        a.save(add(), "m")
        home = (await a.load("m"))["node"]
        other = "b" if home == "a" else "a"
        for api in (a, b):  # each follows the ledger by itself
            await api.model_when("m", state="loaded")
        listed = await prints(b, "nodes")
        assert listed.splitlines()[0].split() == [
            *("NODE", "PHASE", "MODELS", "JOBS", "BUDGET", "RENEWED", "ATTRIBUTES", "ADDRESS", "RELEASE")
        ]
        assert re.search(rf"^{home}( \*)? +joined +m +-", listed, re.MULTILINE)
        assert re.search(r"^b \* ", listed, re.MULTILINE)
        assert re.search(r" NODE$", (await prints(b, "models")).splitlines()[0])
        assert re.search(rf" {home}$", (await prints(a, "jobs")).splitlines()[1])
        assert re.search(rf"^ +node: +{home}$", await prints(b, "show m"), re.MULTILINE)

        drained = await run(b, f"drain {home} --wait --timeout-s 100")
        assert drained.exit_code == 0, drained.output
        assert re.fullmatch(rf"{home}: drained in \d+(\.\d)?s\n", drained.stdout)
        assert f"{home}: 1 model" in drained.stderr
        again = json.loads(await prints(b, f"drain {home} --json"))
        assert (again["phase"], again["models"], again["jobs"]) == ("draining", [], [])
        found = json.loads(await prints(b, "nodes --json"))["nodes"]
        assert {node["id"]: len(node["models"]) for node in found} == {home: 0, other: 1}


async def test_last_node_is_drained_only_once_it_has_no_model(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a:
        a.save(add(), "m")
        await a.load("m")
        refused = await run(a, "drain a --wait")
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "a is not drained, 1 model left: no other node takes loads" in refused.stderr
        assert (await list_nodes(a))["a"]["phase"] == "joined"
        assert "a: draining, 1 model left\n" in await prints(a, "drain a")
        unknown = await run(a, "drain never")
        assert (unknown.exit_code, "`loadledger nodes` lists them" in unknown.stderr) == (2, True)
        assert (await run(a, "drain a --timeout-s 9")).exit_code == 2
        await a.unload("m")
        # through the data directory, without a token
        data, local = a.config.data, {"LOADLEDGER_TOKEN": "", "LOADLEDGER_URL": ""}
        assert re.search(r"^a \* +draining", await prints(a, f"nodes --data {data}", **local), re.MULTILINE)
        named = {**local, "LOADLEDGER_DATA": str(data), "LOADLEDGER_NODE_NAME": "a"}
        assert re.fullmatch(r"a: drained in \d.*\n", await prints(a, "drain --wait", **named))
        unknown = await run(a, f"drain never --data {data}", **local)
        assert (unknown.exit_code, "(unknown_node)" in unknown.stderr) == (2, True)
    stopped = await run(a, f"drain a --data {data}", **local)
    assert (stopped.exit_code, "no server runs there" in stopped.stderr) == (2, True)


async def test_server_alone_shows_no_nodes_and_a_new_one_no_models(api: LocalApi) -> None:
    assert await prints(api, "models") == "the repository has no models\n"
    api.save(add(), "m")
    assert await prints(api, "ps") == "no model is loaded\n"
    assert "`loadledger models`" in (await run(api, "unload --active")).stderr
    assert "none is loaded now" in (await run(api, "unload")).stderr
    await api.load("m")
    assert await prints(api, "nodes") == "this server is alone: servers with --ledger are nodes\n"
    for command in ("models", "jobs", "show m"):
        shown = await prints(api, command)
        assert ("node" in shown.lower(), "\x1b" in shown) == (False, False)
    coloured = await prints(api, "models", color=True, NO_COLOR="")
    assert "\x1b[32mloaded\x1b[0m" in coloured
    plain = await prints(api, "models", color=True, NO_COLOR="1")
    age = re.compile(r"[\d.]+s +")  # of the load: a moment passes between the two tables
    assert age.sub("", click.unstyle(coloured)) == age.sub("", plain)


# What ends a wait

HERE = fill(
    NodeInfo,
    id="a",
    phase="draining",
    models=[NodeModel(id="m", version=1, state="loaded")],
    jobs=[fill(NodeJob, id="j", kind="load", model_id="m", status="pending")],
)
OTHER = fill(NodeInfo, id="b", phase="joined")


class Scripted:
    """Nodes as they are seen one look after the other; the last look stays."""

    def __init__(self, *looks: list[NodeInfo]) -> None:
        self._looks = list(looks)

    def nodes(self) -> list[NodeInfo]:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]

    def drain(self, node_id: str) -> NodeInfo:
        return next(node for node in self.nodes() if node.id == node_id)


def test_wait_goes_on_until_nothing_is_left_or_the_node_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    fewer = fill(NodeInfo, id="a", phase="draining", models=HERE.models)
    empty = fill(NodeInfo, id="a", phase="draining")
    nodes = Scripted([HERE, OTHER], [fewer, OTHER], [empty, OTHER])
    assert _wait_until_drained(nodes, HERE, None) is empty
    assert re.findall(r"a: (.+) \(", capsys.readouterr().err) == ["1 model and 1 job left", "1 model left"]
    left = fill(NodeInfo, id="a", phase="left")
    assert _wait_until_drained(Scripted([left]), HERE, None) is left


@pytest.mark.parametrize(
    ("nodes", "timeout_s", "reason"),
    [
        ([HERE], None, "no other node takes loads any more"),
        ([HERE, fill(NodeInfo, id="b", phase="draining")], None, "no other node takes loads any more"),
        ([fill(NodeInfo, id="a", phase="lost"), OTHER], None, "it was lost meanwhile"),
        ([fill(NodeInfo, id="a", phase="joined", epoch=2), OTHER], None, "it has joined again"),
        ([HERE, OTHER], 0, "the 0 s of --timeout-s are over"),
    ],
)
def test_wait_fails_when_nothing_can_move(
    nodes: list[NodeInfo], timeout_s: int | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _wait_until_drained(Scripted(nodes), HERE, timeout_s)
    assert ended.value.code == 1
    assert reason in capsys.readouterr().err
