"""`/metrics`: what is counted and measured, in which formats, for whom; counters never decrease.

Dashboard and alert rules name existing metrics, and promtool accepts all of it.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain
from support import models
from support.http import ENDLESS, ONE, LocalApi, local_server, when
from support.models import TEXT
from support.nodes import list_nodes, local_node
from support.pages import FAMILIES
from support.postgres import Database
from support.workers import computing, until

from events.counters import OTHERS
from events.types import Cause
from features.server import GAUGES
from server.app import all_routes
from server.appkeys import LOG, MEMORY_PLAN
from server.errors import ERRORS
from server.observability.metrics import INFERENCE_STAGES, SCRAPES, ServerCollector, negotiate
from server.observability.requestlog import ABORTED, METHODS, NO_ROUTE, OTHER_METHOD

OF_EACH_MODEL = ("worker_exits", "worker_restarts", "inference_failures")
Start = Callable[..., Awaitable[LocalApi]]
Samples = Mapping[str, float]

PATHS = {route.path for route in all_routes()}
INFER = "/v2/models/{id}/infer"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application with room for three models, whose metrics need no token."""
    settings = {"metrics": "open", "max_loaded": 3, "evict": "idle", "min_residency_s": 0}
    async with local_server(tmp_path_factory.mktemp("shared"), **settings) as api:
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def api(shared: LocalApi) -> AsyncIterator[LocalApi]:
    """That application; the models that a test leaves loaded are unloaded after it."""
    yield shared
    for model in (await shared.get("/api/v1/models")).json["models"]:
        if model["state"] == "loaded":
            await shared.unload(model["id"])


def series(name: str, **labels: str) -> str:
    """Return a series' name with its labels, without `loadledger_`."""
    inner = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return name.removeprefix("loadledger_") + (f"{{{inner}}}" if inner else "")


def http(path: str, status: str, method: str = "GET") -> str:
    return series("http_requests_total", method=method, route=path, status=status)


def samples_of(text: str) -> dict[str, float]:
    samples = [sample for family in read_plain(text) for sample in family.samples]
    seen = {series(sample.name, **sample.labels): sample.value for sample in samples}
    assert len(seen) == len(samples)
    return seen


async def metrics(api: LocalApi, **options: Any) -> Samples:
    """Scrape, past what a scrape before may have left."""
    api.app[SCRAPES]._kept_until_s.clear()
    answer = await api.get("/metrics", **options)
    assert answer.status == 200, answer.body
    return samples_of(answer.body.decode())


async def metrics_when(api: LocalApi, holds: Callable[[Samples], bool]) -> Samples:
    return await when(lambda: metrics(api), holds)


def growth(before: Samples, after: Samples, *names: str) -> list[float]:
    """Return by how much each of these series has grown."""
    return [after[name] - before.get(name, 0) for name in names]


async def test_server_counts_and_measures_its_work(start: Start) -> None:
    api = await start(memory_budget="1000000000", inference_queue=7)
    api.save(models.add(), "m")
    before = await metrics(api)
    assert before["jobs_limit"] == 256
    assert before["inference_queue_limit"] == 7
    assert before["memory_budget_bytes"] == 1_000_000_000
    plan = api.app[MEMORY_PLAN]
    parts = {"growth": 125_000_000, "bodies": plan.bodies_bytes, "shared": plan.shared_bytes}
    assert {part: before[series("memory_part_bytes", part=part)] for part in parts} == parts
    assert before["memory_excess_bytes"] == plan.excess_bytes
    assert before["memory_kills_together"] == plan.limit.kills_together
    assert before["memory_used_bytes"] == before["memory_reserved_bytes"] == 0
    assert before["ledger_position"] == api.position
    assert before[series("ledger_events_total", type="ServerStarted")] == 1
    assert {value for name, value in before.items() if name.startswith("healthy")} == {1.0}
    assert not [name for name in before if 'model="' in name]
    await api.load("m")
    seen = await metrics(api)
    zeros = [series("http_errors_total", code=code) for code in ERRORS]
    zeros += [series("loads_total", cause=cause.value, outcome="failed") for cause in Cause]
    zeros += [series(f"{name}_total", model="m") for name in OF_EACH_MODEL]
    assert {seen[name] for name in (*zeros, series("ledger_events_total", type="WorkerExited"))} == {0}
    for _ in range(3):
        assert (await api.infer("m", ONE)).status == 200
    assert (await api.infer("m", {**ONE, "datatype": "INT64"})).status == 400
    seen = await metrics(api)
    assert {name: seen[series(name, model="m")] for name in OF_M} == OF_M
    assert seen[series("inference_duration_seconds_bucket", model="m", le="+Inf")] == 3
    stages = [
        seen[series("inference_stage_seconds_total", model="m", stage=stage)] for stage in INFERENCE_STAGES
    ]
    assert min(stages) > 0
    assert sum(stages) == pytest.approx(seen[series("inference_duration_seconds_sum", model="m")])
    assert seen[series("model_info", model="m", version="1")] == 1
    assert seen[series("model_memory_bytes", model="m")] == seen["memory_used_bytes"] > 0
    assert seen[series("models", state="loaded")] == 1
    assert seen[series("loads_total", cause="request", outcome="completed")] == 1
    assert seen[series("load_duration_seconds_count", outcome="completed")] == 1
    assert seen[series("load_duration_seconds_count", outcome="failed")] == 0
    assert seen[series("load_stage_seconds_total", stage="loading")] > 0
    assert seen["ledger_append_duration_seconds_count"] > before["ledger_append_duration_seconds_count"]
    assert seen["ledger_commit_duration_seconds_sum"] > 0
    assert seen["ledger_size_bytes"] > seen["ledger_wal_size_bytes"] > 0
    assert seen[http(INFER, "2xx", "POST")] == 3
    assert seen[http(INFER, "4xx", "POST")] == 1
    assert seen[series("http_errors_total", code="invalid_input")] == 1
    assert seen[http("/metrics", "2xx")] == 2  # the two before this one
    assert seen[series("http_request_duration_seconds_count", method="GET", route="/metrics")] == 2
    assert seen["process_resident_memory_bytes"] > 0
    assert 0 <= seen["least_recently_used_age_seconds"] < 3600


