"""Names of sources, and the operator's list of those that are allowed."""

from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.fetch.sources import (
    MAX_CHARACTERS,
    SCHEMES,
    AllowedHosts,
    InvalidSource,
    SourceName,
    SourceNotAllowed,
    parse_allowed,
    parse_source,
    split_host,
)

TEXTS = st.one_of(
    st.builds(
        "{}{}{}".format,
        st.sampled_from([f"{each}://" for each in (*SCHEMES, "http", "file", "HTTPS", "")]),
        st.sampled_from(
            ["host", "u:p@host", "host:1", "[::1]", "[", "[z]", "*.host", "", "a@b@c", "host\\x", "h%40st"]
        ),
        st.text("/.%2eE5cCfF?#@:\\a\t\n \x00é*", max_size=20),
    ),
    st.text(max_size=40),
)


@given(TEXTS)
def test_parsed_source_has_no_credentials_query_or_upward_path(text: str) -> None:
    try:
        source = parse_source(text)
    except InvalidSource:
        return
    assert source.scheme in SCHEMES
    assert source.host
    assert source.path
    assert not {"@", "?", "#", "*", "\\"} & set(source.host)
    assert not {"?", "#"} & set(source.name)
    assert ".." not in unquote(source.path).split("/")
    assert "\\" not in unquote(source.path)
    parts = urlsplit(source.name)
    assert (parts.username, parts.password, parts.query, parts.fragment) == (None, None, "", "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://Example.com:8443/a/model.onnx", ("https", "example.com:8443", "a/model.onnx")),
        ("https://[::1]:8443/m.onnx", ("https", "[::1]:8443", "m.onnx")),
        ("hf://Org/repo@refs%2Fpr%2F1/onnx/m.onnx", ("hf", "Org", "repo@refs%2Fpr%2F1/onnx/m.onnx")),
        ("oci://ghcr.io/a/b@sha256:12", ("oci", "ghcr.io", "a/b@sha256:12")),
        ("s3://Bucket/folder/", ("s3", "Bucket", "folder/")),
    ],
)
def test_source_is_divided_into_scheme_host_and_path(name: str, expected: tuple[str, str, str]) -> None:
    assert parse_source(name) == SourceName(name, *expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("http://host/m.onnx", "begin it with https://"),
        ("host/m.onnx", "begin it with"),
        ("https://host/m.onnx?token=1", "no query"),
        ("https://user:word@host/m.onnx", "no user name"),
        ("https://host/a/../m.onnx", "leads upwards"),
        ("https://host/a/%2e%2E/m.onnx", "leads upwards"),
        ("https://host/a%5cm.onnx", "leads upwards"),
        ("https://host", "a host and a path"),
        ("https:///m.onnx", "a host and a path"),
        ("https://*.host/m.onnx", "a host and a path"),
        ("https://[/m.onnx", "IPv6"),
        ("https://[host]/m.onnx", "IPv6"),
        ("https://host/m onnx", "no space"),
        ("https://host/é", "ASCII"),
        ("https://host/" + "m" * MAX_CHARACTERS, "up to 2048"),
    ],
)
def test_invalid_source_is_refused_with_reason(name: str, reason: str) -> None:
    with pytest.raises(InvalidSource, match=reason):
        parse_source(name)


@pytest.mark.parametrize(
    ("allowed", "source", "expected"),
    [
        ("none", "hf://org/repo", False),
        ("all", "s3://bucket/m.onnx", True),
        ("hf", "hf://org/repo", True),
        ("hf", "oci://ghcr.io/a:1", False),
        ("hf://org/", "hf://org/repo", True),
        ("hf://org", "hf://other/repo", False),
        ("https, oci://ghcr.io", "oci://ghcr.io/a:1", True),
        ("oci://ghcr.io", "oci://ghcr.io:8443/a:1", False),
        ("oci://ghcr.io", "oci://evil-ghcr.io/a:1", False),
        ("https://*.example.com", "https://a.b.example.com/m.onnx", True),
        ("https://*.example.com", "https://example.com/m.onnx", False),
        ("https://*.example.com", "https://evilexample.com/m.onnx", False),
        ("https://example.com:8443", "https://example.com/m.onnx", False),
        ("s3://models", "s3://models/m.onnx", True),
        ("cloud-metadata", "s3://models/m.onnx", False),
    ],
)
def test_list_allows_what_it_names(allowed: str, source: str, expected: bool) -> None:  # noqa: FBT001
    checked = parse_allowed(allowed)
    if expected:
        checked.check(parse_source(source))
    else:
        with pytest.raises(SourceNotAllowed, match="--sources"):
            checked.check(parse_source(source))


@pytest.mark.parametrize(
    "entry", ["ftp", "https://", "https://a/b", "hf://*", "http://host", "al", "hf://u@h"]
)
def test_meaningless_entry_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="allows nothing"):
        parse_allowed(f"hf {entry}")


@pytest.mark.parametrize(
    ("allowed", "source", "expected"),
    [
        ("https", "https://h/m", AllowedHosts(any_public=True, public=frozenset({"h", "p"}))),
        ("https://h", "https://h/m", AllowedHosts(public=frozenset({"p"}), named=frozenset({"h"}))),
        ("hf", "hf://h/m", AllowedHosts(any_public=True, public=frozenset({"p"}))),
        ("hf://h https://x", "hf://h/m", AllowedHosts(public=frozenset({"p"}), named=frozenset({"x"}))),
    ],
)
def test_hosts_of_a_source_follow_from_the_list(allowed: str, source: str, expected: AllowedHosts) -> None:
    assert parse_allowed(allowed).list_hosts(parse_source(source), public=["p"]) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("h", ("h", 443)),
        ("h:1", ("h", 1)),
        ("[::1]", ("::1", 443)),
        ("[::1]:2", ("::1", 2)),
        ("::1", ("::1", 443)),
    ],
)
def test_host_is_divided_from_port(host: str, expected: tuple[str, int]) -> None:
    assert split_host(host) == expected
