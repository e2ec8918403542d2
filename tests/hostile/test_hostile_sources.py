"""Hostile servers as sources of versions: each add fails, leaves nothing, and disturbs nobody."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from support import models
from support.campaign import attacked
from support.fleet import new_dice, of_both
from support.origins import HANG, Asked, answer, serving_site, write_authority
from support.servers import limited
from support.uploads import staged

from server.config import Config

MODEL = models.add(1).SerializeToString()
PINNED = f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
MOST_BYTES = 2**20
"""Of a version."""
TIMEOUT_S, LONG_S = 5, 60
"""Of an add: a server that says nothing costs the first; what fails by itself has the other."""
COMMAND = limited(max_upload_bytes=MOST_BYTES)
ROUNDS = of_both(short=1, long=20)
VERSION, WAIT = "/api/v1/models/m/versions/1", {"Prefer": "wait=60"}
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
Reply = Callable[[Asked], bytes]


def tar_of(*names: str, content: bytes = MODEL, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def long_header() -> bytes:
    """Return an archive whose first header says that it has 8 GiB of names."""
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 8 * 2**30
    return member.tobuf() + bytes(2**20)


def image(layer: bytes) -> Reply:
    """Return a registry with one image of one layer."""
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    described = {"mediaType": LAYER, "digest": digest, "size": len(layer)}
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": 2}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [described]}

    def reply(asked: Asked) -> bytes:
        is_manifest = "/manifests/" in asked.path
        body = json.dumps(manifest).encode() if is_manifest else layer
        return answer(200, body, content_type=MANIFEST if is_manifest else "application/octet-stream")

    return reply


def to_itself(asked: Asked) -> bytes:
    return answer(302, location=f"https://{asked.headers['host']}{asked.path}/again")


ATTACKS: list[tuple[str, str, Reply, set[str]]] = [
    # what, scheme, reply, codes of the add
    ("endless body", "https", lambda _: answer(200, bytes(2**24), content_length=None), {"body_too_large"}),
    ("body of 9 EB", "https", lambda _: answer(200, content_length=2**63 - 1) + HANG, {"body_too_large"}),
    ("slow body", "https", lambda _: answer(200, MODEL[:9], content_length=99) + HANG, {"timeout"}),
    ("no answer", "https", lambda _: HANG, {"timeout"}),
    ("short body", "https", lambda _: answer(200, MODEL[:9], content_length=99), {"source_changed"}),
    ("wrong digest", "https", lambda _: answer(200, b"<html>"), {"digest_mismatch"}),
    ("other coding", "https", lambda _: answer(200, gzip.compress(bytes(2**26)), content_encoding="gzip"),
     {"source_invalid"}),
    ("endless head", "https", lambda _: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 2**20,
     {"source_invalid", "source_unreachable", "timeout"}),
    ("no HTTP", "https", lambda _: bytes(2**20), {"source_invalid", "source_unreachable", "timeout"}),
    ("redirects without end", "https", to_itself, {"source_invalid"}),
    *(
        (f"redirect to {target}", "https", lambda _, target=target: answer(302, location=target),
         {"source_not_allowed", "source_invalid"})
        for target in ("http://localhost/", "https://169.254.169.254/latest/meta-data", "https://[::1]/",
                       "https://127.1/", "file:///etc/passwd", "https://localhost:22/")
    ),
    ("endless listing", "oci", lambda _: answer(200, b"[" * 2**25, content_length=None), {"source_invalid"}),
    ("upward name", "oci", image(gzip.compress(tar_of("../../model.onnx"))), {"source_invalid"}),
    ("absolute name", "oci", image(gzip.compress(tar_of("/etc/model.onnx"))), {"source_invalid"}),
    ("link", "oci", image(gzip.compress(tar_of("m.onnx", kind=tarfile.SYMTYPE, target="/etc/passwd"))),
     {"source_invalid"}),
    ("device", "oci", image(gzip.compress(tar_of("m.onnx", kind=tarfile.CHRTYPE))), {"source_invalid"}),
    ("bomb", "oci", image(gzip.compress(tar_of("m.onnx", content=bytes(2**26)))), {"body_too_large"}),
    ("header of 8 GiB", "oci", image(gzip.compress(long_header())), {"source_invalid", "fetch_failed"}),
    ("no archive", "oci", image(b"<html>"), {"source_invalid"}),
]  # fmt: skip


async def test_hostile_sources_fail_and_leave_nothing(config: Config, tmp_path: Path) -> None:
    dice, replies = new_dice(), dict[str, Reply]()
    environment = {"SSL_CERT_FILE": write_authority(tmp_path)}

    def reply_now(asked: Asked) -> bytes:
        return replies["now"](asked)

    async with serving_site(reply_now) as site:
        sources = f"--sources=https://{site.host},oci://{site.host}"
        async with attacked(config, sources, command=COMMAND, environment=environment) as attack:
            for _ in range(ROUNDS):
                for what, scheme, reply, codes in dice.sample(ATTACKS, of_both(short=4, long=len(ATTACKS))):
                    replies["now"] = reply
                    timeout_s = TIMEOUT_S if "timeout" in codes else LONG_S
                    asked = {"source": f"{scheme}://{site.host}/m", "timeout_s": timeout_s}
                    digest = {"digest": PINNED} if scheme == "https" else {}
                    answered = await attack.server.api.send("PUT", VERSION, json=asked | digest, headers=WAIT)
                    job = answered.json
                    assert (what, job["status"]) == (what, "failed"), job
                    assert job["error"]["code"] in codes, (what, job["error"])
                    assert staged(config.repository) == []
                    assert not (config.repository / "m").exists()
                    attack.counts[job["error"]["code"]] += 1
