"""The console in a real browser on a real server: what an operator does, accessibility, and the pictures.

With `SCREENSHOTS=docs/images` the pictures of the README are written there.
"""

import asyncio
import json
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from onnx import ModelProto, TensorProto, helper
from playwright.async_api import BrowserContext, Page, Route, ViewportSize, expect
from support import models
from support.browser import DESKTOP, GO, PHONE, TABLET, Console, needs_browser, tokens_in
from support.http import ONE, when
from support.servers import Server, serving

from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

PICTURES = os.environ.get("SCREENSHOTS")
"""The folder for the README's pictures; without it they are taken and thrown away."""
MAX_BYTES = 200_000
"""Of a picture, so that the README loads quickly."""
SHOWN_S = 45
"""Duration of the inferences that fill the charts."""
SWAPS = {16: 3, 40: 2}
"""Versions that are loaded meanwhile, by turn, before the load that waits has aged to their priority."""
QUESTION = {"name": "x", "datatype": "FP32", "shape": [4], "data": [0.5, 1, 2, 3]}


def write_models(root: Path) -> None:
    """Write the models; each test has its own."""
    for version in (1, 2):
        models.save(models.add(float(version)), root, "digits", version)
    models.save(models.counting_loop(), root, "counter")
    models.save_bytes(models.TEXT, root, "broken")
    models.save(models.weights(36), root, "large")  # needs 98 MB: nothing else may be loaded
    models.save(answer_inputs(), root, "open")
    for model_id in ("hostile", "paged"):
        models.save(models.add(), root, model_id)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server for most tests."""
    root = tmp_path_factory.mktemp("console")
    write_models(root / "repository")
    config = Config(repository=root / "repository", data=root / "data")
    async with serving(config, "--memory-budget=100000000") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def busy_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with a failed model and a load that waits for memory."""
    root = tmp_path_factory.mktemp("looks")
    repository = root / "repository"
    for version in (1, 2, 3):
        models.save(models.add(float(version)), repository, "fraud-check", version)
    models.save(models.weights(24, seed=1), repository, "ranker", 1)
    models.save(models.weights(14, seed=2), repository, "embedder", 4)
    models.save(models.weights(44, seed=3), repository, "captioner", 1)
    models.save_bytes(models.CORRUPT, repository, "churn", 2)
    config = Config(repository=repository, data=root / "data")
    async with serving(config, "--memory-budget=130000000") as running:
        api = running.api
        await api.load("fraud-check", version=2)
        await api.load("ranker")
        await api.load("embedder", pinned=True)
        await api.failed_load("churn")
        await api.accepted_load("captioner")
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def busy_admin(busy_server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """An admin's console of the busy server, as good as new for each test."""
    async with Console.kept(browser, busy_server.api, "admin") as console:
        yield console


async def test_load_infer_swap_pin_and_unload(server: Server, admin: Console) -> None:
    page, version = admin.page, admin.row("digits").locator("[data-label=Version]")
    await admin.see("digits", "unloaded")
    await expect(version).to_have_text("2, 1 on disk")
    await admin.press("digits", "Load")
    await page.locator("#load-version").select_option("1")
    await admin.choose("Load")
    await admin.see("digits", "loaded")
    await expect(admin.row("digits").get_by_role("link")).to_be_focused()  # the button is gone
    await expect(page.locator("#notices")).to_contain_text("Load of digits completed")

    await admin.press("digits", "Infer")
    await expect(page.locator("#infer-body")).to_have_value(re.compile(r'"shape": \[16\], "data": \[0,'))
    await admin.choose("Run inference")
    await expect(page.locator("#infer-answer")).to_contain_text('"data":[1.0,')
    binary = '{"id": "binary", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": "zeros"}]}'
    await page.locator("#infer-body").fill(binary)
    await admin.choose("Run inference")
    await expect(page.locator("#infer-answer")).to_contain_text('"data":[1.0]')
    await expect(page.locator("#infer-answer")).to_contain_text('"id":"binary"')
    await expect(page.locator("#infer-status")).to_contain_text("by digits/1, the ModelLoaded at position")
    special = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": [NaN, -Infinity, 1]}]}'
    await page.locator("#infer-body").fill(special)
    await admin.choose("Run inference")
    await expect(page.locator("#infer-answer")).to_contain_text('"data":[NaN,-Infinity,2.0]')
    await expect(page.locator("#infer-outputs")).to_contain_text("NaN, -Infinity, 2")
    await admin.choose("Close")

    await admin.press("digits", "Swap")
    await expect(page.locator("#load-text")).to_contain_text("digits/1 is loaded")
    await page.get_by_label("Strategy").select_option("in_place")
    await admin.choose("Swap")
    await expect(version).to_have_text("2")
    await expect(version).to_have_attribute("title", re.compile(r"^\d+ threads? in each worker$"))
    await admin.see("digits", "loaded")
    assert (await server.api.jobs("?model=digits"))[-2]["parameters"]["strategy"] == "in_place"

    await admin.press("digits", "Pin")
    await expect(admin.row("digits").get_by_text("pinned")).to_be_visible()
    await admin.press("digits", "Unpin")
    await expect(admin.row("digits").get_by_text("pinned")).to_be_hidden()
    await server.api.send("PUT", "/api/v1/models/digits/labels/champion", json={"version": 2})
    await expect(admin.row("digits").get_by_text("champion 2")).to_be_visible()
    assert (await server.api.model("digits"))["files"]
    assert (await server.api.infer("digits", ONE)).headers["Loadledger-Model"].startswith("digits/2;")

    await admin.press("digits", "Unload")
    await admin.choose("Unload")
    await admin.see("digits", "unloaded")
    assert not tokens_in(admin, server.api, "admin")


async def test_model_page_shows_bytes_charts_and_programs(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("paged")
    await server.api.infer("paged", ONE)
    await page.get_by_role("link", name="paged").first.click()
    await expect(page.get_by_role("heading", name="paged")).to_be_focused()
    model = await server.api.model("paged")
    versions = page.locator(".its-versions tbody > tr")
    await expect(versions.first).to_contain_text(model["files"][0]["sha256"])
    await expect(page.locator(".its-tensors tbody")).to_have_text(re.compile("inputxFP32.*outputyFP32"))
    await expect(page.locator(".facts")).to_contain_text(re.compile("ChosenVersion 1 by [a-z]+, "))
    await expect(page.locator(".its-jobs .job")).to_have_count(1)
    await expect(page.locator(".its-events")).to_contain_text("ModelLoaded")
    await expect(page.locator(".its-lines")).to_contain_text("Worker of version 1, running")
    await expect(page.locator(".traffic .summary").nth(1)).to_contain_text("in the last hour")
    await page.get_by_role("button", name="Show the last 24 hours").last.click()
    await expect(page.locator(".traffic .summary").nth(1)).to_contain_text("answered in the last 24 hours")
    await page.set_viewport_size(PHONE)
    await admin.fits()
    await page.reload()
    await expect(page.get_by_role("heading", name="paged")).to_be_visible()
    await page.get_by_role("link", name="All models").click()
    await admin.see("paged", "loaded")


TENSORS = {
    "images": ("FP32", TensorProto.FLOAT),
    "half": ("FP16", TensorProto.FLOAT16),
    "ids": ("INT64", TensorProto.INT64),
    "flags": ("BOOL", TensorProto.BOOL),
    "texts": ("BYTES", TensorProto.STRING),
}
"""Inputs of a model that answers with them: datatype, and ONNX element type."""
PROGRAMS = {
    "curl": ("sh", "-c"),
    "Python": (sys.executable, "-P", "-c"),
    "tritonclient": (sys.executable, "-P", "-c"),
}
"""Interpreters of the programs on a model's page, by their names there."""


def answer_inputs() -> ModelProto:
    """A model that answers with its inputs, of any shape: FP16 as FP32, because JSON has no FP16."""
    shape = ("batch", 2, None)
    return models.model(
        [
            helper.make_node("Cast", [name], [f"{name}_out"], to=TensorProto.FLOAT)
            if name == "half"
            else helper.make_node("Identity", [name], [f"{name}_out"])
            for name in TENSORS
        ],
        [models.value(name, element, shape) for name, (_, element) in TENSORS.items()],
        [
            models.value(f"{name}_out", TensorProto.FLOAT if name == "half" else element, shape)
            for name, (_, element) in TENSORS.items()
        ],
    )


async def add_examples(page: Page, fill: str, length: int, refusal: str | None) -> None:
    """Have the server's answers say that it found this when it tried the model."""
    example = {"shape": [1, 2, length], "values": fill, **({"refusal": refusal} if refusal else {})}

    async def answer(route: Route) -> None:
        response = await route.fetch()
        described = await response.json()
        for tensor in described["inputs"]:
            tensor |= {"dimensions": ["batch", "", ""], "example": example}
        await route.fulfill(response=response, json=described)

    await page.route(re.compile(r"/models/open$"), answer)


async def run_program(kind: str, program: str) -> str:
    """Run a program of a model's page; return what it prints."""
    process = await asyncio.create_subprocess_exec(*PROGRAMS[kind], program, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode()


@pytest.mark.parametrize(("fill", "length"), [(None, 16), ("ones", 3), ("ones", 1000), ("zeros", 1000)])
async def test_programs_run_as_they_are_shown(
    server: Server, admin: Console, fill: str | None, length: int
) -> None:
    page = admin.page
    await server.api.load("open")
    if fill:
        await add_examples(page, fill, length, None)
    await admin.go("#/models/open")
    await expect(page.locator(".its-tensors tbody")).to_contain_text("[batch, 2, -1]")
    programs = []
    for kind in PROGRAMS:
        await page.locator(".its-calls").get_by_role("button", name=kind, exact=True).click()
        shown = await page.locator(".its-calls pre").inner_text()
        assert shown.count("PASTE A TOKEN HERE") == 1
        programs.append(run_program(kind, shown.replace("PASTE A TOKEN HERE", server.api.token("infer"))))
    curl, *others = await asyncio.gather(*programs)
    answer = {each["name"]: each for each in json.loads(curl)["outputs"]}
    assert {each["shape"][2] for each in answer.values()} == {length}
    values = {name: set(each["data"]) for name, each in answer.items()}
    assert values.keys() == {f"{name}_out" for name in TENSORS}
    assert values.pop("texts_out") == {""}
    assert set.union(*values.values()) == {fill == "ones"}
    for printed in others:
        assert all(name in printed for name in answer)


async def test_sizes_that_the_model_refused_are_said_to_be_guesses(server: Server, admin: Console) -> None:
    await server.api.load("open")
    await add_examples(admin.page, "ones", 640, "Got invalid dimensions")
    await admin.go("#/models/open")
    guess = "sizes are guesses: batch, dimension 3 of images; "
    await expect(admin.page.locator(".its-calls")).to_contain_text(guess)
    await admin.page.get_by_role("button", name="Infer…").click()
    dialog = admin.page.locator("dialog[open]")
    await expect(dialog).to_contain_text("images: FP32 [batch, 2, -1]")
    await expect(dialog).to_contain_text("Got invalid dimensions")
    await expect(dialog.locator("textarea")).to_have_value(
        re.compile(r'"shape": \[1,2,640\], "data": "ones"')
    )
    await admin.choose("Run inference")
    await expect(dialog.locator("#infer-outputs")).to_contain_text("images_out: FP32 [1, 2, 640]")
    await expect(dialog.locator("#infer-outputs")).to_contain_text("values from 1 to 1")


NAMED, RESOLVED = "hf://org/repo@main", f"hf://org/repo@{'c0ffee12' * 5}"
DROP = """(section, files) => {
  const dropped = new DataTransfer();
  for (const [name, bytes] of files) dropped.items.add(new File([new Uint8Array(bytes)], name));
  const event = (type) => new DragEvent(type, { dataTransfer: dropped, bubbles: true, cancelable: true });
  for (const type of ["dragover", "drop"]) section.dispatchEvent(event(type));
}"""


async def test_dropped_files_become_a_version_and_are_loaded(server: Server, admin: Console) -> None:
    page = admin.page
    single = [["My model.onnx", list(models.add(1).SerializeToString())]]
    several = [
        ["My model.onnx", list(models.external("w.bin").SerializeToString())],
        ["w.bin", list(models.external_bytes())],
    ]
    for version, files in ((1, single), (2, several)):
        await page.locator("section.models").evaluate(DROP, files)
        await expect(page.locator("#upload-by-name code")).to_have_text("loadledger add NAME hf://ORG/REPO")
        await expect(page.locator("#upload-model")).to_have_value("My-model")
        await expect(page.locator("#upload-version")).to_have_value(str(version))
        if version == 1:
            assert await admin.serious("dialog[open]") == []
        await admin.choose("Add")
        await expect(page.locator("#load-title")).to_have_text("Load My-model")
        await admin.choose("Keep as it is")
        await expect(admin.row("My-model")).to_be_visible()
    assert (await server.api.model("My-model"))["versions"] == [1, 2]
    folder = server.api.config.repository / "My-model" / "2"
    assert {each.name for each in folder.iterdir()} == {"model.onnx", "w.bin"}
    await page.locator("section.models").evaluate(DROP, [["My model.onnx", [1, 2, 3]]])
    await page.locator("#upload-version").fill("2")
    await admin.choose("Add")
    await expect(page.locator("dialog[open] .refusal")).to_contain_text("exists")


async def test_version_shows_where_its_uploader_said_it_came_from(server: Server, admin: Console) -> None:
    version = admin.page.locator(".its-versions tbody > tr")
    for model_id, resolved, named in (("said", RESOLVED, f" (named {NAMED})"), ("named", NAMED, "")):
        said = {"source": NAMED, "resolved": resolved}
        await server.api.add_by_upload(model_id, 1, models.add().SerializeToString(), **said)
        await admin.go(f"#/models/{model_id}")
        await expect(version).to_contain_text(f" by alice, who said that it came from {resolved}{named}.")
        await expect(version.get_by_role("link")).to_have_count(0)
    await admin.page.get_by_role("button", name="Add a version…").click()
    command = "loadledger add named hf://ORG/REPO"
    await expect(admin.page.locator("#upload-by-name code")).to_have_text(command)
    await admin.page.set_viewport_size(PHONE)
    await admin.fits()


async def test_force_unload_kills_stopped_worker(server: Server, admin: Console) -> None:
    await server.api.load("counter")
    await admin.see("counter", "loaded")
    os.kill(server.worker(), signal.SIGSTOP)
    trips = {"name": "trips", "datatype": "INT64", "shape": [], "data": [1]}
    asking = asyncio.create_task(server.api.infer("counter", trips))
    await expect(admin.row("counter").locator("[data-label='In flight']")).to_have_text("1")
    await admin.press("counter", "Unload")
    await expect(admin.page.locator("#unload-text")).to_contain_text("1 request in flight")
    await admin.choose("Force unload")
    await admin.see("counter", "unloaded")
    assert (await asking).status == 503


async def test_failed_and_waiting_loads_need_attention(server: Server, admin: Console) -> None:
    await server.api.failed_load("broken")
    failed = admin.attention.filter(has_text="broken failed")
    await expect(failed).to_contain_text("invalid_model: ")
    [said, *_] = (await server.api.model("broken"))["error"]["message"].splitlines()
    shown = admin.row("broken").locator(".error")
    await expect(shown).to_have_text(re.compile(rf"^invalid_model: {re.escape(said[:100])}"))
    await expect(failed).to_contain_text("as a new version")
    await expect(failed.get_by_role("button")).to_have_text(
        [re.compile("^Load…"), re.compile("^Acknowledge")]
    )
    assert "⚠" in await admin.page.title()
    await failed.get_by_role("button", name="Acknowledge").click()
    await expect(failed).to_have_count(0)
    await admin.page.reload()
    await expect(admin.page.locator("#attention-away")).to_contain_text("1 acknowledged")
    await expect(failed).to_have_count(0)
    await server.api.failed_load("broken")  # which is another occurrence
    await expect(failed).to_contain_text("Asked for by alice")
    await admin.page.evaluate("localStorage.clear()")
    first = admin.page.locator("#models-rows > tr").first
    await expect(first.locator(".pill")).to_have_text("failed")
    await server.api.load("hostile")
    waiting = await server.api.accepted_load("large")
    await server.api.job_when(waiting["id"], status="pending")
    waits = admin.attention.filter(has_text="Load of large/1")
    await expect(admin.row("large").locator("[data-label=State]")).to_contain_text("waiting since ")
    await admin.page.locator("#models-state").select_option("waiting")
    await expect(admin.page.locator("#models-rows > tr")).to_have_count(1)
    await admin.page.locator("#models-state").select_option("")
    await expect(waits).to_contain_text("Requested by alice")
    await expect(admin.attention.filter(has_text="Memory is tight")).to_be_visible()
    await waits.get_by_role("button", name="Cancel").click()
    await expect(waits).to_have_count(0)


OFFERED: dict[str, tuple[str, set[str], bool]] = {
    "admin": ("Live", {"Infer…", "Swap…", "Pin", "Unload…"}, True),
    "audit": ("Live", set(), True),
    "infer": ("Every 3 s", {"Infer…"}, False),
}
"""By role: connection, buttons of a loaded model, and whether timeline and ledger are offered."""


@pytest.mark.parametrize("role", OFFERED)
async def test_role_is_offered_only_what_it_may_do(
    server: Server, browser: BrowserContext, role: str
) -> None:
    says, offers, sees_events = OFFERED[role]
    await server.api.load("hostile")
    job = (await server.api.model("hostile"))["job_id"]
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token(role), says=says)
        await console.see("hostile", "loaded")
        buttons = await console.row("hostile").get_by_role("button").all_inner_texts()
        assert {text.split()[0] for text in buttons} == offers
        pages = await console.page.get_by_role("navigation").get_by_role("link").all_inner_texts()
        assert [page for page in ("Timeline", "Ledger") if page in pages] == (
            ["Timeline", "Ledger"] if sees_events else []
        )
        await console.go(f"#/jobs/{job}")
        await expect(console.page.locator("#job")).to_contain_text("Load hostile/1")
        await expect(console.page.locator("#ledger-list")).to_have_count(int(sees_events))
        await expect(console.page.get_by_role("link", name="As of its last event")).to_have_count(
            int(sees_events)
        )
        assert not tokens_in(console, server.api, role)


async def test_sign_in_by_a_link_or_a_token_and_sign_out(server: Server, browser: BrowserContext) -> None:
    link = (await server.api.post("/api/v1/sign-in-links", subject="dora")).json["path"]
    async with Console.opened(browser, f"{server.url}{link}") as console:
        page, why = console.page, console.page.locator("#sign-in-why")
        await expect(console.connection).to_have_text("Live")
        await expect(page.locator("#who")).to_have_text("dora (admin)")
        assert page.url == f"{server.url}/"
        assert not any("sign-in=" in url.partition("#")[0] for url in console.urls)
        await page.reload()  # the token stays in this tab
        await expect(console.connection).to_have_text("Live")
        await page.evaluate("path => { location.href = path; }", link)  # as if it was pasted once more
        await expect(why).to_contain_text("The sign-in link does not work")
        assert page.url == f"{server.url}/"

        await page.keyboard.type("nonsense")  # the field has the focus
        await page.keyboard.press("Enter")
        await expect(why).to_contain_text("This is not a token")
        await console.check_accessibility()
        head, payload, _ = server.api.token("admin").split(".")
        await page.get_by_label("Token").fill(f"{head}.{payload}.{'A' * 86}")
        await page.keyboard.press("Enter")
        await expect(why).to_contain_text("The server does not accept this token")
        await console.sign_in(f"Bearer {server.api.token('admin')}")
        await page.reload()
        await expect(console.connection).to_have_text("Live")
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert not await page.evaluate("sessionStorage.getItem('loadledger.token')")
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0
        console.urls.clear()
        await page.get_by_label("Token").fill(server.api.token("admin"))
        await page.get_by_role("button", name="Sign in").dblclick()  # which signs in once
        await expect(console.connection).to_have_text("Live")
        await expect(page.locator("#models-rows")).to_be_visible()
        assert sum("/events/stream" in url for url in console.urls) == 1


async def test_console_reconnects_after_restart(browser: BrowserContext, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    models.save(models.add(), repository, "m")
    config = Config(repository=repository, data=tmp_path / "data")
    async with serving(config) as first:
        port = first.url.rpartition(":")[2]
        async with Console.opened(browser, first.url) as console:
            await console.sign_in(first.api.token("admin"))
            await first.api.load("m")
            await console.see("m", "loaded")
            await first.stop()
            await expect(console.page.locator("#lost")).to_contain_text("Not connected for")
            await expect(console.connection).to_have_text("Not connected")
            await expect(console.attention.first).to_contain_text(
                "No connection to the server: all this is as of"
            )
            await console.go("#/ledger")
            events = console.page.locator("#ledger")
            await expect(events).to_contain_text("The server cannot be reached")
            await expect(events.get_by_text("No event matches")).to_be_hidden()
            async with serving(replace(config, port=int(port)), f"--port={port}") as second:
                await expect(console.connection).to_have_text("Live")
                await expect(console.page.locator("#lost")).to_be_hidden()
                await when(lambda: second.api.model("m"), lambda model: model["state"] == "loaded")
                started = console.page.locator(".page").get_by_text("ServerStarted", exact=True)
                await expect(started.and_(console.page.locator("strong"))).to_have_count(2)
                await console.go("#/")
                await console.see("m", "loaded")


async def test_full_disk_is_the_first_thing_said(browser: BrowserContext, tmp_path: Path) -> None:
    models.save(models.add(), tmp_path / "repository", "m")
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    async with serving(config) as server, Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin"))
        await expect(console.page.locator(".well")).to_contain_text("Nothing: 0 models loaded")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        await console.press("m", "Load")
        await console.choose("Load")
        await expect(console.connection).to_have_text("Not ready")
        first = console.attention.first
        await expect(first).to_contain_text("The ledger cannot be written: ")
        [failed] = (await server.api.get("/api/v1/resources")).json["not_ready"]
        await expect(console.connection).to_have_attribute("title", f"{failed['cause']}: {failed['cure']}")
        await expect(first.locator(".todo")).to_have_text(
            re.compile(re.escape(failed["cure"]), re.IGNORECASE)
        )
        await expect(console.page.locator(".well")).to_have_count(0)
        await expect(console.page.get_by_role("link", name="Overview 1 need attention")).to_be_visible()
        await console.choose("Keep as it is")
        await console.check_accessibility()
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        await expect(console.connection).to_have_text("Live")
        await expect(console.page.locator(".well")).to_be_visible()


async def test_model_page_without_a_server_or_model_says_so(server: Server, admin: Console) -> None:
    page = admin.page
    await server.api.load("paged")
    await admin.see("paged", "loaded")
    await page.route("**/api/**", lambda route: route.abort())
    await admin.go("#/models/paged")
    await expect(page.locator(".its-tensors, .its-calls").last).to_contain_text(
        "The server cannot be reached"
    )
    await page.unroute("**/api/**")
    await expect(page.locator(".its-calls pre")).to_contain_text("TOKEN=")
    await page.evaluate("location.hash = '#/models/none'")
    await expect(page.locator("main .refusal")).to_have_text(re.compile("^No such model"))
    await expect(page.locator("main section")).to_have_count(1)


# Accessibility, dialogs, pictures.


PAGES = ("#/", "#/timeline", "#/at/3", "#/ledger", "#/jobs", "#/models/fraud-check")
OPENED = {"#/timeline", "#/at/3", "#/ledger"}
"""Pages that test_console_timeline.py checks with their parts open."""


async def test_axe_finds_nothing_serious_in_pages(busy_admin: Console) -> None:
    page = busy_admin.page
    await expect(busy_admin.attention).to_have_count(3)
    for address in PAGES:
        await page.goto(f"{busy_admin.url}/{address}")
        await expect(page.locator("main h2").first).to_be_visible()
        if address not in OPENED:
            await busy_admin.check_accessibility()
        for size in (PHONE, TABLET):
            await page.set_viewport_size(size)
            await busy_admin.fits()
        await page.set_viewport_size(DESKTOP)
    await page.set_viewport_size(PHONE)
    await page.route("**/api/**", lambda route: route.abort())
    await expect(page.locator("#lost")).to_be_visible()
    await busy_admin.check_accessibility(".tops")


LINES = """() => [...document.querySelectorAll("#models-rows .name")]
  .map((name) => name.getClientRects().length)"""
"""The lines that each name of a model takes."""


@pytest.mark.parametrize("width", [390, 768, 1024, 1440])
async def test_names_of_models_are_not_broken(busy_admin: Console, width: int) -> None:
    await busy_admin.page.set_viewport_size(ViewportSize(width=width, height=900))
    await busy_admin.see("churn", "failed")
    assert set(await busy_admin.page.evaluate(LINES)) == {1}
    panel = await busy_admin.page.locator("section.models").bounding_box()
    for button in await busy_admin.page.locator("#models-rows button").all():
        box = await button.bounding_box()
        assert panel is not None
        assert box is not None
        assert box["x"] + box["width"] <= panel["x"] + panel["width"]


async def test_failed_model_is_in_the_first_screen_of_a_phone(busy_admin: Console) -> None:
    await busy_admin.page.set_viewport_size(PHONE)
    failed = await busy_admin.attention.filter(has_text="churn failed").bounding_box()
    assert failed is not None
    assert failed["y"] + failed["height"] < PHONE["height"]
    await expect(busy_admin.page.get_by_role("link", name="Overview 2 need attention")).to_be_visible()


async def test_dialogs_are_accessible_and_no_wider_than_a_phone(busy_admin: Console) -> None:
    page = busy_admin.page
    for button, close in (("Swap", "Keep as it is"), ("Unload", "Keep it"), ("Infer", "Close")):
        await busy_admin.press("fraud-check", button)
        if button == "Infer":
            await busy_admin.choose("Run inference")
            await expect(page.locator("#infer-answer")).to_be_visible()
        await busy_admin.check_accessibility("dialog[open]")
        await page.set_viewport_size(PHONE)
        await busy_admin.fits()
        await busy_admin.choose(close)
        await page.set_viewport_size(DESKTOP)


UNLOAD_AT_ONCE = f"""async (address) => {{
  await ({GO})(address);
  const buttons = [...document.querySelectorAll(".model-head button")];
  buttons.find((each) => each.textContent.startsWith("Unload")).click();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))));
}}"""
"""Opens a model's page and a dialog of it before the page is painted; waits until it is."""


async def test_dialogs_open_and_close_by_keyboard_or_with_their_page(busy_admin: Console) -> None:
    page = busy_admin.page
    swap = busy_admin.row("fraud-check").get_by_role("button", name="Swap… fraud-check")
    await swap.focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#load-version")).to_be_focused()
    await page.get_by_label("Strategy").select_option("in_place")
    await page.keyboard.press("Escape")
    await expect(page.locator("dialog[open]")).to_have_count(0)
    await expect(swap).to_be_focused()
    await busy_admin.press("ranker", "Swap")  # another model's choices begin anew
    await expect(page.get_by_label("Strategy")).to_have_value("")
    await page.keyboard.press("Escape")
    await page.get_by_label("Find").focus()
    await page.keyboard.type("RANK")
    await expect(page.locator("#models-rows > tr")).to_have_count(1)
    await page.get_by_role("link", name="ranker").click()
    await expect(page.get_by_role("heading", name="ranker")).to_be_focused()
    await page.get_by_role("button", name="Unload").click()
    await expect(page.locator("dialog[open]")).to_be_visible()
    await page.go_back()
    await busy_admin.see("ranker", "loaded")
    await expect(page.locator("dialog")).to_have_count(0)
    await page.evaluate(UNLOAD_AT_ONCE, "#/models/ranker")
    await expect(page.locator("dialog[open]")).to_be_visible()
    await busy_admin.choose("Keep it")


async def test_focus_stays_in_the_page_when_its_button_is_gone(busy_admin: Console) -> None:
    page = busy_admin.page
    heading = page.get_by_role("heading", name="What needs you")
    await busy_admin.attention.get_by_role("button", name="Acknowledge").press("Enter")
    await expect(busy_admin.attention).to_have_count(2)
    await expect(heading).to_be_focused()
    await page.locator("#attention-away").press("Enter")
    await expect(busy_admin.attention).to_have_count(3)
    await expect(heading).to_be_focused()


async def hold_back(
    page: Page, path: str, late: asyncio.Event, refusal: dict[str, str] | None = None
) -> None:
    """Answer a request only once `late` is set, with a refusal if there is one."""

    async def answer(route: Route) -> None:
        await late.wait()
        await (route.fulfill(status=503, json=refusal) if refusal else route.continue_())

    await page.route(f"**/{path}", answer)


async def test_closed_dialog_aborts_its_requests(busy_admin: Console) -> None:
    page, late = busy_admin.page, asyncio.Event()
    for path in ("v2/models/ranker", "v2/models/fraud-check/infer"):
        await hold_back(page, path, late)
    run = page.locator("dialog[open]").get_by_role("button", name="Run inference", exact=True)
    async with page.expect_request("**/v2/models/ranker"):
        await busy_admin.press("ranker", "Infer")
    await expect(run).to_be_disabled()  # until the inputs are known
    async with page.expect_event("requestfailed", lambda request: request.url.endswith("/ranker")):
        await page.keyboard.press("Escape")
    await busy_admin.press("fraud-check", "Infer")
    async with page.expect_request("**/v2/models/fraud-check/infer"):
        await run.click()
    async with page.expect_event("requestfailed", lambda request: request.url.endswith("/infer")):
        await page.keyboard.press("Escape")
    await busy_admin.press("embedder", "Infer")
    await expect(page.locator("#infer-body")).not_to_have_value("")
    await expect(page.locator("#infer-title")).to_have_text("Inference with embedder")
    await expect(page.locator("#infer-status")).to_have_text("")
    late.set()


async def test_refusal_after_closing_the_dialog_is_a_notice(busy_admin: Console) -> None:
    page, late = busy_admin.page, asyncio.Event()
    refusal = {"title": "Not now", "detail": "later \u202eperhaps", "code": "x"}
    await hold_back(page, "ranker/unload", late, refusal)
    await busy_admin.press("ranker", "Unload")
    await expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    await busy_admin.choose("Unload")
    await busy_admin.choose("Keep it")
    await busy_admin.press("embedder", "Unload")
    late.set()
    await expect(page.locator("#notices")).to_contain_text("Not now: later \ufffdperhaps")
    await expect(page.locator("#unload-dialog .refusal")).to_be_hidden()
    await expect(page.locator("#unload-title")).to_have_text("Unload embedder")


async def test_pictures_of_the_readme(busy_server: Server, busy_admin: Console, tmp_path: Path) -> None:
    folder = Path(PICTURES) if PICTURES else tmp_path
    page = busy_admin.page
    await page.set_viewport_size(ViewportSize(width=1180, height=800))
    await page.reload()  # nothing has the focus
    await expect(busy_admin.attention).to_have_count(3)
    for turn in range(SHOWN_S * 4 if PICTURES else 1):
        for _ in range(10 + 8 * (turn // 16 % 4)):
            await busy_server.api.infer("fraud-check", QUESTION)
        await page.wait_for_timeout(250)
        if turn in SWAPS:
            await busy_server.api.load("fraud-check", version=SWAPS[turn], priority="high")
    await page.emulate_media(color_scheme="light")
    await page.screenshot(path=folder / "console-light.png")
    await page.goto(f"{busy_server.url}#/models/fraud-check")
    await expect(page.locator(".its-calls pre")).to_be_visible()
    await expect(page.locator(".traffic .figure").first).not_to_have_text("…")
    await page.screenshot(path=folder / "console-model.png")
    await page.emulate_media(color_scheme="dark")
    await page.goto(f"{busy_server.url}#/at/12")
    await expect(page.locator("#timeline-cursor")).to_be_visible()
    await page.screenshot(path=folder / "console-dark.png")
    await page.goto(f"{busy_server.url}#/")
    await expect(busy_admin.attention).to_have_count(3)
    await page.set_viewport_size(PHONE)
    await page.evaluate("scrollTo(0, 0)")
    await page.screenshot(path=folder / "console-phone.png")
    for picture in folder.glob("console-*.png"):
        assert picture.stat().st_size < MAX_BYTES, picture