OF_M = {
    "inference_duration_seconds_count": 3, "inference_failures_total": 1, "inferences_total": 3,
    "inference_executions_total": 3, "inference_in_flight": 0, "model_serving": 1, "model_workers": 1,
}  # fmt: skip


async def test_counters_survive_unload_swap_and_death(api: LocalApi) -> None:
    for version in (1, 2):
        api.save(models.add(), "kept", version)
    api.save(TEXT, "no-model")

    async def infer_and_scrape(earlier: Samples) -> Samples:
        assert (await api.infer("kept", ONE)).status == 200
        seen = await metrics(api)
        for name, value in earlier.items():
            if name.partition("{")[0].endswith(("_total", "_count", "_bucket")):
                assert seen.get(name, -1) >= value, name
        return seen

    begin = await metrics(api)
    await api.load("kept", version=1)
    seen = await infer_and_scrape(begin)
    await api.load("kept", version=2)  # swapped
    seen = await infer_and_scrape(seen)
    await api.unload("kept")
    assert (await metrics(api))[series("inferences_total", model="kept")] == 2
    await api.load("kept")
    seen = await infer_and_scrape(seen)
    os.kill(api.worker("kept").pid, signal.SIGKILL)
    await metrics_when(api, lambda seen: seen.get(series("worker_restarts_total", model="kept")) == 1)
    await api.failed_load("no-model")
    seen = await infer_and_scrape(seen)
    assert growth(
        begin,
        seen,
        series("unloads_total", cause="swap", outcome="completed"),
        series("unloads_total", cause="request", outcome="completed"),
        series("unload_duration_seconds_count", outcome="completed"),
        series("evictions_total", cause="eviction"),
        series("worker_exits_total", model="kept"),
        series("inferences_total", model="kept"),
        series("loads_total", cause="recovery", outcome="completed"),
        series("models", state="failed"),
        series("load_failures_total", code="invalid_model"),
        series("loads_total", cause="request", outcome="failed"),
    ) == [1, 1, 2, 0, 1, 4, 1, 1, 1, 1]
    assert seen[series("model_serving", model="no-model")] == 0


async def test_running_waiting_and_evicted_work_is_measured(api: LocalApi) -> None:
    api.save(models.counting_loop(), "busy")
    idle = ("first", "second", "third")
    for name in idle:
        api.save(models.add(), name)
    await api.load("busy")
    is_computing = computing(api.worker("busy").pid)
    running = asyncio.create_task(api.infer("busy", ENDLESS))
    await until(is_computing)
    begin = await metrics(api)
    for name in idle:
        await api.load(name)
    seen = await metrics(api)
    assert seen[series("inference_in_flight", model="busy")] == 1
    assert growth(begin, seen, series("evictions_total", cause="eviction")) == [1]
    [evicted] = [name for name in idle if series("model_workers", model=name) not in seen]
    assert seen[series("inferences_total", model=evicted)] == 0
    unload = (await api.post("/api/v1/models/busy/unload")).json
    await api.job_when(unload["id"], stage="draining")
    seen = await metrics(api)
    assert seen[series("jobs", kind="unload", status="in_progress")] == 1
    assert seen[series("jobs", kind="load", status="pending")] == 0
    assert seen["oldest_job_age_seconds"] > 0
    assert series("model_serving", model="busy") not in seen
    await api.unload("busy", force=True)
    assert (await running).status == 503


