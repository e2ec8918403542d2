"""Signatures of versions: by whom, of which files, as of when."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st
from support.signing import (
    NOW,
    START,
    Certified,
    key_usage,
    make_authority,
    make_contents,
    make_key,
    make_statement,
    public_pem,
    sign_payload,
    sign_version,
)

from events.types import Contents
from features.signatures.bundles import parse_bundle
from features.signatures.rules import TrustedCertificates, TrustMode, TrustRule
from features.signatures.verification import (
    SignatureRefused,
    VerifiedSignature,
    check_signature,
    find_bundle,
    key_digest,
    normalise_key,
    normalise_roots,
    parse_subject,
)

SIG = "model.sig"
CONTENTS = make_contents("loadledger.toml", "model.onnx", SIG, "weights/part-1.bin")
KEY = make_key()
PUBLISHED = Path(__file__).parent / "published"


def trust(
    *keys: Any, roots: str = "", subject: str = "CN=release,O=Bank", distrusted: Sequence[str] = ()
) -> TrustRule:
    """Return a rule of these private keys' public ones, and of certificates below `roots`."""
    certificates = (TrustedCertificates(roots, subject),) if roots else ()
    return TrustRule(("*",), TrustMode.ENFORCE, tuple(map(public_pem, keys)), certificates, tuple(distrusted))


def check(content: bytes, rule: TrustRule, contents: Contents = CONTENTS, at: str = NOW) -> VerifiedSignature:
    return check_signature(content, SIG, contents, rule, at)


def refusal(content: bytes, rule: TrustRule, contents: Contents = CONTENTS, at: str = NOW) -> tuple[str, str]:
    """Return code and message with which a signature is refused."""
    with pytest.raises(SignatureRefused) as refused:
        check(content, rule, contents, at)
    return refused.value.code.removeprefix("signature_"), str(refused.value)


# The bundle among the files


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        (["model.onnx"], "missing"),
        (["model.onnx", "weights/model.sig", "model.sig.txt"], "missing"),
        (["a.sig", "b.sig"], "invalid"),
    ],
)
def test_bundle_that_is_not_the_only_one_is_refused(paths: list[str], code: str) -> None:
    with pytest.raises(SignatureRefused) as refused:
        find_bundle(make_contents(*paths))
    assert refused.value.code == f"signature_{code}"


def test_bundle_has_any_name_with_its_suffix() -> None:
    assert find_bundle(make_contents("model.onnx", "claims.sig", "weights/model.sig")) == "claims.sig"


# Keys


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_signature_of_each_curve_is_verified(curve: str) -> None:
    key = make_key(curve)
    expected = VerifiedSignature("key", hashlib.sha256(public_pem(key).encode()).hexdigest())
    assert check(sign_version(CONTENTS, key), trust(KEY, key)) == expected


def without_hint(key: ec.EllipticCurvePrivateKey) -> bytes:
    signed = CONTENTS[:2] + CONTENTS[3:]
    return sign_payload(
        json.dumps(make_statement(signed)).encode(), key, verificationMaterial={"publicKey": {}}
    )


def test_signature_without_hint_is_verified_with_each_key() -> None:
    other = make_key("P-384")
    assert check(without_hint(other), trust(KEY, other)).signer == key_digest(public_pem(other))


def test_signature_of_another_key_is_untrusted() -> None:
    code, message = refusal(sign_version(CONTENTS, make_key()), trust(KEY))
    assert code == "untrusted"
    assert "which the rule does not have" in message
    assert refusal(without_hint(make_key()), trust(KEY))[0] == "untrusted"
    assert refusal(without_hint(KEY), trust())[0] == "untrusted"


def test_signature_with_the_hint_of_another_key_is_invalid() -> None:
    document = json.loads(sign_version(CONTENTS, make_key()))
    document["verificationMaterial"]["publicKey"]["hint"] = key_digest(public_pem(KEY))
    assert refusal(json.dumps(document).encode(), trust(KEY))[0] == "invalid"


def test_distrusted_key_is_refused_with_and_without_hint() -> None:
    rule = trust(KEY, distrusted=[key_digest(public_pem(KEY))])
    for content in (sign_version(CONTENTS, KEY), without_hint(KEY)):
        code, message = refusal(content, rule)
        assert code == "untrusted"
        assert "is distrusted" in message


