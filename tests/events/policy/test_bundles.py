"""Bundles: which are parsed, which are refused, and that nothing else happens."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.signing import encode_base64, make_contents, make_key, make_statement, sign_payload, sign_version

from features.signatures.bundles import MAX_BYTES, MAX_CERTIFICATES, Bundle, SignatureRefused, parse_bundle

CONTENTS = make_contents("a/b.bin", "model.onnx")
KEY = make_key()
CONTENT = sign_version(CONTENTS, KEY)


def refusal(content: bytes) -> str:
    """Return the code with which a bundle is refused."""
    with pytest.raises(SignatureRefused) as refused:
        parse_bundle(content)
    assert "; sign the version again" in str(refused.value)
    return refused.value.code


def changed(change: Callable[[Any], object]) -> bytes:
    """Return a bundle of which `change` changes the document."""
    document = json.loads(CONTENT)
    change(document)
    return json.dumps(document).encode()


def stating(change: Callable[[Any], object]) -> bytes:
    """Return a signed bundle of which `change` changes the statement."""
    statement = make_statement(CONTENTS)
    change(statement)
    return sign_payload(json.dumps(statement).encode(), KEY)


def test_parsed_bundle_lists_the_files() -> None:
    bundle = parse_bundle(CONTENT)
    assert bundle.resources == dict(CONTENTS)
    assert bundle.key_hint is not None
    assert bundle.certificates == ()


@pytest.mark.parametrize(
    "material", [{"publicKey": {}}, {"publicKey": {"hint": ""}}, {"publicKey": {"hint": None}}]
)
def test_public_key_without_hint_is_accepted(material: Any) -> None:
    assert parse_bundle(sign_payload(payload(), KEY, verificationMaterial=material)).key_hint is None


def payload() -> bytes:
    return json.dumps(make_statement(CONTENTS)).encode()


def test_older_media_type_and_unknown_members_are_accepted() -> None:
    def change(document: Any) -> None:
        document["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.3"
        document["more"] = document["dsseEnvelope"]["more"] = 1

    assert parse_bundle(changed(change)).resources == dict(CONTENTS)


# Documents


DOCUMENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no media type": (lambda d: d.pop("mediaType"), "invalid"),
    "another media type": (lambda d: d.update(mediaType="application/json"), "unsupported"),
    "media type is a list": (lambda d: d.update(mediaType=[]), "invalid"),
    "no material": (lambda d: d.update(verificationMaterial=None), "invalid"),
    "neither key nor certificates": (lambda d: d.update(verificationMaterial={}), "invalid"),
    "keyless": (lambda d: d["verificationMaterial"].update(certificate={"rawBytes": ""}), "unsupported"),
    "key and certificates": (
        lambda d: d["verificationMaterial"].update(x509CertificateChain={"certificates": []}),
        "invalid",
    ),
    "no certificates": (
        lambda d: d.update(verificationMaterial={"x509CertificateChain": {"certificates": []}}),
        "invalid",
    ),
    "too many certificates": (
        lambda d: d.update(
            verificationMaterial={
                "x509CertificateChain": {"certificates": [{"rawBytes": ""}] * (MAX_CERTIFICATES + 1)}
            }
        ),
        "invalid",
    ),
    "hint is a number": (lambda d: d["verificationMaterial"].update(publicKey={"hint": 1}), "invalid"),
    "signature of a message": (lambda d: d.update(messageSignature=d.pop("dsseEnvelope")), "invalid"),
    "another payload type": (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "unsupported"),
    "payload is no base64": (lambda d: d["dsseEnvelope"].update(payload="%"), "invalid"),
    "payload is not ASCII": (lambda d: d["dsseEnvelope"].update(payload="\udc80"), "invalid"),
    "payload is no object": (lambda d: d["dsseEnvelope"].update(payload=encode_base64(b"1")), "invalid"),
    "no signature": (lambda d: d["dsseEnvelope"].update(signatures=[]), "invalid"),
    "two signatures": (
        lambda d: d["dsseEnvelope"].update(signatures=d["dsseEnvelope"]["signatures"] * 2),
        "invalid",
    ),
    "signature is no object": (lambda d: d["dsseEnvelope"].update(signatures=["a"]), "invalid"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_document_of_another_form_is_refused(case: str) -> None:
    change, code = DOCUMENTS[case]
    assert refusal(changed(change)) == f"signature_{code}"


TEXTS = {
    "empty": b"",
    "not UTF-8": b"\xff",
    "a number": b"1",
    "too many digits": b"9" * 10_000,
    "not a number": b'{"a": NaN}',
    "nested too deeply": b"[" * 100_000,
    "nested in a member": CONTENT.replace(b'"keyid": ""', b'"keyid": ' + b"[" * 100_000 + b"]" * 100_000),
    "nested in the media type": b'{"mediaType":' + b"[" * 900 + b"]" * 900 + b"}",
    "too large": CONTENT + b" " * MAX_BYTES,
    "key twice": CONTENT.replace(b'{"mediaType"', b'{"mediaType": "x", "mediaType"'),
    "key twice below": CONTENT.replace(b'"keyid": ""', b'"keyid": "", "keyid": ""'),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_strict_json_is_invalid(case: str) -> None:
    assert refusal(TEXTS[case]) == "signature_invalid"


# Statements


STATEMENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "another statement": (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "unsupported"),
    "predicate of 0.2": (
        lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
        "unsupported",
    ),
    "no predicate": (lambda s: s.pop("predicate"), "invalid"),
    "no resources": (lambda s: s["predicate"].pop("resources"), "invalid"),
    "shards": (lambda s: s["predicate"]["serialization"].update(method="shards"), "unsupported"),
    "another hash": (lambda s: s["predicate"]["serialization"].update(hash_type="blake2b"), "unsupported"),
    "another algorithm": (lambda s: s["predicate"]["resources"][0].update(algorithm="sha512"), "unsupported"),
    "no subject": (lambda s: s.update(subject=[]), "invalid"),
    "two subjects": (lambda s: s.update(subject=s["subject"] * 2), "invalid"),
    "subject of other files": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "invalid"),
    "subject with another hash": (lambda s: s["subject"][0].update(digest={"sha512": "0" * 64}), "invalid"),
    "another order": (lambda s: s["predicate"]["resources"].reverse(), "invalid"),
    "a file twice": (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "invalid"),
    "digest in upper case": (
        lambda s: s["predicate"]["resources"][0].update(digest=CONTENTS[0][1].upper().replace("0", "A")),
        "invalid",
    ),
    "digest with line end": (
        lambda s: s["predicate"]["resources"][0].update(digest=CONTENTS[0][1] + "\n"),
        "invalid",
    ),
    "digest is a number": (lambda s: s["predicate"]["resources"][0].update(digest=1), "invalid"),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_statement_of_another_form_is_refused(case: str) -> None:
    change, code = STATEMENTS[case]
    assert refusal(stating(change)) == f"signature_{code}"


def test_duplicate_key_of_statement_is_refused() -> None:
    twice = payload().replace(b'"name": "model"', b'"name": "model", "name": "model"')
    assert refusal(sign_payload(twice, KEY)) == "signature_invalid"


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/", "a//b", "./a", "a/./b", "a/../b", "a\0b"])
def test_name_that_is_not_canonical_is_refused(name: str) -> None:
    contents = ((name, "0" * 64),)
    assert refusal(sign_payload(json.dumps(make_statement(contents)).encode(), KEY)) == "signature_invalid"


@pytest.mark.parametrize("name", ["a b", "ä/€", ".hidden", "a\\b", "...", "a\nb"])
def test_other_canonical_name_is_accepted(name: str) -> None:
    assert parse_bundle(sign_version(((name, "0" * 64),), KEY)).resources == {name: "0" * 64}


# Anything else


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
    assert bundle is None or bundle.resources == dict(CONTENTS)


@given(st.sampled_from(paths_in(make_statement(CONTENTS))), ANY_JSON)
def test_statement_with_any_member_is_parsed_or_refused(path: tuple[Any, ...], value: Any) -> None:
    statement = replaced(make_statement(CONTENTS), path, value)
    bundle = parse_or_refuse(sign_payload(json.dumps(statement).encode(), KEY))
    assert bundle is None or [*bundle.resources.values()] == [sha256 for _, sha256 in CONTENTS]
