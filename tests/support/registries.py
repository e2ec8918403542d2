"""A real OCI registry (distribution's, as Debian has it), with TLS and each kind of authentication."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import aiohttp
import jwt
import pytest
import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from support.connections import Pair, make_pair
from support.workers import LIMIT_S

NAME, PASSWORD = "user", "secret"
BASIC = f"Basic {base64.b64encode(f'{NAME}:{PASSWORD}'.encode()).decode()}"
HASHED = "$2b$04$ZHtdwQgfxcnchO.7zV9beeaALO6CprJ53TCTpjvpwCnl39CxTJdOu"
"""bcrypt of the password."""
SERVICE, ISSUER = "the registry", "the token server"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"

Auth = Literal["none", "basic", "token"]
Document = Mapping[str, Any]


def require_registry() -> str:
    """Return the path of the registry's program; skip the test without it, fail if REGISTRY names another."""
    program = os.environ.get("REGISTRY") or shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed here: .ci/registry installs it, and REGISTRY names it")
    if not Path(program).is_file():
        pytest.fail(f"REGISTRY names {program}, which is no file")
    return program


@dataclass(slots=True)
class Registry:
    """A running registry.

    Attributes:
        folder: where it keeps blobs, its settings and its certificate.
        host: with its port.
        pair: its certificate, which is its own authority, and its key.
        auth: what it asks of clients.
        tokens: the scopes for which its token server was asked, and the Authorization header.
    """

    folder: Path
    host: str
    pair: Pair
    auth: Auth
    tokens: list[tuple[str, str | None]]

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    def environment(self) -> dict[str, str]:
        """Return the variables of a command that has logged in; docker's file is in the registry's folder."""
        config = {"auths": {f"https://{self.host}/v2/": {"auth": BASIC.removeprefix("Basic ")}}}
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return {"SSL_CERT_FILE": str(self.certificate), "DOCKER_CONFIG": str(self.folder)}

    async def push(self, repository: str, tag: str, layers: Sequence[Document]) -> str:
        """Push layers, as `describe` made them, with a manifest; return its digest."""
        config = await self.push_blob(repository, b"{}", EMPTY)
        return await self.push_manifest(repository, tag, make_manifest(config, layers), IMAGE_MANIFEST)

    async def push_blob(
        self, repository: str, content: bytes, media_type: str, **annotations: str
    ) -> Document:
        """Push a blob; return its descriptor, with annotations by their names in this module."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        async with self._session(repository) as session:
            async with session.post(f"https://{self.host}/v2/{repository}/blobs/uploads/") as begun:
                begun.raise_for_status()
                target = begun.headers["Location"]
            async with session.put(f"{target}&digest={digest}", data=BytesIO(content)) as done:
                done.raise_for_status()
        return {"mediaType": media_type, "digest": digest, "size": len(content), "annotations": annotations}

    async def push_manifest(self, repository: str, tag: str, manifest: Document, media_type: str) -> str:
        async with self._session(repository) as session:
            body, headers = json.dumps(manifest).encode(), {"Content-Type": media_type}
            url = f"https://{self.host}/v2/{repository}/manifests/{tag}"
            async with session.put(url, data=body, headers=headers) as done:
                done.raise_for_status()
        return f"sha256:{hashlib.sha256(body).hexdigest()}"

    @asynccontextmanager
    async def _session(self, repository: str) -> AsyncIterator[aiohttp.ClientSession]:
        headers = dict[str, str]()
        if self.auth == "basic":
            headers["Authorization"] = BASIC
        elif self.auth == "token":
            token = issue_token(self.pair, repository, ["pull", "push"])
            headers["Authorization"] = f"Bearer {token}"
        connector = aiohttp.TCPConnector(ssl=self.pair.trusting())
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            yield session


def make_manifest(config: Document, layers: Sequence[Document]) -> Document:
    return {"schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "config": config, "layers": layers}


@asynccontextmanager
async def running_registry(folder: Path, auth: Auth = "none") -> AsyncIterator[Registry]:
    """Run a registry in a folder; it ends with the context, or with this process."""
    program, pair = require_registry(), make_pair()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = Registry(folder, f"127.0.0.1:{port}", pair, auth, [])
    pair.write(registry.certificate, folder / "key.pem")
    async with _token_server(registry) as realm:
        settings = folder / "settings.yml"
        settings.write_text(yaml.safe_dump(_make_settings(registry, realm)), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", program, "serve", str(settings)),
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(LIMIT_S):
                while b"listening on" not in (line := await process.stderr.readline()):
                    assert line, "the registry has ended"
            draining = asyncio.create_task(process.stderr.read())
            yield registry
            process.kill()
            await draining
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _make_settings(registry: Registry, realm: str) -> Document:
    certificate, accounts = str(registry.certificate), registry.folder / "htpasswd"
    accounts.write_text(f"{NAME}:{HASHED}\n", encoding="utf-8")
    auth = {
        "none": {},
        "basic": {"auth": {"htpasswd": {"realm": "the registry", "path": str(accounts)}}},
        "token": {
            "auth": {
                "token": {
                    "realm": realm,
                    "service": SERVICE,
                    "issuer": ISSUER,
                    "rootcertbundle": certificate,
                }
            }
        },
    }[registry.auth]
    return {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(registry.folder / "blobs")}},
        "http": {
            "addr": registry.host,
            "secret": "shared",
            "tls": {"certificate": certificate, "key": str(registry.folder / "key.pem")},
        },
        **auth,
    }


@asynccontextmanager
async def _token_server(registry: Registry) -> AsyncIterator[str]:
    """Run the registry's token server; it gives anybody with the password a token, and others public ones."""

    async def answer(request: web.Request) -> web.Response:
        given, scope = request.headers.get("Authorization"), request.query["scope"]
        registry.tokens.append((scope, given))
        repository = scope.split(":")[1]
        if given is not None and given != BASIC:
            return web.Response(status=401)
        if given is None and not repository.startswith("public/"):
            return web.json_response({"token": issue_token(registry.pair, repository, [])})
        return web.json_response({"token": issue_token(registry.pair, repository, ["pull"])})

    app = web.Application()
    app.router.add_get("/token", answer)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(registry.certificate, registry.folder / "key.pem")
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield f"https://127.0.0.1:{runner.addresses[0][1]}/token"
    finally:
        await runner.cleanup()


def issue_token(pair: Pair, repository: str, actions: Sequence[str]) -> str:
    """Return a token for a repository (distribution.github.io, "Token Authentication Implementation")."""
    certificate = x509.load_pem_x509_certificate(pair.certificate).public_bytes(Encoding.DER)
    claims = {
        "iss": ISSUER,
        "sub": NAME,
        "aud": SERVICE,
        "exp": 4102444800,
        "nbf": 0,
        "iat": 0,
        "jti": uuid4().hex,
        "access": [{"type": "repository", "name": repository, "actions": list(actions)}],
    }
    chain = [base64.b64encode(certificate).decode()]
    return jwt.encode(claims, pair.key.decode(), algorithm="ES256", headers={"x5c": chain})