def test_key_signature_needs_a_key_of_the_rule() -> None:
    assert refusal(sign_version(CONTENTS, KEY), trust(roots=make_authority().pem))[0] == "untrusted"


# Files


def test_each_changed_file_is_a_mismatch_that_names_it() -> None:
    content = sign_version(CONTENTS, KEY)
    for index, (path, _) in enumerate(CONTENTS):
        others = CONTENTS[:index] + CONTENTS[index + 1 :]
        if path == SIG:
            assert check(content, trust(KEY), others).signer
            continue
        for contents, reason in (
            ((*others, (path, "0" * 64)), "was changed"),
            (others, "is missing"),
            ((*CONTENTS, (f"{path}.new", "0" * 64)), "is not signed"),
        ):
            code, message = refusal(content, trust(KEY), tuple(sorted(contents)))
            assert code == "mismatch"
            assert path in message
            assert reason in message


def test_renamed_file_is_a_mismatch() -> None:
    contents = tuple(sorted((path.replace("part-1", "part-2"), sha256) for path, sha256 in CONTENTS))
    assert refusal(sign_version(CONTENTS, KEY), trust(KEY), contents)[0] == "mismatch"


def test_ignored_path_excuses_no_file() -> None:
    contents = (("ignored", "0" * 64), *CONTENTS)
    content = sign_version(CONTENTS, KEY, ignore_paths=["ignored", "."], allow_symlinks=True)
    code, message = refusal(content, trust(KEY), contents)
    assert code == "mismatch"
    assert "'ignored' is not signed" in message


def test_another_bundle_is_a_file_like_any_other() -> None:
    contents = tuple(sorted((*CONTENTS, ("weights/other.sig", "0" * 64))))
    assert refusal(sign_version(CONTENTS, KEY), trust(KEY), contents)[0] == "mismatch"


def test_signed_bundle_path_must_have_its_hash() -> None:
    payload = json.dumps(make_statement(CONTENTS)).encode()
    assert check(sign_payload(payload, KEY), trust(KEY)).method == "key"
    other = tuple((path, "0" * 64 if path == SIG else sha256) for path, sha256 in CONTENTS)
    assert refusal(sign_payload(payload, KEY), trust(KEY), other)[0] == "mismatch"


# Changed bundles


SMALL = make_contents("a", SIG)
SMALL_CONTENT = sign_version(SMALL, KEY)


def test_no_flipped_bit_gives_another_statement() -> None:
    rule, accepted = trust(KEY), parse_bundle(SMALL_CONTENT).payload
    for bit in range(len(SMALL_CONTENT) * 8):
        content = bytearray(SMALL_CONTENT)
        content[bit // 8] ^= 1 << bit % 8
        try:
            check(bytes(content), rule, SMALL)
        except SignatureRefused:
            continue
        assert parse_bundle(bytes(content)).payload == accepted


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.data())
def test_changed_certificate_signs_nothing(data: st.DataObject) -> None:
    der = bytearray(SIGNER.certificate.public_bytes(Encoding.DER))
    der[data.draw(st.integers(0, len(der) - 1))] ^= data.draw(st.integers(1, 255))
    document = json.loads(sign_version(SMALL, SIGNER.key, SIGNER.chain))
    chain = document["verificationMaterial"]["x509CertificateChain"]["certificates"]
    chain[0]["rawBytes"] = base64.b64encode(der).decode()
    try:
        check(json.dumps(document).encode(), trust(roots=ROOT.pem), SMALL)
    except SignatureRefused:
        return
    signed = x509.load_der_x509_certificate(bytes(der)).tbs_certificate_bytes
    assert signed == SIGNER.certificate.tbs_certificate_bytes  # the issuer's signature is written otherwise


