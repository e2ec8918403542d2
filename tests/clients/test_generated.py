"""A client that openapi-python-client generates from openapi.yaml, with httpx, in a process of its own."""

import asyncio
import os
import sys
from pathlib import Path

from support import models
from support.http import LocalApi

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
SESSION = """
import sys
from generated.api.models import load_model, show_model, unload_model
from generated.client import AuthenticatedClient
from generated.models import JobInfo, LoadBody, ModelInfo, UnloadBody

with AuthenticatedClient(base_url=sys.argv[1], token=sys.argv[2]) as client:
    job = load_model.sync("m", client=client, body=LoadBody(version=1, reason="try"), prefer="wait=60")
    assert isinstance(job, JobInfo) and job.status == "completed" and job.error is None, job
    model = show_model.sync("m", client=client)
    assert isinstance(model, ModelInfo) and (model.state, model.version) == ("loaded", 1), model
    assert [(each.name, each.datatype) for each in model.inputs] == [("x", "FP32")]
    refused = load_model.sync("none", client=client, body=LoadBody())
    assert (refused.status, refused.code) == (404, "unknown_model"), refused
    job = unload_model.sync("m", client=client, body=UnloadBody(), prefer="wait=60")
    assert isinstance(job, JobInfo) and (job.kind, job.status) == ("unload", "completed"), job
"""


async def run(*command: str, folder: Path) -> None:
    """Run a Python program in a folder, which it also imports from; its output is shown if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "default"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()


async def test_generated_client_loads_and_unloads_a_model(shared: LocalApi, tmp_path: Path) -> None:
    shared.save(models.add(1), "m")
    (tmp_path / "settings.yaml").write_text("post_hooks: []\n", encoding="utf-8")
    document = ("--path", str(ROOT / "openapi.yaml"), "--config", "settings.yaml")
    target = ("--meta", "none", "--output-path", "generated")
    await run("-m", "openapi_python_client", "generate", *document, *target, folder=tmp_path)
    await run("-c", SESSION, shared.url, shared.token("admin"), folder=tmp_path)
