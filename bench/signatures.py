"""Costs of a load whose signature is checked, beside the same model without a rule.

Two models of the same bytes are loaded in turn; one has a signature bundle and a rule that enforces it. After
the first load both know their files' hashes, so what is left is the check itself.
"""

import base64
import hashlib
import json
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bench import driver, models
from bench.table import Row, format_mb, format_ms

GOAL_MS = 1.0
READ_BYTES = 2**20
"""More than a bundle and the head of a model: a second read of the model has 54 MB."""
SIGNED, PLAIN = "signed", "plain"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def measure(folder: Path, *, repeats: int) -> list[Row]:
    """Load two models of 54 MB in turn, so many times each.

    Args:
        folder: An empty directory.
        repeats: Loads of each.
    """
    repository, model = folder / "repository", models.add_one_from_table()
    for name in (SIGNED, PLAIN):
        models.write(repository, name, model)
    key = ec.generate_private_key(ec.SECP256R1())
    (repository / SIGNED / "1.sig").write_bytes(_sign(model, key))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(pem)
    config = folder / "loadledger.toml"
    config.write_text(f'[[trust]]\nmodels = ["{SIGNED}"]\nmode = "enforce"\nkeys = ["key.pub"]\n')
    options = (*driver.UNLIMITED, f"--config={config}")
    with driver.running(folder / "server", *options, repository=repository) as server:
        first = {name: _load(server, name) for name in (SIGNED, PLAIN)}
        again = {name: list[tuple[float, int]]() for name in (SIGNED, PLAIN)}
        for _ in range(repeats):
            for name, found in again.items():
                found.append(_load(server, name))
    return _rows(first, again)


def _rows(first: dict[str, tuple[float, int]], again: dict[str, list[tuple[float, int]]]) -> list[Row]:
    times = {name: median(took_ms for took_ms, _ in found) for name, found in again.items()}
    sizes = {name: int(median(size for _, size in found)) for name, found in again.items()}
    more_ms, more_bytes = times[SIGNED] - times[PLAIN], sizes[SIGNED] - sizes[PLAIN]
    what = "load of 54 MB whose signature is checked"
    return [
        Row(
            f"{what}, with known files: {more_ms:+.1f} ms",
            format_ms(times[SIGNED], decimals=1),
            format_ms(times[PLAIN], decimals=1),
            times[SIGNED] / times[PLAIN],
            f"≤ +{GOAL_MS:.0f} ms",
            more_ms <= GOAL_MS,
        ),
        Row(
            "bytes that the server reads meanwhile",
            format_mb(sizes[SIGNED]),
            format_mb(sizes[PLAIN]),
            None,
            "no second read",
            more_bytes <= READ_BYTES,
        ),
        Row(
            f"{what}, the first one: hashed before, not beside it",
            format_ms(first[SIGNED][0]),
            format_ms(first[PLAIN][0]),
            first[SIGNED][0] / first[PLAIN][0],
        ),
    ]


def _load(server: driver.Server, name: str) -> tuple[float, int]:
    """Load and unload a model; return the milliseconds, and the bytes that the server read for the load."""
    before = _read_bytes(server)
    took_ms = server.load(name)
    read = _read_bytes(server) - before
    server.unload(name)
    return took_ms, read


def _read_bytes(server: driver.Server) -> int:
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _sign(model: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a bundle of OpenSSF Model Signing 1.0 for a version with this model alone."""
    digest = hashlib.sha256(model).digest()
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": hashlib.sha256(digest).hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256"},
            "resources": [{"name": "model.onnx", "algorithm": "sha256", "digest": digest.hex()}],
        },
    }
    payload = json.dumps(statement).encode()
    kind = PAYLOAD_TYPE.encode()
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    signature = key.sign(encoded, ec.ECDSA(SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ""}},
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle).encode()
