"""The console in a real browser: what loads need and get: approvals, signatures, devices."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Locator, expect
from support import models
from support.browser import PHONE, Console, needs_browser
from support.openvino import DEVICE, openvino_environment
from support.servers import Server, serving
from support.signing import make_key, public_pem, sign_folder

from features.signatures.verification import key_digest
from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="session")]

KEY = make_key()
SIGNER = key_digest(public_pem(KEY))
SIGNED = f"Signed: the key is {SIGNER}; the rules only warn."
RULES = """
[[trust]]
models = ["signed", "unsigned"]
mode = "warn"
keys = ["release.pem"]

[[approval]]
models = ["guarded", "changed", "urgent"]

[[record]]
models = ["recorded"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    root = tmp_path_factory.mktemp("loads") / "repository"
    for model_id in ("guarded", "changed", "urgent", "signed", "unsigned", "recorded", "unrecorded"):
        models.save(models.add(), root, model_id)
    models.save(models.weights(4), root, "ranker")
    sign_folder(root / "signed" / "1", KEY)
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(repository: Path) -> AsyncIterator[Server]:
    """A server with rules for its models, OpenVINO's plugin, and a budget for its device."""
    root = repository.parent
    (root / "release.pem").write_text(public_pem(KEY))
    rules = root / "loadledger.toml"
    rules.write_text(RULES)
    config = Config(repository=repository, data=root / "data")
    settings = (f"--config={rules}", f"--device-memory={DEVICE}=2GB")
    async with serving(config, *settings, environment=openvino_environment(root)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def carol(server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """The console of carol, who may approve and read the ledger."""
    async with Console.kept(browser, server.api, "approve", "audit", subject="carol") as console:
        yield console


def unapproved(console: Console, model_id: str) -> Locator:
    return console.page.locator(".approvals .problem", has_text=model_id)


def opened(console: Console) -> Locator:
    return console.page.locator("dialog[open]")


async def ask_for_load(console: Console, model_id: str, version: int) -> None:
    """Ask for a load of a version."""
    await console.press(model_id, "Load")
    await console.page.locator("#load-version").select_option(str(version))
    await expect(opened(console)).to_contain_text("need the approval of 1 other person")
    await console.choose("Load")


async def give_reason(console: Console, verb: str, reason: str) -> None:
    """Answer the open dialog, at first without a reason."""
    await console.page.get_by_label("Reason").fill("  ")
    await console.choose(verb)
    await expect(opened(console).locator(".refusal")).to_contain_text("Give a reason")
    await console.page.get_by_label("Reason").fill(reason)
    await console.choose(verb)


async def test_added_version_waits_until_another_approves(
    server: Server, admin: Console, carol: Console
) -> None:
    listed = carol.page.locator(".approvals")
    await expect(listed).to_have_count(0)  # versions of the folder wait for nobody
    await server.api.add_by_upload("guarded", 2, models.add(2.0).SerializeToString())
    await expect(listed.locator(".problem")).to_have_count(1)
    await expect(unapproved(carol, "guarded")).to_contain_text("guarded/2Added by alice. 0 of 1 approved.")
    await expect(carol.page.get_by_role("link", name="Overview 1 need attention")).to_be_visible()
    await ask_for_load(admin, "guarded", 2)
    await expect(admin.page.locator("#notices")).to_contain_text("approve guarded/2")
    failed = admin.attention.filter(has_text="guarded failed")
    await expect(failed).to_contain_text("not_approved: ")
    await expect(failed).to_contain_text("loadledger approve MODEL/VERSION gives it")
    await expect(admin.page.get_by_role("button", name="Approve")).to_have_count(0)
    await expect(unapproved(carol, "guarded")).to_contain_text("Its last load was refused. Added by alice.")
    assert await carol.serious(".approvals") == []
    await carol.page.set_viewport_size(PHONE)
    await carol.fits()
    await unapproved(carol, "guarded").get_by_role("button", name="Approve").click()
    await expect(opened(carol)).to_contain_text("Version 2; none is loaded.")
    await expect(opened(carol).get_by_role("list")).to_have_text("added model.onnx")
    await expect(opened(carol)).to_contain_text("Its signature was not checked")
    await expect(opened(carol)).to_contain_text("Added by alice. 0 of 1 approved.")
    assert await carol.serious("dialog[open]") == []
    await give_reason(carol, "Approve", "<b>I</b> compared its files")
    await expect(carol.page.locator("#notices")).to_contain_text("You approved guarded/2")
    await expect(listed).to_have_count(0)
    [approval] = (await server.api.model("guarded"))["approvals"]
    await ask_for_load(admin, "guarded", 2)
    await admin.see("guarded", "loaded")
    await carol.go("#/models/guarded")
    await expect(carol.page.locator(".facts")).to_contain_text("approved by carol")
    given = carol.page.locator(".its-approvals tbody tr")
    await expect(given).to_contain_text("<b>I</b> compared its files")
    await expect(given.locator("code")).to_have_attribute("title", approval["digest"])
    await expect(carol.page.locator(".its-events")).to_contain_text("<b>I</b> compared its files")
    assert await carol.serious(".its-approvals") == []
    await carol.fits()


async def test_withdrawn_approval_refuses_next_load(server: Server, admin: Console, carol: Console) -> None:
    digest = (await server.api.get("/api/v1/models/changed/verify", roles=("audit",))).json["digest"]
    path, body = "/api/v1/models/changed/versions/1/approval", {"digest": digest, "reason": "as before"}
    answer = await server.api.send("PUT", path, roles=("approve",), subject="erin", json=body)
    assert answer.status == 200, answer.body
    await carol.go("#/models/changed")
    given = carol.page.locator(".its-approvals tbody tr")
    await expect(given).to_contain_text("erin")
    await given.get_by_role("button", name="Withdraw").click()
    assert await carol.serious("dialog[open]") == []
    await give_reason(carol, "Withdraw", "it was too early")
    await expect(carol.page.locator("#notices")).to_contain_text("changed/1 is withdrawn")
    await expect(given).to_have_count(0)
    await expect(carol.page.locator(".its-events")).to_contain_text("it was too early")
    await ask_for_load(admin, "changed", 1)
    await admin.see("changed", "failed")
    await carol.go("#/")
    await expect(unapproved(carol, "changed")).to_contain_text("The ledger does not have who added")


async def test_approval_is_of_the_files_that_its_dialog_showed(
    server: Server, carol: Console, repository: Path
) -> None:
    await carol.go("#/models/urgent")
    await carol.page.get_by_role("button", name="Approve… urgent/1").click()
    await expect(opened(carol)).to_contain_text("Version 1; none is loaded.")
    models.save(models.add(3.0), repository, "urgent")
    await server.api.get("/api/v1/models/urgent/verify?version=1")
    await carol.page.get_by_label("Reason").fill("too late")
    await carol.choose("Approve")
    await expect(opened(carol).locator(".refusal")).to_contain_text("has the digest")
    await carol.choose("Not now")


async def test_models_show_their_signature_now_and_then(
    server: Server, admin: Console, carol: Console
) -> None:
    page = admin.page
    for model_id in ("signed", "unsigned"):
        await server.api.load(model_id)
    position = (await server.api.model("unsigned"))["position"]
    unsigned = "Not signed as the rules say; the rules let pass signature_missing."
    badges = [("signed", "signed", SIGNED), ("unsigned", "not signed", unsigned)]
    for address, rows in ((f"#/at/{position}", "#past-rows"), ("#/", "#models-rows")):
        await admin.go(address)
        for model_id, text, title in badges:
            row = page.locator(f"{rows} > tr", has=page.get_by_text(model_id, exact=True))
            badge = row.locator(".badge", has_text=re.compile(f"^{text}$"))
            await expect(badge).to_have_attribute("title", title)
    await admin.go("#/models/signed")
    await expect(page.locator(".facts")).to_contain_text(SIGNED)
    await carol.go("#/models/signed")  # which no rule wants approved
    await carol.page.get_by_role("button", name="Approve… signed/1").click()
    await expect(opened(carol)).to_contain_text(SIGNED)
    await expect(opened(carol)).to_contain_text("No file differs.")
    await carol.choose("Not now")


async def test_bypassed_approval_needs_attention(server: Server, browser: BrowserContext) -> None:
    dora, reason = "<img src=/x onerror=alert(1)>", "<b>payments</b> fail"  # markup is shown as text
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin", "emergency", subject=dora))
        await console.press("urgent", "Load")
        await console.page.get_by_label("Emergency: why it must not wait").fill(reason)
        await console.choose("Load")
        await console.see("urgent", "loaded")
        badge = console.row("urgent").get_by_text("bypassed", exact=True)
        await expect(badge).to_have_attribute("title", f"Loaded without approval: bypassed by {dora}")
        bypassed = console.attention.filter(has_text="urgent was loaded without approval")
        await expect(bypassed).to_contain_text(f"for {dora}")
        await console.go("#/jobs")
        job = console.page.locator(".ended-jobs .job", has_text="Load urgent")
        await expect(console.page.locator(".page")).to_contain_text(dora)
        await expect(job).to_contain_text(f"emergency: {reason}")
        await console.go("#/ledger")
        await expect(console.page.locator(".page")).to_contain_text(dora)
        await console.go("#/")
        await bypassed.get_by_role("button", name="Acknowledge").click()
        await expect(bypassed).to_have_count(0)
        assert f"{server.url}/x" not in console.urls


async def test_model_loads_on_the_chosen_device(admin: Console) -> None:
    page = admin.page
    await expect(page.locator("#devices")).to_contain_text(f"{DEVICE} (")
    await expect(page.locator("#devices")).to_contain_text("budget 2.0 GB; 0 models")
    await admin.press("ranker", "Load")
    await page.locator("#load-device").select_option(DEVICE)
    await page.locator("#load-fallback").select_option("refuse")
    assert await admin.serious("dialog[open]") == []
    await admin.choose("Load")
    await admin.see("ranker", "loaded")
    await expect(page.locator("#devices")).to_contain_text("; 1 model")
    await admin.go("#/models/ranker")
    await expect(page.locator(".page")).to_contain_text(f"8 nodes of its graph on {DEVICE} (openvino ")
    assert await admin.serious(".facts") == []


async def test_answer_leads_to_its_record_and_its_load(server: Server, admin: Console) -> None:
    page = admin.page
    for model_id in ("unrecorded", "recorded"):
        await server.api.load(model_id)
        await admin.go(f"#/models/{model_id}")
        await page.get_by_role("button", name="Infer…").click()
        await admin.choose("Run inference")
        await expect(page.locator("#infer-status")).to_contain_text(f"by {model_id}/1, the ModelLoaded at")
        if model_id == "unrecorded":
            await expect(page.locator("#infer-record")).to_have_count(0)
            await page.keyboard.press("Escape")
    position = (await server.api.get("/api/v1/models/recorded")).json["position"]
    await page.locator("#infer-record summary").click()
    record = page.get_by_role("group", name="The record")
    await expect(record).to_contain_text(f'"position": {position}')
    await expect(record).to_contain_text('"sha256": "')
    load = page.get_by_role("link", name=f"Its load, at position {position}")
    await expect(load).to_have_attribute("href", f"#/at/{position}")