def test_subject_with_a_value_of_another_type_is_refused() -> None:
    der = SIGNER.certificate.public_bytes(Encoding.DER)
    at = der.index(b"\x0c\x07release")  # an ASN.1 UTF8String
    document = json.loads(sign_version(SMALL, SIGNER.key, SIGNER.chain))
    chain = document["verificationMaterial"]["x509CertificateChain"]["certificates"]
    for tag in set(range(256)) - {der[at]}:
        chain[0]["rawBytes"] = base64.b64encode(der[:at] + bytes([tag]) + der[at + 1 :]).decode()
        code, _ = refusal(json.dumps(document).encode(), trust(roots=ROOT.pem), SMALL)
        assert code in {"invalid", "untrusted"}


# Certificates


ROOT = make_authority()
SIGNER = ROOT.issue()


def refused_signer(signer: Certified, rule: TrustRule | None = None, at: str = NOW) -> tuple[str, str]:
    content = sign_version(CONTENTS, signer.key, signer.chain)
    return refusal(content, rule or trust(roots=ROOT.pem), at=at)


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_certificate_of_each_curve_is_verified(curve: str) -> None:
    signer = ROOT.issue_authority().issue(curve=curve)
    content = sign_version(CONTENTS, signer.key, signer.chain)
    assert check(content, trust(roots=ROOT.pem)) == VerifiedSignature("certificate", "CN=release,O=Bank")


@pytest.mark.parametrize("subject", ["CN=release, O=Bank", "2.5.4.3=release,O=Bank", r"CN=\72elease,O=Bank"])
def test_subject_is_compared_as_a_name(subject: str) -> None:
    content = sign_version(CONTENTS, SIGNER.key, SIGNER.chain)
    assert check(content, trust(roots=ROOT.pem, subject=subject)).signer == "CN=release,O=Bank"


@pytest.mark.parametrize(
    "subject",
    ["CN=release", "O=Bank,CN=release", "CN=Release,O=Bank", "CN=release+O=Bank", "CN=release,O=Bank,C=CH"],
)
def test_certificate_of_another_subject_is_untrusted(subject: str) -> None:
    code, message = refused_signer(SIGNER, trust(roots=ROOT.pem, subject=subject))
    assert code == "untrusted"
    assert "'CN=release,O=Bank' signed, which the rule does not have" in message


def test_certificate_is_verified_with_the_roots_of_its_subject() -> None:
    other = make_authority("CN=Other")
    rule = TrustRule(
        ("*",),
        TrustMode.ENFORCE,
        certificates=(
            TrustedCertificates(ROOT.pem, "CN=somebody"),
            TrustedCertificates(other.pem, "CN=release,O=Bank"),
        ),
    )
    assert refused_signer(SIGNER, rule)[0] == "untrusted"


UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
NO_CODE = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]
CONSTRAINED = make_authority("CN=Constrained", path_length=0)
SIGNERS = {
    "another root": (make_authority().issue(), "validation failed"),
    "not valid yet": (ROOT.issue(start=START + timedelta(days=200), days=9), "not valid at validation time"),
    "expired": (ROOT.issue(days=100), "not valid at validation time"),
    "no extended key usage": (ROOT.issue(usage=()), "missing required extension"),
    "not for code": (ROOT.issue(usage=NO_CODE), "it is not for code signing"),
    "may not sign": (ROOT.issue(extensions=[(key_usage(key_cert_sign=True), True)]), "it may not sign"),
    "authority": (
        ROOT.issue(extensions=[(x509.BasicConstraints(ca=True, path_length=None), True)]),
        "it is of an authority",
    ),
    "issuer is no authority": (ROOT.issue().issue(), "validation failed"),
    "issuer may not issue": (
        ROOT.issue(
            "CN=Intermediate",
            extensions=[
                (x509.BasicConstraints(ca=True, path_length=None), True),
                (key_usage(digital_signature=True), True),
            ],
        ).issue(),
        "an issuer may not issue",
    ),
    "issuer is not for code": (
        ROOT.issue_authority(usage=[ExtendedKeyUsageOID.SERVER_AUTH]).issue(),
        "an issuer is not for code signing",
    ),
    "unknown critical extension": (ROOT.issue(extensions=[(UNKNOWN, True)]), "critical extension"),
    "path too long": (ROOT.issue_authority(path_length=0).issue_authority("CN=Below").issue(), "path length"),
    "constrained names": (
        ROOT.issue(
            "CN=Intermediate",
            usage=(),
            extensions=[
                (x509.BasicConstraints(ca=True, path_length=None), True),
                (x509.NameConstraints([x509.DirectoryName(parse_subject("O=Other"))], None), True),
            ],
        ).issue(),
        "prohibited extension",
    ),
}


