"""Dashboard, alert rules and the metrics page name existing metrics; promtool accepts all of it."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import models
from support.http import ONE, LocalApi
from support.pages import FAMILIES

ROOT = Path(__file__).parents[3]
FILES = ROOT / "deploy" / "metrics"
ALERTS, ALERTS_TEST, DASHBOARD = (
    FILES / name for name in ("alerts.yaml", "alerts-test.yaml", "dashboard.json")
)
SERIES = {series: family for family in FAMILIES for series in family.series}
NOT_OURS = {"up", "process_resident_memory_bytes"}
"""Series of Prometheus itself, and of the client library."""
EVERYWHERE = {"instance", "job", "le", "alertname", "alertstate", "severity"}
SELECTOR = re.compile(r"\b([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
NAME = re.compile(r"\b(?:loadledger_\w+|process_\w+|up)\b")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
GROUPED = re.compile(r"\b(?:by|on|without|ignoring|group_left)\s*\(([^)]*)\)")


def alert_rules() -> list[Any]:
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rules: list[Any] = group["rules"]
    return rules


def dashboard_queries() -> Iterator[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert found is not None
            yield f"count by ({found[2]}) ({found[1]})"


def queries() -> Iterator[str]:
    yield from dashboard_queries()
    yield from (rule["expr"] for rule in alert_rules())


def test_queries_name_existing_metrics_and_labels() -> None:
    for query in queries():
        names = set(NAME.findall(query))
        assert names, query
        assert names - NOT_OURS <= SERIES.keys(), query
        of_all = {label for name in names & SERIES.keys() for label in SERIES[name].labels} | EVERYWHERE
        for name, labels in SELECTOR.findall(query):
            known = set(SERIES[name].labels) if name in SERIES else set()
            assert set(LABEL.findall(labels)) <= known | EVERYWHERE, query
        for labels in GROUPED.findall(query):
            assert {label.strip() for label in labels.split(",") if label.strip()} <= of_all, query


async def test_alerts_select_existing_label_values(shared: LocalApi) -> None:
    text = ALERTS.read_text(encoding="utf-8")
    checks = {name for value in re.findall(r'check[!=]~?"([\w|]+)"', text) for name in value.split("|")}
    for label, values, existing in (
        ("outcome", re.findall(r'outcome="(\w+)"', text), {"completed", "failed", "cancelled"}),
        ("resource", re.findall(r'resource="(\w+)"', text), {"memory", "cpu"}),
        ("check", checks, (await shared.get("/health/ready")).json["checks"].keys()),
    ):
        assert values, label
        assert set(values) <= existing, label


def test_each_alert_has_a_description_a_severity_and_a_test() -> None:
    rules = alert_rules()
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description"}
    tested = re.findall(r'alertname="(\w+)"', ALERTS_TEST.read_text(encoding="utf-8"))
    assert {rule["alert"] for rule in rules} == set(tested)


def test_dashboard_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x, y in product(range(place["w"]), range(place["h"]))
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    used = {SERIES[name].name for query in queries() for name in NAME.findall(query) if name in SERIES}
    unused = {
        "loadledger_inferences_total",  # requests are what people count; this is for batches
        "loadledger_inference_executions_total",
        "loadledger_model_info",
        "loadledger_model_workers",
        "loadledger_node_info",
    }
    assert {family.name for family in FAMILIES} - used == unused


async def test_promtool_accepts_rules_queries_and_metrics(shared: LocalApi, tmp_path: Path) -> None:
    program = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not here: .ci/promtool fetches it, and PROMTOOL names it")
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(dashboard_queries())
    ]
    dashboard = tmp_path / "queries.yaml"
    dashboard.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    shared.save(models.add(), "m")
    await shared.load("m")
    assert (await shared.infer("m", ONE)).status == 200
    metrics = (await shared.get("/metrics")).body
    for command, file, given in (
        ("check rules", ALERTS, b""),
        ("test rules", ALERTS_TEST, b""),
        ("check rules", dashboard, b""),
        ("check metrics", None, metrics),
    ):
        arguments = [program, *command.split(), *([str(file)] if file is not None else [])]
        done = await asyncio.to_thread(
            subprocess.run, arguments, input=given, capture_output=True, timeout=120, cwd=FILES, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
