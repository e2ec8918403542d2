"""Receivers of events: their tables in the configuration file, and the files of their secrets."""

import base64
import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from features.notify.table import Receiver, parse_secrets
from runtime.memory import MemoryLimit
from server.config import Config
from server.configsources import Mistake, read_settings

KEY, OTHER_KEY = bytes(range(24)), bytes(range(100, 164))
"""The shortest key, and the longest."""


def encode_secret(key: bytes) -> str:
    return f"whsec_{base64.b64encode(key).decode()}"


SECRET = encode_secret(KEY)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The configuration file; beside it are files of secrets."""
    write_private(tmp_path / "secret", f"{SECRET}\n")
    return tmp_path / "server.toml"


def write_private(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)


def read(file: Path, text: str) -> tuple[dict[str, Any], list[Mistake]]:
    file.write_text(text)
    return read_settings({"config": str(file)}, {})


def read_receivers(file: Path, text: str) -> tuple[Receiver, ...]:
    values, mistakes = read(file, text)
    assert mistakes == []
    return cast("tuple[Receiver, ...]", Config(repository=file, data=file, **values).tables["notify"])


TABLES = """
[[notify]]
url = "https://siem.example/in/a?b=c"
secret_file = "secret"
name = "siem"
from = "now"

[[notify]]
url = "http://127.0.0.1:8080"
secret_file = "two"
from = 1
"""


def test_tables_are_read_in_their_order_with_defaults(file: Path) -> None:
    write_private(file.with_name("two"), f"{encode_secret(OTHER_KEY)}\n{SECRET}")
    assert read_receivers(file, f"port = 1\n{TABLES}") == (
        Receiver(name="siem", url="https://siem.example/in/a?b=c", keys=(KEY,)),
        Receiver(name="127.0.0.1:8080", url="http://127.0.0.1:8080", keys=(OTHER_KEY, KEY), first=1),
    )


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://siem.example/in", "siem.example"),
        ("https://SIEM.example:443/in", "siem.example"),
        ("https://siem.example:8443", "siem.example:8443"),
        ("http://siem.example:443/a?b=c#d", "siem.example:443"),
        ("http://[::1]:8080/in", "[::1]:8080"),
        ("http://[2001:DB8::1]", "[2001:db8::1]"),
        ("http://10.0.0.1:81", "10.0.0.1:81"),
        ("https://münchen.example", "xn--mnchen-3ya.example"),
    ],
)
def test_name_is_by_default_host_and_port(file: Path, url: str, name: str) -> None:
    [receiver] = read_receivers(file, f'[[notify]]\nurl = "{url}"\nsecret_file = "secret"\n')
    assert (receiver.name, receiver.url, receiver.first) == (name, url, None)


def test_secret_file_is_found_from_the_configuration_file(file: Path) -> None:
    folder = file.with_name("secrets")
    folder.mkdir()
    write_private(folder / "a", SECRET)
    for name in ("secrets/a", str(folder / "a")):
        [receiver] = read_receivers(file, f'[[notify]]\nurl = "http://a"\nsecret_file = "{name}"\n')
        assert receiver.keys == (KEY,)


# Mistakes.

URL, PLAIN_URL = ".url: Must be like https://HOST/PATH.", ".url: Must have no user and no password"
FROM = '.from: Must be "now", or the position of the first event to send, from 1 on.'
NAME = ".name: Must be letters, digits, '.', '_' and '-', at most 63."
PATH = ".secret_file: Must be a path in quotes, and in full: ~ is not expanded."


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("url = ", ".url: Missing data"),
        ("url = 5", ".url: Not a valid string."),
        ('url = ""', URL),
        ('url = "siem.example/in"', URL),
        ('url = "siem.example:8080/in"', URL),
        ('url = "//siem.example/in"', URL),
        ('url = "https://"', URL),
        ('url = "https:///in"', URL),
        ('url = "ftp://siem.example/in"', URL),
        ('url = "file:///tmp/in"', URL),
        ('url = "http://[::1/in"', URL),
        ('url = "http://a:99999/in"', URL),
        ('url = "http://a:b/in"', URL),
        ('url = "https://anna@siem.example"', PLAIN_URL),
        ('url = "https://anna:geheim@siem.example"', PLAIN_URL),
        ('url = "https://:geheim@siem.example"', PLAIN_URL),
        ("secret_file = ", ".secret_file: Missing data"),
        ("secret_file = 5", PATH),
        ('secret_file = ""', PATH),
        ('secret_file = "~/secret"', PATH),
        ('secret_file = "none"', ".secret_file: The file cannot be read: No such file or directory"),
        ('secret_file = "."', ".secret_file: The file cannot be read: Is a directory"),
        ('secret_file = "secret/a"', ".secret_file: The file cannot be read: Not a directory"),
        (f'secret_file = "{SECRET}"', ".secret_file: The file cannot be read: No such"),
        ("from = 0", FROM),
        ("from = -1", FROM),
        ("from = true", FROM),
        ("from = 1.0", FROM),
        ('from = "then"', FROM),
        ('from = "1"', FROM),
        ("from = 2026-01-01", FROM),
        ('name = ""', NAME),
        ('name = "a/b"', NAME),
        ('name = "../a"', NAME),
        ('name = ".a"', NAME),
        ('name = "a\\n"', NAME),
        (f'name = "{"a" * 64}"', NAME),
        ("name = 5", ".name: Not a valid string."),
        ('secret = "a"', ".secret: there is no such key; did you mean secret_file?"),
        ('form = "now"', ".form: there is no such key; did you mean from?"),
        ('urls = "http://a"', ".urls: there is no such key; did you mean url?"),
        ("port = 1", ".port: there is no such key; settings stand above the tables"),
        ("first = 1", ".first: there is no such key"),
        ('name = "b"', ".name: There is another receiver b: give this one a name of its own."),
        ('url = "http://B:80/other"', ".name: There is another receiver b: give this one a name"),
    ],
)
def test_mistake_in_table_names_its_place(file: Path, line: str, expected: str) -> None:
    key, _, value = line.partition(" = ")
    lines = {"url": '"https://siem.example"', "secret_file": '"secret"', key: value}
    text = "\n".join(f"{name} = {given}" for name, given in lines.items() if given)
    values, [mistake] = read(
        file, f'[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n[[notify]]\n{text}\n'
    )
    assert f"{mistake.place}: {mistake.text}".startswith(f"{file}:1: notify[1]{expected}")
    assert "tables" not in values
    assert not any(secret in mistake.text for secret in ("geheim", SECRET[6:]))


LINES = "it must have one line like whsec_…, 24 to 64 bytes in base64"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n \n",
        SECRET.removeprefix("whsec_"),
        SECRET.replace("whsec_", "WHSEC_"),
        SECRET.replace("whsec_", "whpk_"),
        SECRET.replace("whsec_", "whsec"),
        f'"{SECRET}"',
        f"key={SECRET}",
        SECRET[:-1],
        SECRET.replace("A", "!", 1),
        SECRET.replace("A", "ä", 1),
        SECRET.replace("A", "_", 1),
        f"{SECRET}\x00",
        encode_secret(bytes(range(23))),
        encode_secret(bytes(range(65))),
        f"{SECRET}\n{encode_secret(bytes(range(23)))}\n",
        f"{SECRET}\n{encode_secret(OTHER_KEY)}\n{encode_secret(OTHER_KEY[::-1])}\n",
        f"{SECRET}\n#{encode_secret(OTHER_KEY)}\n",
    ],
    ids=range(18),
)
def test_content_of_secret_file_is_refused_without_it(file: Path, content: str) -> None:
    write_private(file.with_name("secret"), content)
    _, [mistake] = read(file, '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.place == f"{file}:1: notify[0].secret_file"
    assert mistake.text.startswith(f"'secret' is refused: {LINES}")
    refuse_parts(mistake.text, content)


def test_secret_file_that_is_no_text_is_refused(file: Path) -> None:
    write_private(file.with_name("secret"), b"\xff" + SECRET.encode())
    _, [mistake] = read(file, '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.text.startswith("'secret' is refused: ")
    refuse_parts(mistake.text, SECRET)


def refuse_parts(text: str, content: str) -> None:
    """Check that a text has no six characters in a row of a file of secrets, beside the prefix."""
    for line in content.replace("whsec_", "").split():
        assert not any(line[start : start + 6] in text for start in range(len(line) - 5))


@pytest.mark.parametrize(
    ("mode", "act"),
    [
        (0o644, "every user of this machine could read the key"),
        (0o604, "every user of this machine could read the key"),
        (0o602, "every user of this machine could change it"),
        (0o666, "every user of this machine could change it"),
    ],
)
def test_secret_file_that_others_can_open_is_refused(file: Path, mode: int, act: str) -> None:
    secret = file.with_name("secret")
    secret.chmod(mode)
    _, [mistake] = read(file, '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.text == f"{secret} has mode {mode:04o}: {act}; `chmod 0600 {secret}`"
    assert mistake.place == f"{file}:1: notify[0].secret_file"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_secret_file_of_another_user_is_refused(file: Path) -> None:
    secret = file.with_name("secret")
    os.chown(secret, 65_534, -1)
    _, [mistake] = read(file, '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.text.startswith(f"{secret} belongs to another user (65534), who could change it")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads each file")
def test_secret_file_without_permission_is_refused(file: Path) -> None:
    file.with_name("secret").chmod(0)
    _, [mistake] = read(file, '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.text == "The file cannot be read: Permission denied; name another file."


def test_all_mistakes_are_reported_together(file: Path) -> None:
    text = '[[notify]]\nurl = "a"\nfrom = 0\n[[record]]\nshare = 2\nmodels = ["a"]\n[[notify]]\nurl = "http://a"\n'
    _, mistakes = read(file, text)
    assert {mistake.place.rpartition(": ")[2] for mistake in mistakes} == {
        "notify[0].url",
        "notify[0].secret_file",
        "notify[0].from",
        "notify[1].secret_file",
        "record[0].share",
    }


def test_single_brackets_are_refused(file: Path) -> None:
    _, [mistake] = read(file, '[notify]\nurl = "http://b"\nsecret_file = "secret"\n')
    assert mistake.place == f"{file}:1: notify"
    assert "[[double brackets]]" in mistake.text


# Secrets.


@PLAIN
@given(st.lists(st.binary(min_size=24, max_size=64), min_size=1, max_size=2), st.sampled_from(["\n", "\r\n"]))
def test_keys_are_read_from_lines(keys: list[bytes], end: str) -> None:
    assert parse_secrets(end.join([*map(encode_secret, keys), ""])) == tuple(keys)


@PLAIN
@given(st.text(max_size=100) | st.text("whsec_AZaz09+/=\n", max_size=100))
def test_any_text_has_keys_or_is_refused_without_it(text: str) -> None:
    keys, problem = read_text(text)
    assert all(24 <= len(key) <= 64 for key in keys)
    parts = [part for line in text.split() for part in line.split("whsec_") if len(part) > 5]
    assert keys or problem.startswith(LINES)
    assert not any(part in problem for part in parts)


def read_text(text: str) -> tuple[tuple[bytes, ...], str]:
    """Return the keys of a text, or why it is refused."""
    try:
        return parse_secrets(text), ""
    except ValueError as error:
        return (), str(error)


def test_representation_has_no_secret_and_no_url(file: Path) -> None:
    text = '[[notify]]\nurl = "http://b/path-that-is-secret"\nsecret_file = "secret"\n'
    [receiver] = read_receivers(file, text)
    values, _ = read(file, text)
    for shown in (
        repr(receiver),
        str(receiver),
        f"{receiver}",
        repr(Config(repository=file, data=file, **values)),
    ):
        assert "Receiver('b')" in shown
        assert not any(part in shown for part in (SECRET[6:], repr(KEY)[2:-1], "path-that-is-secret"))


# The memory plan.


def test_receiver_takes_nothing_of_the_memory_plan(file: Path) -> None:
    limit = MemoryLimit(2**34, "machine")
    notify = '[[notify]]\nurl = "http://b"\nsecret_file = "secret"\n'
    record = '[[record]]\nmodels = ["a"]\n'
    plain, notifying, recording, both = (
        Config(repository=file, data=file, **read(file, text)[0]).plan_memory(limit)
        for text in ("", notify, record, notify + record)
    )
    assert plain == notifying
    assert recording == both != plain