@pytest.mark.parametrize("case", SIGNERS)
def test_certificate_that_may_not_sign_is_untrusted(case: str) -> None:
    signer, reason = SIGNERS[case]
    code, message = refused_signer(signer)
    assert code == "untrusted"
    assert reason in message


@pytest.mark.parametrize("usage", [ExtendedKeyUsageOID.CODE_SIGNING, *NO_CODE[1:]])
def test_authority_for_code_signing_may_issue(usage: ObjectIdentifier) -> None:
    signer = ROOT.issue_authority(usage=[ExtendedKeyUsageOID.SERVER_AUTH, usage]).issue()
    content = sign_version(CONTENTS, signer.key, signer.chain)
    assert check(content, trust(roots=ROOT.pem)).method == "certificate"


def test_unknown_extension_that_is_not_critical_is_accepted() -> None:
    signer = ROOT.issue(extensions=[(UNKNOWN, False), (key_usage(digital_signature=True), True)])
    assert (
        check(sign_version(CONTENTS, signer.key, signer.chain), trust(roots=ROOT.pem)).method == "certificate"
    )


def test_expired_root_is_untrusted() -> None:
    root = make_authority(days=10)
    assert refused_signer(root.issue(), trust(roots=root.pem))[0] == "untrusted"


def test_certificate_is_valid_until_its_end() -> None:
    signer = ROOT.issue(days=1)
    content = sign_version(CONTENTS, signer.key, signer.chain)
    assert check(content, trust(roots=ROOT.pem), at="2026-01-02T00:00:00.999999Z").method == "certificate"
    assert refusal(content, trust(roots=ROOT.pem), at="2026-01-02T00:00:01.000000Z")[0] == "untrusted"
    assert refusal(content, trust(roots=ROOT.pem), at="2025-12-31T23:59:59.999999Z")[0] == "untrusted"


def test_root_in_the_bundle_is_not_trusted() -> None:
    root = make_authority()
    signer = root.issue()
    content = sign_version(CONTENTS, signer.key, (*signer.chain, root.certificate))
    assert refusal(content, trust(roots=ROOT.pem))[0] == "untrusted"
    assert check(content, trust(roots=root.pem)).method == "certificate"


def test_missing_intermediate_is_untrusted() -> None:
    signer = ROOT.issue_authority().issue()
    assert (
        refusal(sign_version(CONTENTS, signer.key, signer.chain[:1]), trust(roots=ROOT.pem))[0] == "untrusted"
    )


def test_signature_by_another_key_than_the_certificate_is_invalid() -> None:
    assert refusal(sign_version(CONTENTS, KEY, SIGNER.chain), trust(KEY, roots=ROOT.pem))[0] == "invalid"


def test_certificate_of_another_kind_of_key_is_unsupported() -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())):
        signer = ROOT.issue(key=key)
        content = sign_version(CONTENTS, KEY, signer.chain)
        assert refusal(content, trust(roots=ROOT.pem))[0] == "unsupported"


def test_certificate_needs_certificates_of_the_rule() -> None:
    assert refused_signer(SIGNER, trust(SIGNER.key))[0] == "untrusted"


@pytest.mark.parametrize("which", ["signer", "intermediate", "root"])
def test_distrusted_key_of_the_chain_is_untrusted(which: str) -> None:
    intermediate = ROOT.issue_authority()
    signer = intermediate.issue()
    key = {"signer": signer.key, "intermediate": intermediate.key, "root": ROOT.key}[which]
    code, message = refused_signer(signer, trust(roots=ROOT.pem, distrusted=[key_digest(public_pem(key))]))
    assert code == "untrusted"
    assert "is distrusted" in message


def test_distrust_is_told_of_an_expired_certificate_too() -> None:
    signer = ROOT.issue(days=1)
    rule = trust(roots=ROOT.pem, distrusted=[key_digest(public_pem(signer.key))])
    assert "is distrusted" in refused_signer(signer, rule)[1]


