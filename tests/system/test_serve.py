"""The command `serve` as a process: how it starts, what its children are, and how it ends."""

import asyncio
import os
import resource
import signal
from pathlib import Path

import aiohttp
import pytest
from support import models
from support.http import LIMIT_S, Json, when
from support.models import save, save_bytes
from support.process import MODULE, SCRIPT, Server, clean_environment, events, serving, verified
from support.workers import computing, descriptors, freeze, until
from yarl import URL

from events.types import ServerStarted, ServerStopped
from server.config import Config, settings


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "repository").mkdir()
    return Config(repository=tmp_path / "repository", data=tmp_path / "data")


def floats(*values: float) -> Json:
    return {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}


def trips(count: int) -> Json:
    return {"name": "trips", "shape": [], "datatype": "INT64", "data": [count]}


def mapped_files(pid: int) -> str:
    """Return what a process has mapped: the compiled part of each library that it has imported is there."""
    return Path(f"/proc/{pid}/maps").read_text()


async def computed(server: Server, count: int) -> asyncio.Task[Json]:
    """Ask for so many trips, and return when the worker is at it."""
    is_computing = computing(server.worker())
    running = asyncio.create_task(server.api.infer("m", trips(count)))
    await until(is_computing)
    return running


async def in_flight(server: Server) -> int:
    """Return how many inferences the worker has been given that have not ended."""
    [use] = (await server.api.get("/api/v1/resources")).json["models"]
    number: int = use["in_flight"]
    return number


async def listens_no_more(server: Server) -> None:
    """Wait until the server takes no new connections, which is how it begins to stop."""
    url = URL(server.url)
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(url.host, url.port)
            except ConnectionError:  # refused, or reset when it was in the backlog
                return
            writer.close()


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
async def test_it_says_where_it_listens_serves_and_ends_in_order_and_no_child_has_the_http_stack(
    config: Config, command: tuple[str, ...]
) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config, command=command) as server:
        await server.api.load("m")
        assert (await server.api.infer("m", floats(1))).json["outputs"][0]["data"] == [2]
        children = server.children()
        assert len(children) == 2  # the fork server and one worker
        for child in children:
            assert "onnxruntime" in mapped_files(child)
            for library in ("aiohttp", "yarl", "uvloop", "sqlite"):
                assert library not in mapped_files(child)
        assert await server.stop() == 0
        await server.nothing_left()
        assert server.process.stdout is not None
        assert await server.process.stdout.read() == b""
        assert server.output.read_text() == ""
    assert verified(config).events == len(await events(config))
    log = await events(config)
    assert (log[0].data, log[-1].data) == (ServerStarted(unclean=False), ServerStopped())
    assert (config.data.stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGTERM, False), (signal.SIGINT, True)],
    ids=["SIGTERM, as from a service manager", "SIGINT to the group, as from a terminal"],
)
async def test_a_signal_to_stop_lets_a_running_inference_end(
    config: Config, number: signal.Signals, *, to_group: bool
) -> None:
    save(models.counting_loop(), config.repository, "m")
    async with serving(config) as server:
        await server.api.load("m")
        worker = server.worker()
        await freeze(worker)  # so that the inference has not ended when the server stops
        running = asyncio.create_task(server.api.infer("m", trips(20_000)))
        await when(lambda: in_flight(server), bool)
        stopping = asyncio.create_task(server.stop(number, to_group=to_group))
        await listens_no_more(server)
        assert not running.done()
        os.kill(worker, signal.SIGCONT)
        assert await stopping == 0
        answer = await running
        assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [20_000])
    assert (await events(config))[-1].data == ServerStopped()


async def test_an_inference_that_does_not_end_keeps_the_server_no_longer_than_the_drain_timeout(
    config: Config,
) -> None:
    save(models.counting_loop(), config.repository, "m")
    async with serving(config, "--drain-timeout-s=0.2") as server:
        await server.api.load("m")
        running = await computed(server, models.ENDLESS)
        assert await server.stop() == 0
        with pytest.raises(aiohttp.ClientError):
            await running
        await server.nothing_left()
    assert (await events(config))[-1].data == ServerStopped()


async def test_an_inference_whose_client_has_gone_makes_room_for_the_next(config: Config) -> None:
    save(models.counting_loop(), config.repository, "m")
    async with serving(config) as server:
        await server.api.load("m")
        worker = server.worker()
        (await computed(server, models.ENDLESS)).cancel()
        answer = await server.api.infer("m", trips(3))  # long before the other's time is up
        assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [3])
        assert server.worker() == worker