async def test_streams_are_measured_and_invented_names_make_no_series(api: LocalApi) -> None:
    begin = await metrics(api)
    headers = {"Authorization": f"Bearer {api.token('audit')}"}
    async with api.session.get(f"{api.url}/api/v1/events/stream?after=0", headers=headers) as stream:
        await stream.content.readuntil(b"event: live")
        seen = await metrics(api)
        assert (seen["streams"], seen["tail_lag_events"]) == (1, 0)
        assert http("/api/v1/events/stream", "2xx") not in seen
    api.save(models.add(), "named")
    await api.load("named")
    for number in range(3):
        made_up = f"made-up-{number}"
        for path in (f"/{made_up}", f"/api/v1/jobs/{made_up}", f"/v2/models/{made_up}", f"/?{made_up}=1"):
            await api.get(path, subject=made_up)
        assert (await api.infer(made_up, ONE)).status == 404
        assert (await api.post(f"/api/v1/models/{made_up}/load")).status == 404
        assert (await api.infer("named", ONE, version=100 + number)).status == 503
        async with api.session.request("PROPFIND", f"{api.url}/metrics") as answer:
            assert answer.status == 401
    seen = await metrics_when(api, lambda seen: http("/api/v1/events/stream", ABORTED) in seen)
    assert seen["streams"] == 0
    assert not [name for name in seen if "duration" in name and "/stream" in name]
    assert not [name for name in seen if "made" in name.lower()]
    assert growth(begin, seen, http(NO_ROUTE, "4xx"), http(NO_ROUTE, "4xx", OTHER_METHOD)) == [3, 3]
    requests = next(
        each for each in ServerCollector(api.app, ()).collect() if each.name.endswith("http_requests")
    )
    assert {sample.labels["route"] for sample in requests.samples} <= {NO_ROUTE, *PATHS}
    assert {sample.labels["method"] for sample in requests.samples} <= METHODS | {OTHER_METHOD}


async def test_models_beyond_the_limit_are_counted_together(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = api.app[LOG].tally.names
    monkeypatch.setattr(names, "most", len(names._own) + 1)
    for name in ("a", "b", "c"):
        api.save(models.add(), name)
        await api.load(name)
        assert (await api.infer(name, ONE)).status == 200
    seen = await metrics(api)
    assert seen[series("inferences_total", model="a")] == 1
    assert seen[series("inferences_total", model=OTHERS)] == 2
    assert seen[series("model_workers", model=OTHERS)] == 2
    serving = {name: value for name, value in seen.items() if name.startswith("model_serving") and value}
    assert serving == {series("model_serving", model=name): 1 for name in ("a", OTHERS)}
    await api.unload("b")
    api.save(TEXT, "broken")
    await api.failed_load("broken")
    seen = await metrics(api)
    assert seen[series("inferences_total", model=OTHERS)] == 2
    assert seen[series("model_serving", model=OTHERS)] == 0


OPENMETRICS = "application/openmetrics-text"


def test_format_is_negotiated() -> None:
    formats = {
        "": "text/plain",
        "*/*": "text/plain",
        "text/plain;version=0.0.4;q=0.2, */*;q=0.1": "text/plain",
        "text/plain;version=1.0.0;escaping=allow-utf-8": "text/plain",
        f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5, text/plain;q=0.3": OPENMETRICS,
        f"{OPENMETRICS}; version=0.0.1, {OPENMETRICS}; version=1.0.0": OPENMETRICS,
        OPENMETRICS: OPENMETRICS,
        f"{OPENMETRICS}; version=made-up": "text/plain",
        "application/json": "text/plain",
        ";=,;;version": "text/plain",
    }
    assert {accept: negotiate(accept) for accept in formats} == formats


async def test_scrape_formats_and_sharing(api: LocalApi) -> None:
    for _ in range(3):
        answer = await api.get("/metrics", roles=())
        assert (answer.status, "RateLimit" in answer.headers) == (200, False)
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await api.get("/api/v1/resources", roles=())).refusal == (401, "no_credentials")
    answer = await api.get("/metrics", headers={"Accept": OPENMETRICS, "Accept-Encoding": "gzip"})
    assert answer.headers["Content-Type"] == f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
    assert answer.headers["Content-Encoding"] == "gzip"  # the test's client has unpacked it
    families = list(read_openmetrics(answer.body.decode()))  # type: ignore[no-untyped-call]
    assert {family.unit for family in families} >= {"seconds", "bytes", "ratio"}
    api.app[SCRAPES]._kept_until_s.clear()
    answers = await asyncio.gather(*(api.get("/metrics") for _ in range(20)))
    assert len({answer.body for answer in answers}) == 1
    leaving = asyncio.create_task(api.app[SCRAPES].body(api.app, "text/plain"))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert (await metrics(api))["ledger_position"] == api.position


