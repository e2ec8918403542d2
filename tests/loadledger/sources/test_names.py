import pytest

from loadledger.errors import SourceProblem
from loadledger.sources.names import SourceName, parse_digest, parse_source


@pytest.mark.parametrize(
    ("name", "scheme", "host", "path"),
    [
        ("https://Models.example.com:8443/a/model.onnx", "https", "models.example.com:8443", "a/model.onnx"),
        ("https://[::1]:8443/model.onnx", "https", "[::1]:8443", "model.onnx"),
        ("hf://Org/repo@v1.0/onnx/model.onnx", "hf", "Org", "repo@v1.0/onnx/model.onnx"),
        ("oci://ghcr.io/org/model@sha256:ab", "oci", "ghcr.io", "org/model@sha256:ab"),
        ("s3://Bucket/a%20b/", "s3", "Bucket", "a%20b/"),
    ],
)
def test_name_is_parsed(name: str, scheme: str, host: str, path: str) -> None:
    assert parse_source(name) == SourceName(name, scheme, host, path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.onnx", "begin it with https://"),
        ("http://host/model.onnx", "begin it with https://"),
        ("file:///etc/passwd", "begin it with"),
        ("https://user:hunter2@host/m", "no user, no password"),
        ("s3://bucket/key?X-Amz-Signature=hunter2", "no query"),
        ("https://host/m#sha256=ab", "no fragment"),
        ("https:///m", "a host and a path"),
        ("https://host/", "a host and a path"),
        ("hf://org", "a host and a path"),
        ("https://[::1/m", "without an IPv6 address"),
        ("s3://bucket/a/../b", "leads upwards"),
        ("s3://bucket/%2e%2e/b", "leads upwards"),
        ("s3://bucket/a%5Cb", "leads upwards"),
        ("https://host/a b", "no space"),
        ("https://host/\x1b[2J", "ASCII"),
        ("https://höst/m", "ASCII"),
        ("https://host/" + "a" * 2048, "2048"),
    ],
)
def test_other_texts_are_refused(name: str, said: str) -> None:
    with pytest.raises(SourceProblem, match=r"\(invalid_source\)$") as refused:
        parse_source(name)
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_digest_is_sha256_in_lower_case() -> None:
    assert parse_digest(f"sha256:{'0a' * 32}") == "0a" * 32
    assert parse_digest(None) is None
    for text in ("", "0a" * 32, f"sha256:{'0A' * 32}", "sha256:12", f"sha512:{'0a' * 32}"):
        with pytest.raises(SourceProblem, match="it takes sha256: and 64"):
            parse_digest(text)
