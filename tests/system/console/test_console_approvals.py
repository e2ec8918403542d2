"""The console in a real browser: approvals of loads, and what models show of them."""

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import BrowserContext, Locator, expect
from support import models
from support.browser import PHONE, Console, needs_browser
from support.servers import Server, serving
from support.signing import make_key, public_pem, sign_folder

from events.policy.signatures import key_digest
from server.config import Config

pytestmark = [needs_browser, pytest.mark.asyncio(loop_scope="module")]

KEY = make_key()
SIGNER = key_digest(public_pem(KEY))
RULES = """
[[trust]]
models = ["signed", "unsigned"]
mode = "warn"
keys = ["release.pem"]

[[approval]]
models = ["guarded", "declined", "urgent", "own"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with rules for its models."""
    root = tmp_path_factory.mktemp("approvals")
    for model_id in ("guarded", "declined", "urgent", "own", "signed", "unsigned"):
        models.save(models.add(), root / "repository", model_id)
    models.save(models.add(2.0), root / "repository", "guarded", 2)
    sign_folder(root / "repository" / "signed" / "1", KEY)
    (root / "release.pem").write_text(public_pem(KEY))
    rules = root / "loadledger.toml"
    rules.write_text(RULES)
    config = Config(repository=root / "repository", data=root / "data")
    async with serving(config, f"--config={rules}") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def carol(server: Server, browser: BrowserContext) -> AsyncIterator[Console]:
    """The console of carol, who may approve and read the ledger."""
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("approve", "audit", subject="carol"))
        yield console


def waiting_for_answer(console: Console, model_id: str) -> Locator:
    return console.page.locator(".approvals .problem", has_text=f"Load of {model_id}")


async def ask_for_load(console: Console, model_id: str, version: int, reason: str) -> None:
    """Ask for a load of a model that is not loaded, with a reason."""
    await console.press(model_id, "Load")
    await console.page.locator("#load-version").select_option(str(version))
    await expect(console.page.locator("dialog[open]")).to_contain_text("until 1 other person approved it")
    await console.page.get_by_label("Reason").fill(reason)
    await console.choose("Load")


async def answer(console: Console, model_id: str, verb: str, reason: str) -> None:
    """Answer a load that waits, with a reason."""
    await waiting_for_answer(console, model_id).get_by_role("button", name=verb).click()
    await console.page.get_by_label("Reason").fill(reason)
    await console.choose(verb)


async def test_load_waits_for_the_approval_of_another_person(
    server: Server, admin: Console, carol: Console
) -> None:
    await ask_for_load(admin, "guarded", 2, "<b>fewer</b> false alarms")
    waits = admin.attention.filter(has_text="Load of guarded")
    await expect(waits).to_contain_text("For approval by another person until ")
    await expect(admin.page.get_by_role("button", name="Approve")).to_have_count(0)
    asked = waiting_for_answer(carol, "guarded")
    await expect(asked).to_contain_text("Version 2; none is loaded.")
    await expect(asked.locator(".files")).to_have_text("added model.onnx")
    await expect(asked).to_contain_text("Its signature was not checked")
    await expect(asked).to_contain_text("Asked for by alice: <b>fewer</b> false alarms")
    await expect(asked).to_contain_text("0 of 1 approved")
    await expect(carol.page.get_by_role("link", name="Overview 1 need attention")).to_be_visible()
    await expect(carol.attention.filter(has_text="guarded")).to_have_count(0)
    assert await carol.serious() == []
    await carol.page.set_viewport_size(PHONE)
    await carol.fits()
    await asked.get_by_role("button", name="Approve").click()
    digest = (await server.api.jobs("?model=guarded"))[0]["approval"]["digest"]
    await expect(carol.page.locator("dialog[open]")).to_contain_text(digest)
    assert await carol.serious("dialog[open]") == []
    await carol.page.get_by_label("Reason").fill("  ")
    await carol.choose("Approve")
    await expect(carol.page.locator("dialog[open] .refusal")).to_contain_text("Give a reason")
    await carol.page.get_by_label("Reason").fill("I compared its files")
    await carol.choose("Approve")
    await expect(carol.page.locator("#notices")).to_contain_text("You approved the load of guarded")
    await carol.see("guarded", "loaded")
    await expect(asked).to_have_count(0)
    await carol.go("#/models/guarded")
    await expect(carol.page.locator(".facts")).to_contain_text("approved by carol")
    await expect(carol.page.locator(".its-events")).to_contain_text("I compared its files")
    await expect(carol.page.locator(".its-jobs .job").first).to_contain_text("approved by carol")