# Files of keys and certificates


def private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


KEYS = {
    "empty": ("", "no public key as PEM"),
    "broken": (public_pem(KEY).replace("M", "N"), "no public key as PEM"),
    "private": (private_pem(KEY), "no public key as PEM"),
    "private beside": (public_pem(KEY) + private_pem(KEY), "must be one public key"),
    "two": (public_pem(KEY) * 2, "must be one public key"),
    "RSA": (public_pem(rsa.generate_private_key(65537, 2048)), "of P-256, P-384 or P-521"),
    "Ed25519": (public_pem(ed25519.Ed25519PrivateKey.generate()), "of P-256, P-384 or P-521"),
    "secp256k1": (public_pem(ec.generate_private_key(ec.SECP256K1())), "of P-256, P-384 or P-521"),
    "certificate": (ROOT.pem, "no public key as PEM"),
}


@pytest.mark.parametrize("case", KEYS)
def test_file_that_is_no_key_is_refused(case: str) -> None:
    pem, reason = KEYS[case]
    with pytest.raises(ValueError, match=reason):
        normalise_key(pem)


def test_comments_and_line_ends_change_no_digest() -> None:
    pem = "a comment\r\n" + public_pem(KEY).replace("\n", "\r\n") + "\r\n"
    assert normalise_key(pem) == public_pem(KEY)
    assert key_digest(pem) == key_digest(public_pem(KEY))


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        ("", "no certificate"),
        (public_pem(KEY), "no certificate"),
        (ROOT.pem.replace("MII", "MIJ"), "cannot be read"),
    ],
)
def test_file_that_has_no_roots_is_refused(pem: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        normalise_roots(pem)


def test_roots_are_all_certificates_of_the_file() -> None:
    other = make_authority()
    assert normalise_roots(f"Subject: root\n{ROOT.pem}\n\n{other.pem}") == ROOT.pem + other.pem


@pytest.mark.parametrize("text", ["", "release", "CN", "CN=", "XY=a"])
def test_text_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no name as RFC 4514 writes it"):
        parse_subject(text)


# Bundles of the published tool


def published_contents() -> Contents:
    folder = PUBLISHED / "model"
    files = [path for path in folder.rglob("*") if path.is_file()]
    hashes = (
        (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
    )
    return tuple(sorted(hashes))


def published_rule() -> TrustRule:
    roots = (PUBLISHED / "ca.pem").read_text()
    rule = trust(roots=roots)
    key = (PUBLISHED / "key.pub.pem").read_text()
    return TrustRule(rule.models, rule.mode, (key,), rule.certificates)


BUNDLES = sorted(path.name for path in PUBLISHED.glob("*.sig"))
LATER = "2030-01-01T00:00:00.000000Z"


@pytest.mark.parametrize("name", BUNDLES)
def test_published_bundle_is_verified(name: str) -> None:
    content = (PUBLISHED / name).read_bytes()
    verified = check(content, published_rule(), published_contents(), LATER)
    assert verified.method == name.partition("-")[0]


@pytest.mark.parametrize("name", BUNDLES)
def test_published_bundle_with_another_byte_is_refused(name: str) -> None:
    document = json.loads((PUBLISHED / name).read_bytes())
    envelope = document["dsseEnvelope"]
    for holder, key in ((envelope, "payload"), (envelope["signatures"][0], "sig")):
        original = holder[key]
        content = bytearray(base64.b64decode(original))
        content[len(content) // 2] ^= 1
        holder[key] = base64.b64encode(content).decode()
        assert refusal(json.dumps(document).encode(), published_rule(), published_contents(), LATER)[0] in {
            "invalid",
            "untrusted",
        }
        holder[key] = original


@pytest.mark.parametrize("name", BUNDLES)
def test_published_bundle_with_another_file_is_a_mismatch(name: str) -> None:
    content = (PUBLISHED / name).read_bytes()
    (path, _), *others = published_contents()
    code, message = refusal(content, published_rule(), ((path, "0" * 64), *others), LATER)
    assert code == "mismatch"
    assert path in message