async def test_a_load_whose_client_has_gone_goes_on(config: Config) -> None:
    save(models.slow_model(depth=2000), config.repository, "slow")  # takes minutes
    save(models.add(1), config.repository, "m")
    async with serving(config, "--loads-at-once=1") as server:
        waiting = [asyncio.create_task(server.api.post("/api/v1/models/slow/load", wait=60))]
        [slow] = await when(server.api.jobs, lambda jobs: [job["stage"] for job in jobs] == ["loading"])
        worker = server.worker()
        waiting.append(asyncio.create_task(server.api.post("/api/v1/models/m/load", wait=60)))
        [m, _] = await when(server.api.jobs, lambda jobs: len(jobs) == 2)
        for client in waiting:
            client.cancel()
        await asyncio.wait(waiting)
        await until(computing(worker))
        assert [job["status"] for job in await server.api.jobs()] == ["pending", "in_progress"]
        await server.api.unload("slow", force=True)
        assert (await server.api.ended(m["id"]))["status"] == "completed"
        assert (await server.api.job(slow["id"]))["status"] == "cancelled"


async def test_who_waits_for_a_job_when_the_server_stops_is_answered_202_and_the_job_goes_on_after(
    config: Config,
) -> None:
    save(models.slow_model(depth=2000), config.repository, "m")  # takes minutes: no hurry to stop the server
    async with serving(config) as server:
        waiting = asyncio.create_task(server.api.post("/api/v1/models/m/load", wait=60))
        await when(server.api.jobs, lambda jobs: [job["stage"] for job in jobs] == ["loading"])
        assert await server.stop() == 0
        answer = await waiting
        assert (answer.status, answer.json["status"]) == (202, "in_progress")
        await server.nothing_left()
    save(models.add(1), config.repository, "m")
    async with serving(config) as server:
        job = await server.api.ended(answer.json["id"])
        assert (job["status"], job["attempt"]) == ("completed", 2)
    verified(config)