async def test_rejected_load_fails_with_the_reason(
    server: Server, browser: BrowserContext, admin: Console
) -> None:
    await ask_for_load(admin, "declined", 1, "")
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("approve", subject="erin"), says="Every 3 s")
        await expect(waiting_for_answer(console, "declined")).to_contain_text("alice: no reason is given")
        await answer(console, "declined", "Reject", "not before Monday")
        await expect(waiting_for_answer(console, "declined")).to_have_count(0)
    await expect(admin.page.locator("#notices")).to_contain_text("rejected by erin: not before Monday")
    await admin.see("declined", "unloaded")
    await admin.go("#/jobs")
    failed = admin.page.locator(".ended-jobs .job", has_text="Load declined")
    await expect(failed.locator(".pill")).to_have_text("failed")
    await expect(failed).to_contain_text("rejected by erin: not before Monday")


async def test_own_load_is_not_offered_and_late_answer_is_refused(
    server: Server, browser: BrowserContext
) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin", "approve", subject="carol"))
        job = await server.api.accepted_load("own")  # of alice
        await waiting_for_answer(console, "own").get_by_role("button", name="Approve").click()
        await server.api.post(f"/api/v1/jobs/{job['id']}/cancel")
        await server.api.ended(job["id"])
        await console.page.get_by_label("Reason").fill("too late")
        await console.choose("Approve")
        await expect(console.page.locator("dialog[open] .refusal")).to_contain_text("does not wait")
        await console.choose("Not now")
        await ask_for_load(console, "own", 1, "")
        await expect(console.attention.filter(has_text="Load of own")).to_contain_text("Requested by carol")
        await expect(waiting_for_answer(console, "own")).to_have_count(0)
        await console.attention.filter(has_text="Load of own").get_by_role("button", name="Cancel").click()


async def test_models_show_their_signature_now_and_then(server: Server, admin: Console) -> None:
    page = admin.page
    for model_id in ("signed", "unsigned"):
        await server.api.load(model_id)
    position = (await server.api.model("unsigned"))["position"]
    signed = f"Signed: the key is {SIGNER}; the rules only warn."
    unsigned = "Not signed as the rules say; the rules let pass signature_missing."
    badges = [("signed", "signed", signed), ("unsigned", "not signed", unsigned)]
    for address, rows in ((f"#/at/{position}", "#past-rows"), ("#/", "#models-rows")):
        await admin.go(address)
        for model_id, text, title in badges:
            row = page.locator(f"{rows} > tr", has=page.get_by_text(model_id, exact=True))
            badge = row.locator(".badge", has_text=re.compile(f"^{text}$"))
            await expect(badge).to_have_attribute("title", title)
    await admin.go("#/models/signed")
    await expect(page.locator(".facts")).to_contain_text(f"Signed: the key is {SIGNER}")


async def test_bypassed_approval_needs_attention(server: Server, browser: BrowserContext) -> None:
    async with Console.opened(browser, server.url) as console:
        await console.sign_in(server.api.token("admin", "emergency", subject="dora"))
        await console.press("urgent", "Load")
        await console.page.get_by_label("Emergency: why it must not wait").fill("payments fail")
        await console.choose("Load")
        await console.see("urgent", "loaded")
        badge = console.row("urgent").get_by_text("bypassed", exact=True)
        await expect(badge).to_have_attribute("title", "Loaded without approval: bypassed by dora")
        bypassed = console.attention.filter(has_text="urgent was loaded without approval")
        await expect(bypassed).to_contain_text("for dora")
        await console.go("#/jobs")
        job = console.page.locator(".ended-jobs .job", has_text="Load urgent")
        await expect(job).to_contain_text("emergency: payments fail · without approval")
        await console.go("#/")
        await bypassed.get_by_role("button", name="Acknowledge").click()
        await expect(bypassed).to_have_count(0)
