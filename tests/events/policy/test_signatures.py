"""Signatures of versions: which bundles are parsed, by whom, of which files, as of when."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
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
from msgspec.structs import replace
from support.signing import (
    NOW,
    START,
    Certified,
    encode_base64,
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
from features.signatures.bundles import MAX_BYTES, MAX_CERTIFICATES, Bundle, parse_bundle
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

# Bundles that are parsed, and that are refused.

FILES = make_contents("a/b.bin", "model.onnx")
CONTENT = sign_version(FILES, KEY)
PAYLOAD = json.dumps(make_statement(FILES)).encode()
Change = Callable[[Any], object]


def changed(change: Change) -> bytes:
    """Return a bundle of which `change` changes the document."""
    document = json.loads(CONTENT)
    change(document)
    return json.dumps(document).encode()


def stating(change: Change) -> bytes:
    """Return a signed bundle of which `change` changes the statement."""
    statement = make_statement(FILES)
    change(statement)
    return sign_payload(json.dumps(statement).encode(), KEY)


def with_material(**material: Any) -> bytes:
    return sign_payload(PAYLOAD, KEY, verificationMaterial=material)


def with_envelope(**members: Any) -> bytes:
    return changed(lambda document: document["dsseEnvelope"].update(members))


def with_serialization(**members: Any) -> bytes:
    return stating(lambda statement: statement["predicate"]["serialization"].update(members))


def with_resource(**members: Any) -> bytes:
    return stating(lambda statement: statement["predicate"]["resources"][0].update(members))


def add_members(document: Any) -> None:
    document["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.3"
    document["more"] = document["dsseEnvelope"]["more"] = 1


def test_parsed_bundle_lists_the_files() -> None:
    for content in (CONTENT, changed(add_members)):  # an older media type, and members that are not known
        bundle = parse_bundle(content)
        assert (bundle.resources, bundle.certificates) == (dict(FILES), ())
        assert bundle.key_hint is not None
    assert parse_bundle(CONTENT + b" " * (MAX_BYTES - len(CONTENT))).resources == dict(FILES)
    for key in ({}, {"hint": ""}, {"hint": None}):
        assert parse_bundle(with_material(publicKey=key)).key_hint is None
    for name in ("a b", "ä/€", ".hidden", "a\\b", "...", "a\nb"):
        assert parse_bundle(sign_version(((name, "0" * 64),), KEY)).resources == {name: "0" * 64}


SIGNATURES = json.loads(CONTENT)["dsseEnvelope"]["signatures"]
UNSUPPORTED = [
    changed(lambda d: d.update(mediaType="application/json")),
    with_material(publicKey={}, certificate={"rawBytes": ""}),  # keyless
    with_envelope(payloadType="text/plain"),
    stating(lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
    stating(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")),  # of 0.2
    with_serialization(method="shards"),
    with_serialization(hash_type="blake2b"),
    with_resource(algorithm="sha512"),
]
INVALID = [
    # Documents.
    changed(lambda d: d.pop("mediaType")),
    changed(lambda d: d.update(mediaType=[])),
    changed(lambda d: d.update(verificationMaterial=None)),
    with_material(),
    with_material(publicKey={}, x509CertificateChain={"certificates": [{"rawBytes": ""}]}),
    with_material(x509CertificateChain={"certificates": []}),
    with_material(x509CertificateChain={"certificates": [{"rawBytes": ""}] * (MAX_CERTIFICATES + 1)}),
    with_material(publicKey={"hint": 1}),
    changed(lambda d: d.update(messageSignature=d.pop("dsseEnvelope"))),
    *(with_envelope(payload=payload) for payload in ("%", "\udc80", encode_base64(b"1"))),
    *(with_envelope(signatures=signatures) for signatures in ([], SIGNATURES * 2, ["a"])),
    # Texts that are no strict JSON.
    *(b"", b"\xff", b"1", b"9" * 10_000, b'{"a": NaN}', b"[" * 100_000),
    CONTENT.replace(b'"keyid": ""', b'"keyid": ' + b"[" * 100_000 + b"]" * 100_000),
    b'{"mediaType":' + b"[" * 900 + b"]" * 900 + b"}",
    CONTENT + b" " * (MAX_BYTES - len(CONTENT) + 1),
    CONTENT.replace(b'{"mediaType"', b'{"mediaType": "x", "mediaType"'),
    CONTENT.replace(b'"keyid": ""', b'"keyid": "", "keyid": ""'),
    sign_payload(PAYLOAD.replace(b'"name": "model"', b'"name": "model", "name": "model"'), KEY),
    # Statements.
    stating(lambda s: s.pop("predicate")),
    stating(lambda s: s["predicate"].pop("resources")),
    stating(lambda s: s.update(subject=[])),
    stating(lambda s: s.update(subject=s["subject"] * 2)),
    stating(lambda s: s["subject"][0]["digest"].update(sha256="0" * 64)),
    stating(lambda s: s["subject"][0].update(digest={"sha512": "0" * 64})),
    stating(lambda s: s["predicate"]["resources"].reverse()),
    stating(lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0])),
    *(
        with_resource(digest=digest)
        for digest in (FILES[0][1].upper().replace("0", "A"), FILES[0][1] + "\n", 1)
    ),
    *(sign_version(((name, "0" * 64),), KEY) for name in ("", ".", "..", "/a", "a/", "a//b", "./a", "a/./b")),
    *(sign_version(((name, "0" * 64),), KEY) for name in ("a/../b", "a\0b")),
]
MALFORMED = [*((each, "unsupported") for each in UNSUPPORTED), *((each, "invalid") for each in INVALID)]


@pytest.mark.parametrize(("content", "code"), MALFORMED, ids=range(len(MALFORMED)))
def test_bundle_of_another_form_is_refused(content: bytes, code: str) -> None:
    with pytest.raises(SignatureRefused, match="; sign the version again") as refused:
        parse_bundle(content)
    assert refused.value.code == f"signature_{code}"


def parse_or_refuse(content: bytes) -> Bundle | None:
    try:
        return parse_bundle(content)
    except SignatureRefused:
        return None


@given(st.binary())
def test_arbitrary_bytes_are_refused_and_nothing_else(content: bytes) -> None:
    assert parse_or_refuse(content) is None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=5,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(each for key, below in members for each in paths_in(below, (*path, key)))]


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document[path[0]] = replaced(document[path[0]], path[1:], value)
    return document


@given(st.sampled_from(paths_in(json.loads(CONTENT))), ANY_JSON)
def test_document_with_any_member_is_parsed_or_refused(path: tuple[Any, ...], value: Any) -> None:
    bundle = parse_or_refuse(json.dumps(replaced(json.loads(CONTENT), path, value)).encode())
    assert bundle is None or bundle.resources == dict(FILES)


@given(st.sampled_from(paths_in(make_statement(FILES))), ANY_JSON)
def test_statement_with_any_member_is_parsed_or_refused(path: tuple[Any, ...], value: Any) -> None:
    statement = replaced(make_statement(FILES), path, value)
    bundle = parse_or_refuse(sign_payload(json.dumps(statement).encode(), KEY))
    assert bundle is None or [*bundle.resources.values()] == [sha256 for _, sha256 in FILES]


# Who signed: keys and certificates that the rule has.


def trust(
    *keys: Any, roots: str = "", subject: str = "CN=release,O=Bank", distrusted: Sequence[Any] = ()
) -> TrustRule:
    """Return a rule of these private keys' public ones, and of certificates below `roots`."""
    certificates = (TrustedCertificates(roots, subject),) if roots else ()
    digests = tuple(key_digest(public_pem(key)) for key in distrusted)
    return TrustRule(("*",), TrustMode.ENFORCE, tuple(map(public_pem, keys)), certificates, digests)