async def test_page_lists_every_family(api: LocalApi) -> None:
    api.save(models.add(), "m")
    await api.load("m")
    await api.infer("m", ONE)
    found = [
        family
        for family in ServerCollector(
            api.app, [gauge for read in GAUGES for gauge in await read(api.app)]
        ).collect()
        if family.name.startswith("loadledger_")
    ]
    listed = {family.name.removesuffix("_total"): family for family in FAMILIES}
    assert {family.name: (family.type, family.documentation) for family in found} == {
        name: (family.kind, family.text) for name, family in listed.items()
    }
    for family in found:
        for sample in family.samples:
            assert sample.name in listed[family.name].series
            assert sample.labels.keys() - {"le"} == listed[family.name].labels, sample


async def test_each_node_has_its_own_models_and_sees_all_nodes(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a, local_node(ledger, tmp_path, "b") as b:
        a.save(models.add(), "m")
        home, other = (a, b) if (await a.load("m"))["node"] == "a" else (b, a)
        await other.model_when("m", state="loaded")
        known = {"a": False, "b": False}
        await when(
            lambda: list_nodes(a), lambda nodes: {each: nodes[each]["late"] for each in nodes} == known
        )
        serving = series("model_serving", model="m")
        assert (await metrics(home))[serving] == 1
        assert serving not in await metrics(other)
        seen = await metrics(a)
        assert [seen[series("node_late", node=name)] for name in known] == [0, 0]
        phases = {
            phase: seen[series("nodes", phase=phase)] for phase in ("joined", "draining", "left", "lost")
        }
        assert phases == {"joined": 2, "draining": 0, "left": 0, "lost": 0}
        [(release, own)] = [(name, value) for name, value in seen.items() if name.startswith("node_info")]
        assert ('node="a"' in release, own) == (True, 1)


async def test_server_alone_has_no_series_of_nodes(shared: LocalApi) -> None:
    assert not [name for name in await metrics(shared) if name.startswith("node")]


ROOT = Path(__file__).parents[3]
FILES = ROOT / "deploy" / "metrics"
SCALER = ROOT / "deploy" / "kubernetes" / "keda.yaml"
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


def scaler_queries() -> Iterator[str]:
    scaled = yaml.safe_load(SCALER.read_text(encoding="utf-8"))
    yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])


def queries() -> Iterator[str]:
    yield from dashboard_queries()
    yield from scaler_queries()
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


async def test_alerts_select_existing_label_values(api: LocalApi) -> None:
    text = ALERTS.read_text(encoding="utf-8")
    checks = {name for value in re.findall(r'check[!=]~?"([\w|]+)"', text) for name in value.split("|")}
    for label, values, existing in (
        ("outcome", re.findall(r'outcome="(\w+)"', text), {"completed", "failed", "cancelled"}),
        ("resource", re.findall(r'resource="(\w+)"', text), {"memory", "cpu"}),
        ("check", checks, (await api.get("/health/ready")).json["checks"].keys()),
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
        "loadledger_memory_part_bytes",  # of the start, like the two below: the log and the console say more
        "loadledger_memory_excess_bytes",
        "loadledger_memory_kills_together",
    }
    assert {family.name for family in FAMILIES} - used == unused


async def test_promtool_accepts_rules_queries_and_metrics(api: LocalApi, tmp_path: Path) -> None:
    program = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not here: .ci/promtool fetches it, and PROMTOOL names it")
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate((*dashboard_queries(), *scaler_queries()))
    ]
    dashboard = tmp_path / "queries.yaml"
    dashboard.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    api.save(models.add(), "m")
    await api.load("m")
    assert (await api.infer("m", ONE)).status == 200
    text = (await api.get("/metrics")).body
    for command, file, given in (
        ("check rules", ALERTS, b""),
        ("test rules", ALERTS_TEST, b""),
        ("check rules", dashboard, b""),
        ("check metrics", None, text),
    ):
        arguments = [program, *command.split(), *([str(file)] if file is not None else [])]
        done = await asyncio.to_thread(
            subprocess.run, arguments, input=given, capture_output=True, timeout=120, cwd=FILES, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
