"""Traces of a real server, exported to a collector: request, job and stages are one trace."""

import json
import subprocess
import sys

from support import models
from support.http import Json
from support.models import save
from support.servers import Server, serving
from support.telemetry import Collector, Taken, collecting

from server.config import Config
from server.serve import INSTALL_OTEL

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "a=1,b=2"}
UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
FORWARDED = {"X-Forwarded-For": "203.0.113.9, 192.0.2.1"}
SERVER_KIND = 2
LOAD, INFER = "POST /api/v1/models/{id}/load", "POST /v2/models/{id}/infer"
LOUD = {"LOADLEDGER_LOG_LEVEL": "info", "LOADLEDGER_LOG_FORMAT": "json"}
QUESTION = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]}


async def load(server: Server, model: str = "m", **headers: str) -> Json:
    answer = await server.api.post(f"/api/v1/models/{model}/load", wait=60, headers=headers)
    return answer.json


async def infer(server: Server, **headers: str) -> int:
    answer = await server.api.post("/v2/models/m/infer", roles=("predict",), json=QUESTION, headers=headers)
    return answer.status


def inside(collector: Collector, outer: Taken) -> list[str]:
    return [span.name for span in collector.children(outer)]


async def test_request_job_and_stages_join_the_callers_trace(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with collecting() as collector:
        environment = {**collector.environment, **LOUD, "OTEL_SERVICE_NAME": "shop-models"}
        async with serving(config, "--trusted-proxies=127.0.0.1", environment=environment) as server:
            job = await load(server, **SAMPLED, **FORWARDED)
            assert await infer(server, **SAMPLED, **FORWARDED) == 200
            await collector.until(lambda: bool(collector.named("load") and collector.named(INFER)))
            await server.api.unload("m")
            assert await server.stop() == 0  # what was not sent yet is sent now
            told = [json.loads(line) for line in server.output.read_text().splitlines()]
        (request,), (load_job,) = collector.named(LOAD), collector.named("load")
        (inference,), (unload_job,) = collector.named(INFER), collector.named("unload")
    for span in (request, load_job, inference):
        assert (span.trace_id, span.state, span.failed) == (TRACE_ID, "a=1,b=2", False)
        assert span.resource["service.name"] == "shop-models"
    assert (request.parent_id, request.kind) == (SPAN_ID, SERVER_KIND)
    assert (inference.parent_id, inference.kind) == (SPAN_ID, SERVER_KIND)
    assert load_job.parent_id == request.span_id
    for span in (request, inference):
        assert span.attributes["client.address"] == "192.0.2.1"  # whom the proxy names, and not the proxy
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/api/v1/models/{id}/load"
    assert request.attributes["loadledger.job"] == load_job.attributes["loadledger.job"] == job["id"]
    assert (load_job.attributes["loadledger.model"], load_job.attributes["loadledger.version"]) == ("m", 1)
    stages = ["waiting", "starting", "loading", "warming_up", "measuring"]
    assert inside(collector, load_job) == stages
    for stage in collector.children(load_job):
        assert load_job.began_ns <= stage.began_ns <= stage.ended_ns <= load_job.ended_ns
    assert [line["trace_id"] for line in told if line.get("job") == job["id"]] == [TRACE_ID] * 4
    assert unload_job.trace_id != TRACE_ID  # its request named none
    assert inside(collector, unload_job) == ["waiting", "draining"]


async def test_unsampled_requests_are_not_exported(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    async with collecting() as collector:
        arguments = ("--trace-inferences=0", "--otel=on")
        async with serving(config, *arguments, environment=collector.environment | LOUD) as server:
            await load(server, **UNSAMPLED)
            assert [await infer(server), await infer(server, **UNSAMPLED)] == [200, 200]
            malformed = SAMPLED | {"traceparent": "00-zz-00-01"}  # as if it had not come
            assert await infer(server, **malformed) == 200
            (config.repository / "m" / "2").mkdir()
            (config.repository / "m" / "2" / "model.onnx").write_bytes(b"no model")
            assert (await load(server, **malformed))["status"] == "failed"
            assert await infer(server, **UNSAMPLED, tracestate="A=1,=") == 200
            await server.stop()
            told = [json.loads(line) for line in server.output.read_text().splitlines()]
        assert not [
            line for line in told if line["logger"].startswith("opentelemetry")
        ]  # anybody could fill it
        assert not collector.named(INFER)
        (request,), (job,) = (collector.named(name) for name in (LOAD, "load"))
        assert request.state == ""
        assert request.trace_id != TRACE_ID
        assert (job.failed, job.attributes["error.type"]) == (True, "invalid_model")
        assert (request.failed, request.parent_id, job.parent_id) == (False, "", request.span_id)
        assert request.resource["service.name"] == "loadledger"


async def test_unreachable_collector_costs_only_spans(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}  # discard: nobody listens
    async with serving(config, environment=environment) as server:
        assert (await load(server, **SAMPLED))["status"] == "completed"
        assert await infer(server, **SAMPLED) == 200
        assert await server.stop() == 0


def test_otel_without_the_extra_names_the_install_command(config: Config) -> None:
    hidden = "import sys; sys.modules['opentelemetry'] = None; from loadledger.__main__ import main; main()"
    places = [f"--repository={config.repository}", f"--data={config.data}"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", hidden, "serve", "--port=0", "--otel=on", *places],
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert INSTALL_OTEL in done.stderr
    assert "Traceback" not in done.stderr


def test_server_does_not_import_opentelemetry_by_itself() -> None:
    code = "import json, sys, server.serve; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not [name for name in json.loads(done.stdout) if name.startswith(("opentelemetry", "google"))]