def check(content: bytes, rule: TrustRule, contents: Contents = CONTENTS, at: str = NOW) -> VerifiedSignature:
    return check_signature(content, SIG, contents, rule, at)


def refusal(content: bytes, rule: TrustRule, contents: Contents = CONTENTS, at: str = NOW) -> tuple[str, str]:
    """Return code and message with which a signature is refused."""
    with pytest.raises(SignatureRefused) as refused:
        check(content, rule, contents, at)
    return refused.value.code.removeprefix("signature_"), str(refused.value)


ROOT, OTHER_ROOT = make_authority(), make_authority()
SIGNER = ROOT.issue()
BELOW = ROOT.issue_authority()
CODE, SERVER = ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.SERVER_AUTH
ANY = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
AUTHORITY: tuple[x509.ExtensionType, bool] = (x509.BasicConstraints(ca=True, path_length=None), True)
MAY_SIGN = (key_usage(digital_signature=True), True)
BY_ROOT = trust(roots=ROOT.pem)
OTHER_KEY, STRONG_KEY = make_key("P-384"), make_key("P-521")


def signed_by(signer: Certified, *more: x509.Certificate) -> bytes:
    return sign_version(CONTENTS, signer.key, (*signer.chain, *more))


def without_hint(key: ec.EllipticCurvePrivateKey) -> bytes:
    payload = json.dumps(make_statement(CONTENTS[:2] + CONTENTS[3:])).encode()
    return sign_payload(payload, key, verificationMaterial={"publicKey": {}})