async def test_loads_unloads_and_failures_leave_no_descriptor_and_no_process_behind(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    save_bytes(models.TEXT, config.repository, "text")
    save(models.crash_on_load(), config.repository, "crash")
    async with serving(config) as server:

        async def cycle() -> list[str]:
            for model_id in ("m", "text", "crash"):
                assert (await server.api.post(f"/api/v1/models/{model_id}/load", wait=60)).status == 200
            assert (await server.api.infer("m", floats(1))).status == 200
            await server.api.unload("m")
            return descriptors(server.pid)

        before = await cycle()
        for _ in range(10):
            after = await cycle()
            assert len(after) <= len(before), (before, after)
        assert len(server.children()) == 1


async def test_a_body_that_says_it_is_compressed_is_not_unpacked(config: Config) -> None:
    save(models.add(1), config.repository, "m")
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with serving(config) as server:
        for roles, refusal in (((), (401, "no_credentials")), (("admin",), (415, "unsupported_media_type"))):
            answer = await server.api.post(
                "/api/v1/models/m/load", data=b"no gzip", headers=headers, roles=roles
            )
            assert answer.refusal == refusal


async def test_a_second_server_on_the_same_data_names_the_first_and_leaves_it_alone(config: Config) -> None:
    async with serving(config) as server:
        arguments = ("--port=0", f"--repository={config.repository}", f"--data={config.data}")
        second = await asyncio.create_subprocess_exec(
            *(*MODULE, "serve", *arguments),
            env=clean_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await second.communicate()
        assert (second.returncode, out) == (2, b"")
        assert f"is in use by process {server.pid};" in err.decode()
        assert "Traceback" not in err.decode()
        assert (await server.api.get("/health/ready")).status == 200
    assert len([event for event in await events(config) if isinstance(event.data, ServerStarted)]) == 1


async def test_it_may_open_as_many_descriptors_as_the_hard_limit_allows(config: Config) -> None:
    few = ("bash", "-c", 'ulimit -Sn 200 && exec "$@"', "bash", *MODULE)
    async with serving(config, command=few) as server:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard != 200


async def test_the_data_directory_may_have_a_long_name(config: Config, tmp_path: Path) -> None:
    config = Config(repository=config.repository, data=tmp_path / ("d" * 100) / ("d" * 100))
    save(models.add(1), config.repository, "m")
    config.data.parent.mkdir()
    async with serving(config) as server:
        await server.api.load("m")
        assert (await server.api.infer("m", floats(1))).status == 200
        assert await server.stop() == 0


async def test_every_setting_can_come_from_the_environment_and_does_what_it_says(
    config: Config,
) -> None:
    given = {
        "host": "localhost", "trusted_proxies": "192.0.2.1", "forwarded_header": "forwarded",
        "loads_at_once": 1, "threads": 2, "drain_timeout_s": 5,
        "inference_timeout_s": 0.2, "inference_grace_s": 0.3, "inference_queue": 9, "timeout_s": 44,
        "memory_budget": "50%", "max_loaded": 3, "evict": "idle", "min_residency_s": 1,
        "keep_alive_s": 60, "strategy": "auto", "on_demand": "on", "warm_up": "off",
        "prepare": "off", "prepared_size": "5MB", "huge_pages": "off", "restore": "none",
        "streams_per_subject": 3, "max_connections": 77,
        "head_timeout_s": 3, "idle_timeout_s": 4,
        "log_format": "json", "log_level": "error", "log_inferences": 0.5, "otel": "off",
        "trace_inferences": 0.5, "metrics": "open",
        "jwt_audience": "there", "jwt_issuer": "me", "jwt_roles_claim": "groups",
        "limit_management": "11/minute", "limit_inference": "12/minute",
        "limit_reads": "13/minute", "limit_auth_failures": "1/hour",
    }  # fmt: skip
    # Those are options here, or have tests of their own.
    not_given = {"repository", "data", "port", "jwt_keys", "tls_cert", "tls_key"}
    assert given.keys() | not_given == {setting.name for setting in settings()}
    environment = {f"LOADLEDGER_{name.upper()}": str(value) for name, value in given.items()}
    async with serving(config, environment=environment) as server:
        assert server.url.startswith("http://localhost:")
        process = await asyncio.create_subprocess_exec(
            *(*MODULE, "token", f"--data={config.data}", "--role=admin", "--subject=alice"),
            env=clean_environment() | environment,
            stdout=asyncio.subprocess.PIPE,
        )
        token = (await process.communicate())[0].decode().strip()
        # The command writes the claim `roles`; this server looks at `groups`, so the token has none.
        headers = {"Authorization": f"Bearer {token}"}
        answer = await server.api.get("/api/v1/models", roles=(), headers=headers)
        assert answer.refusal == (403, "forbidden")
        assert answer.headers["RateLimit-Policy"] == '"reads";q=13;w=60'
        assert (await server.api.get("/api/v1/models", roles=("admin",))).refusal == (401, "invalid_token")
        assert (await server.api.get("/api/v1/models", roles=("admin",))).refusal == (
            429,
            "too_many_failures",
        )


async def test_settings_of_loads_and_inferences_do_what_they_say(config: Config) -> None:
    save(models.counting_loop(), config.repository, "m")
    environment = {
        "LOADLEDGER_TIMEOUT_S": "44", "LOADLEDGER_INFERENCE_TIMEOUT_S": "0.2", "LOADLEDGER_THREADS": "3",
        "LOADLEDGER_LIMIT_MANAGEMENT": "11/minute", "LOADLEDGER_LIMIT_INFERENCE": "12/minute",
    }  # fmt: skip
    async with serving(config, environment=environment) as server:
        answer = await server.api.post("/api/v1/models/m/load", wait=60)
        assert answer.json["parameters"]["timeout_s"] == 44
        assert answer.headers["RateLimit-Policy"] == '"management";q=11;w=60'
        answer = await server.api.infer("m", trips(models.ENDLESS))
        assert answer.refusal == (504, "inference_timeout")
        assert answer.headers["RateLimit-Policy"] == '"inference";q=12;w=60'


async def test_an_option_goes_before_its_variable(config: Config) -> None:
    async with serving(
        config, "--host=127.0.0.1", environment={"LOADLEDGER_HOST": "nowhere.invalid"}
    ) as server:
        assert server.url.startswith("http://127.0.0.1:")


async def test_a_model_repository_may_be_named_relative_to_where_the_server_is_started(
    config: Config,
) -> None:
    save(models.add(1), config.repository, "m")
    async with serving(config, "--repository=.") as server:  # started in the repository; the last one counts
        await server.api.load("m")
        assert (await server.api.infer("m", floats(1))).status == 200
