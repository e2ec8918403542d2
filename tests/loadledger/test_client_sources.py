"""Both clients have a real server fetch versions from sources."""

from collections.abc import Iterator

import pytest
from support.clients import KINDS, connected
from support.origins import Site
from support.servers import Server
from support.sources import NAMED, RESOLVED, SHA256, SLOW, standing_fetcher, standing_site

from loadledger import Client, Job, JobFailed, JobUnfinished, ServerError


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with standing_site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that may fetch from the site."""
    with standing_fetcher(site, tmp_path_factory.mktemp("sources")) as server:
        yield server


@pytest.fixture(params=KINDS)
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Each of the clients, as an administrator."""
    with connected(request.param, server.url, server.api.token("admin")) as client:
        yield client


def test_version_is_fetched_and_names_its_source(client: Client, site: Site) -> None:
    model_id = f"fetched-{type(client).__name__}"
    job = client.add_from(model_id, NAMED, wait=True)
    assert (job.kind, job.status, job.version, job.progress) == ("add", "completed", 1, None)
    assert job.parameters["source"] == NAMED
    url = site.url(f"/{model_id}.onnx")
    assert client.add_from(model_id, url, 5, digest=f"sha256:{SHA256}", wait=True).version == 5
    first, second = client.model(model_id).sources
    assert (first.version, first.source, first.resolved, first.added_by) == (1, NAMED, RESOLVED, "alice")
    assert (second.version, second.source, second.resolved) == (5, url, f"{url}#sha256={SHA256}")
    assert first.added_at < second.added_at
    [event] = client.events(types=["VersionAdded"], jobs=[job.id])
    assert (event.position, event.data["files"][0]["sha256"]) == (first.position, SHA256)
    assert {each.id: each.sources for each in client.models()}[model_id] == []


def test_fetch_is_watched_and_cancelled(client: Client) -> None:
    model_id = f"slow-{type(client).__name__}"

    def interrupt(job: Job) -> None:
        if job.progress is not None and job.progress.bytes >= (job.progress.total_bytes or 0) // 2 > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.add_from(model_id, SLOW, wait=True, on_stage=interrupt)
    [job] = client.jobs(model=model_id)
    assert (job.status, job.stage) == ("in_progress", "fetching")
    assert client.cancel(job.id).cancel_requested
    assert client.wait_for(job.id).status == "cancelled"


def test_fetch_past_limits_of_wait_and_job(client: Client) -> None:
    model_id = f"late-{type(client).__name__}"
    with pytest.raises(JobUnfinished, match="it continues") as unfinished:
        client.add_from(model_id, SLOW, wait=True, wait_s=0.1, timeout_s=2)
    job = client.wait_for(unfinished.value.job.id)
    assert job.error is not None
    assert job.error.code == "timeout"


@pytest.mark.parametrize(
    ("source", "digest", "code"),
    [
        ("ftp://host/m.onnx", None, "invalid_source"),
        ("https://localhost/m.onnx", None, "source_not_allowed"),
        ("hf://other/repo", None, "source_not_allowed"),
        (NAMED, "sha256:0", "invalid_body"),
    ],
)
def test_source_is_refused(client: Client, source: str, digest: str | None, code: str) -> None:
    with pytest.raises(ServerError) as refused:
        client.add_from("refused", source, digest=digest)
    assert refused.value.code == code


def test_version_that_exists_or_is_not_there_is_refused(client: Client) -> None:
    model_id = f"taken-{type(client).__name__}"
    client.add_from(model_id, NAMED, 1, wait=True)
    with pytest.raises(ServerError) as refused:
        client.add_from(model_id, NAMED, 1)
    assert refused.value.code == "version_exists"
    with pytest.raises(JobFailed) as failed:
        client.add_from(model_id, "hf://org/repo@nowhere", wait=True)
    assert failed.value.code == "source_not_found"