def with_hint_of(hinted: Any, key: ec.EllipticCurvePrivateKey) -> bytes:
    document = json.loads(sign_version(CONTENTS, key))
    document["verificationMaterial"]["publicKey"]["hint"] = key_digest(public_pem(hinted))
    return json.dumps(document).encode()


SIGNED_WITH_ITSELF = sign_payload(json.dumps(make_statement(CONTENTS)).encode(), KEY)
VERIFIED: dict[str, tuple[bytes, TrustRule, Any]] = {
    # a bundle, the rule, and which key signed it, or None: the certificate
    **{
        f"key of {key.curve.name}": (sign_version(CONTENTS, key), trust(KEY, key), key)
        for key in (KEY, OTHER_KEY, STRONG_KEY)
    },
    "no hint": (without_hint(OTHER_KEY), trust(KEY, OTHER_KEY), OTHER_KEY),
    "its own path": (SIGNED_WITH_ITSELF, trust(KEY), KEY),
    **{curve: (signed_by(BELOW.issue(curve=curve)), BY_ROOT, None) for curve in ("P-256", "P-384", "P-521")},
    **{
        subject: (signed_by(SIGNER), trust(roots=ROOT.pem, subject=subject), None)
        for subject in ("CN=release, O=Bank", "2.5.4.3=release,O=Bank", r"CN=\72elease,O=Bank")
    },
    "issuer": (signed_by(ROOT.issue_authority(usage=[SERVER, CODE]).issue()), BY_ROOT, None),
    "issuer of any": (signed_by(ROOT.issue_authority(usage=[SERVER, ANY]).issue()), BY_ROOT, None),
    "extension": (signed_by(ROOT.issue(extensions=[(UNKNOWN, False), MAY_SIGN])), BY_ROOT, None),
    "root": (signed_by(OTHER_ROOT.issue(), OTHER_ROOT.certificate), trust(roots=OTHER_ROOT.pem), None),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_signature_that_the_rule_has_is_verified(case: str) -> None:
    content, rule, key = VERIFIED[case]
    found = VerifiedSignature("certificate", "CN=release,O=Bank")
    if key is not None:
        found = VerifiedSignature("key", hashlib.sha256(public_pem(key).encode()).hexdigest())
    assert check(content, rule) == found


OF_OTHERS = (TrustedCertificates(ROOT.pem, "CN=a"), TrustedCertificates(OTHER_ROOT.pem, "CN=release,O=Bank"))
EXPIRED, EXPIRED_ROOT = ROOT.issue(days=1), make_authority(days=10)
SUBJECTS = (
    "CN=release",
    "O=Bank,CN=release",
    "CN=Release,O=Bank",
    "CN=release+O=Bank",
    "CN=release,O=Bank,C=CH",
)
CHAIN = {"signer": STRONG_KEY, "intermediate": BELOW.key, "root": ROOT.key}
OTHER_KINDS = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())
REFUSED: dict[str, tuple[bytes, TrustRule, str]] = {
    # a bundle, the rule, code and words of the refusal
    "key": (sign_version(CONTENTS, OTHER_KEY), trust(KEY), "untrusted: .*which the rule does not have"),
    "key without hint": (without_hint(OTHER_KEY), trust(KEY), "untrusted"),
    "no keys": (without_hint(KEY), trust(), "untrusted"),
    "no key": (sign_version(CONTENTS, KEY), BY_ROOT, "untrusted"),
    "hint of another key": (with_hint_of(KEY, make_key()), trust(KEY), "invalid"),
    "distrusted": (sign_version(CONTENTS, KEY), trust(KEY, distrusted=[KEY]), "untrusted: .*is distrusted"),
    "no hint": (without_hint(KEY), trust(KEY, distrusted=[KEY]), "untrusted: .*is distrusted"),
    "another's": (sign_version(CONTENTS, KEY, SIGNER.chain), trust(KEY, roots=ROOT.pem), "invalid"),
    "no certificates": (signed_by(SIGNER), trust(SIGNER.key), "untrusted"),
    "roots of a name": (signed_by(SIGNER), replace(BY_ROOT, certificates=OF_OTHERS), "untrusted"),
    "expired root": (signed_by(EXPIRED_ROOT.issue()), trust(roots=EXPIRED_ROOT.pem), "untrusted"),
    "expired": (
        signed_by(EXPIRED),
        trust(roots=ROOT.pem, distrusted=[EXPIRED.key]),
        "untrusted: .*is distrus",
    ),
    **{
        subject: (
            *(signed_by(SIGNER), trust(roots=ROOT.pem, subject=subject)),
            "untrusted: .*'CN=release,O=Bank' signed, which the rule does not have",
        )
        for subject in SUBJECTS
    },
    **{
        name: (
            *(signed_by(BELOW.issue(key=STRONG_KEY)), trust(roots=ROOT.pem, distrusted=[key])),
            "untrusted: .*is distrusted",
        )
        for name, key in CHAIN.items()
    },
    **{
        f"key {number}": (sign_version(CONTENTS, KEY, ROOT.issue(key=key).chain), BY_ROOT, "unsupported")
        for number, key in enumerate(OTHER_KINDS)
    },
}
OTHER_NAMES = x509.NameConstraints([x509.DirectoryName(parse_subject("O=Other"))], None)
UNTRUSTED: list[tuple[Certified, str]] = [
    # certificates below the root, or another one
    (OTHER_ROOT.issue(), "validation failed"),
    (ROOT.issue(start=START + timedelta(days=200), days=9), "not valid at validation time"),
    (ROOT.issue(days=100), "not valid at validation time"),
    (ROOT.issue(usage=()), "missing required extension"),
    (ROOT.issue(usage=[SERVER, ANY]), "it is not for code signing"),
    (ROOT.issue(extensions=[(key_usage(key_cert_sign=True), True)]), "it may not sign"),
    (ROOT.issue(extensions=[AUTHORITY]), "it is of an authority"),
    (ROOT.issue().issue(), "validation failed"),
    (ROOT.issue("CN=A", extensions=[AUTHORITY, MAY_SIGN]).issue(), "an issuer may not issue"),
    (ROOT.issue_authority(usage=[SERVER]).issue(), "an issuer is not for code signing"),
    (ROOT.issue(extensions=[(UNKNOWN, True)]), "critical extension"),
    (ROOT.issue_authority(path_length=0).issue_authority("CN=Below").issue(), "path length"),
    (ROOT.issue("CN=A", usage=(), extensions=[AUTHORITY, (OTHER_NAMES, True)]).issue(), "prohibited ext"),
]
REFUSED |= {
    "root beside": (signed_by(OTHER_ROOT.issue(), OTHER_ROOT.certificate), BY_ROOT, "untrusted"),
    "no intermediate": (sign_version(CONTENTS, KEY, BELOW.issue(key=KEY).chain[:1]), BY_ROOT, "untrusted"),
    **{
        f"certificate {number}: {words}": (signed_by(signer), BY_ROOT, f"untrusted: .*{words}")
        for number, (signer, words) in enumerate(UNTRUSTED)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_signature_that_the_rule_does_not_have_is_refused(case: str) -> None:
    content, rule, expected = REFUSED[case]
    assert re.match(expected, ": ".join(refusal(content, rule)), re.DOTALL)


def test_certificate_is_valid_until_its_end() -> None:
    content, rule = signed_by(EXPIRED), trust(roots=ROOT.pem)
    assert check(content, rule, at="2026-01-02T00:00:00.999999Z").method == "certificate"
    for at in ("2026-01-02T00:00:01.000000Z", "2025-12-31T23:59:59.999999Z"):
        assert refusal(content, rule, at=at)[0] == "untrusted"


# Files.


BUNDLE_PATHS = [
    ("model.onnx", "missing"),
    ("model.onnx weights/model.sig model.sig.txt", "missing"),
    ("a.sig b.sig", "invalid"),
]


@pytest.mark.parametrize(("paths", "code"), BUNDLE_PATHS)
def test_bundle_is_the_only_one_beside_the_model(paths: str, code: str) -> None:
    with pytest.raises(SignatureRefused) as refused:
        find_bundle(make_contents(*paths.split()))
    assert refused.value.code == f"signature_{code}"
    assert find_bundle(make_contents("model.onnx", "claims.sig", "weights/model.sig")) == "claims.sig"


SIGNED = [path for path, _ in CONTENTS if path != SIG]


def without(path: str, *others: tuple[str, str]) -> Contents:
    return tuple(sorted([*(each for each in CONTENTS if each[0] != path), *others]))


MISMATCHES = [
    *((without(path, (path, "0" * 64)), f"{path}' was changed") for path in SIGNED),
    *((without(path), f"{path}' is missing") for path in SIGNED),
    *((without("", (f"{path}.new", "0" * 64)), f"{path}.new' is not signed") for path in SIGNED),
    (without("weights/part-1.bin", ("weights/part-2.bin", dict(CONTENTS)["weights/part-1.bin"])), "part-"),
    (without("", ("weights/other.sig", "0" * 64)), "'weights/other.sig' is not signed"),
    (without("", ("ignored", "0" * 64)), "'ignored' is not signed"),
]


@pytest.mark.parametrize(("contents", "words"), MISMATCHES)
def test_other_files_are_a_mismatch_that_names_one(contents: Contents, words: str) -> None:
    content = sign_version(CONTENTS, KEY, ignore_paths=["ignored", "."], allow_symlinks=True)
    code, message = refusal(content, trust(KEY), contents)
    assert code == "mismatch"
    assert words in message
    assert check(content, trust(KEY), without(SIG)).signer


def test_signed_bundle_path_must_have_its_hash() -> None:
    other = tuple((path, "0" * 64 if path == SIG else sha256) for path, sha256 in CONTENTS)
    assert refusal(SIGNED_WITH_ITSELF, trust(KEY), other)[0] == "mismatch"


# Changed bundles.

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


def with_certificate(der: bytes) -> bytes:
    document = json.loads(sign_version(SMALL, SIGNER.key, SIGNER.chain))
    chain = document["verificationMaterial"]["x509CertificateChain"]["certificates"]
    chain[0]["rawBytes"] = base64.b64encode(der).decode()
    return json.dumps(document).encode()


DER = SIGNER.certificate.public_bytes(Encoding.DER)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.integers(0, len(DER) - 1), st.integers(1, 255))
def test_changed_certificate_signs_nothing(index: int, bits: int) -> None:
    der = bytearray(DER)
    der[index % len(der)] ^= bits
    try:
        check(with_certificate(bytes(der)), trust(roots=ROOT.pem), SMALL)
    except SignatureRefused:
        return
    signed = x509.load_der_x509_certificate(bytes(der)).tbs_certificate_bytes
    assert signed == SIGNER.certificate.tbs_certificate_bytes  # the issuer's signature is written otherwise


def test_subject_with_a_value_of_another_type_is_refused() -> None:
    at = DER.index(b"\x0c\x07release")  # an ASN.1 UTF8String
    for tag in set(range(256)) - {DER[at]}:
        changed = with_certificate(DER[:at] + bytes([tag]) + DER[at + 1 :])
        assert refusal(changed, trust(roots=ROOT.pem), SMALL)[0] in {"invalid", "untrusted"}


# Files of keys and certificates.


def private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


NO_KEY, OF_CURVES = "no public key as PEM", "of P-256, P-384 or P-521"
UNREADABLE: list[tuple[Callable[[str], object], str, str]] = [
    (normalise_key, "", NO_KEY),
    (normalise_key, public_pem(KEY).replace("M", "N"), NO_KEY),
    (normalise_key, private_pem(KEY), NO_KEY),
    (normalise_key, ROOT.pem, NO_KEY),
    (normalise_key, public_pem(KEY) + private_pem(KEY), "must be one public key"),
    (normalise_key, public_pem(KEY) * 2, "must be one public key"),
    (normalise_key, public_pem(rsa.generate_private_key(65537, 2048)), OF_CURVES),
    (normalise_key, public_pem(ed25519.Ed25519PrivateKey.generate()), OF_CURVES),
    (normalise_key, public_pem(ec.generate_private_key(ec.SECP256K1())), OF_CURVES),
    (normalise_roots, "", "no certificate"),
    (normalise_roots, public_pem(KEY), "no certificate"),
    (normalise_roots, ROOT.pem.replace("MII", "MIJ"), "cannot be read"),
    *(
        (parse_subject, text, "no name as RFC 4514 writes it")
        for text in ("", "release", "CN", "CN=", "XY=a")
    ),
]


@pytest.mark.parametrize(("read", "text", "reason"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_text_that_is_no_key_certificate_or_name_is_refused(
    read: Callable[[str], object], text: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        read(text)


def test_comments_and_line_ends_change_no_key_or_roots() -> None:
    pem = "a comment\r\n" + public_pem(KEY).replace("\n", "\r\n") + "\r\n"
    assert normalise_key(pem) == public_pem(KEY)
    assert key_digest(pem) == key_digest(public_pem(KEY))
    assert normalise_roots(f"Subject: root\n{ROOT.pem}\n\n{OTHER_ROOT.pem}") == ROOT.pem + OTHER_ROOT.pem


# Bundles of the published tool.


def published_contents() -> Contents:
    folder = PUBLISHED / "model"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return tuple(
        sorted(
            (path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        )
    )


@pytest.mark.parametrize("name", sorted(path.name for path in PUBLISHED.glob("*.sig")))
def test_published_bundle_is_verified_and_refused_once_changed(name: str) -> None:
    content, contents = (PUBLISHED / name).read_bytes(), published_contents()
    certificates = trust(roots=(PUBLISHED / "ca.pem").read_text()).certificates
    rule = TrustRule(("*",), TrustMode.ENFORCE, ((PUBLISHED / "key.pub.pem").read_text(),), certificates)
    later = "2030-01-01T00:00:00.000000Z"
    assert check(content, rule, contents, later).method == name.partition("-")[0]
    envelope = json.loads(content)["dsseEnvelope"]
    for original in (envelope["payload"], envelope["signatures"][0]["sig"]):
        other = bytearray(base64.b64decode(original))
        other[len(other) // 2] ^= 1
        changed = content.replace(original.encode(), base64.b64encode(other))
        assert changed != content
        assert refusal(changed, rule, contents, later)[0] in {"invalid", "untrusted"}
    (path, _), *others = contents
    code, message = refusal(content, rule, ((path, "0" * 64), *others), later)
    assert code == "mismatch"
    assert path in message
