"""The policy in the configuration file: its tables, the files that they name, and mistakes."""

from pathlib import Path

import pytest
from support.signing import make_authority, make_key, public_pem

from features.approvals.rules import AddedMode, ApprovalRule
from features.policyfile import MAX_FILE_BYTES
from features.rules import LoadPolicy
from features.signatures.rules import TrustedCertificates, TrustMode, TrustRule
from features.signatures.verification import key_digest
from server.check import load_config
from server.config import Config, ConfigError, settings
from server.configsources import read_settings

KEY = public_pem(make_key())
OTHER = public_pem(make_key("P-521"))
ROOT = make_authority().pem
TABLES = """
port = 1

[[trust]]
models = ["fraud-*", "digits"]
mode = "enforce"
keys = ["keys/fraud.pub", "{folder}/other.pub"]
certificates = [{{roots = "ca.pem", subject = "CN=release,O=Bank"}}]
distrusted = ["{digest}"]

[[trust]]
models = ["*"]
mode = "warn"

[[approval]]
models = ["fraud-*"]

[[approval]]
models = ["*"]
approvals = 2
added = "recorded"
emergency = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration file that is not there yet, beside the files that its rules name."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "fraud.pub").write_text(f"key of the team for fraud\n{KEY}")
    (tmp_path / "other.pub").write_text(OTHER)
    (tmp_path / "ca.pem").write_text(f"subject=CN = Root\n{ROOT}")
    return tmp_path / "server.toml"


def test_policy_is_read_from_the_file_with_contents(file: Path) -> None:
    file.write_text(TABLES.format(folder=file.parent, digest=key_digest(KEY)))
    values, mistakes = read_settings({"config": str(file)}, {})
    assert mistakes == []
    assert Config(repository=file, data=file, **values).policy == LoadPolicy(
        (
            TrustRule(
                ("fraud-*", "digits"),
                TrustMode.ENFORCE,
                (KEY, OTHER),
                (TrustedCertificates(ROOT, "CN=release,O=Bank"),),
                (key_digest(KEY),),
            ),
            TrustRule(("*",), TrustMode.WARN),
        ),
        (
            ApprovalRule(("fraud-*",)),
            ApprovalRule(("*",), approvals=2, added=AddedMode.RECORDED, emergency=False),
        ),
    )


def test_file_without_tables_has_no_policy(file: Path) -> None:
    file.write_text("port = 1\n")
    values, _ = read_settings({"config": str(file)}, {})
    assert "policy" not in values.keys() | {setting.name for setting in settings()}
    assert Config(repository=file, data=file).policy == LoadPolicy()


MISTAKES = {
    "trust": [
        ('keys = ["no.pub"]', ".keys[0]: 'no.pub' cannot be read: No such file"),
        ('keys = ["keys"]', ".keys[0]: 'keys' cannot be read: Is a directory"),
        ('keys = ["a\\u0000"]', ".keys[0]: 'a\\x00' is refused: embedded null byte"),
        ('keys = ["large"]', f".keys[0]: 'large' has more than {MAX_FILE_BYTES} bytes"),
        ('keys = ["latin"]', ".keys[0]: 'latin' is refused: 'utf-8' codec"),
        ('keys = ["ca.pem"]', ".keys[0]: 'ca.pem' is refused: there is no public"),
        ('keys = ["~/a"]', ".keys[0]: Must be a path in quotes, and in full"),
        ("keys = [1]", ".keys[0]: Must be a path in quotes"),
        ('keys = "other.pub"', ".keys: Not a valid list"),
        (
            'certificates = [{roots = "other.pub", subject = "CN=a"}]',
            ".certificates[0].roots: 'other.pub' is refused: there is no certificate",
        ),
        (
            'certificates = [{roots = "ca.pem", subject = "release"}]',
            ".certificates[0].subject: Is refused: 'release' is no name",
        ),
        ('certificates = [{roots = "ca.pem"}]', ".certificates[0].subject: Missing data"),
        (
            'certificates = [{roots = "ca.pem", subject = "CN=a", subjects = 1}]',
            ".certificates[0].subjects: there is no such key; did you mean subject?",
        ),
        ('distrusted = ["abc"]', ".distrusted[0]: Must be a key's SHA-256"),
        ('mode = "enforce"', ".keys: Must be given, or certificates"),
        ('mode = "strict"', ".mode: Must be one of: off, warn, enforce"),
        ("mode = ", ".mode: Missing data"),
        ("models = ", ".models: Missing data"),
        ("models = []", ".models: Shorter than minimum length 1"),
        ('models = ["a", "b/1"]', ".models[1]: Must be a model or a glob"),
        ("key = []", ".key: there is no such key; did you mean keys?"),
    ],
    "approval": [
        ("port = 1", ".port: there is no such key; settings stand above the tables"),
        ("approvals = 0", ".approvals: Must be greater than or equal to 1"),
        ('approvals = "1"', ".approvals: Not a valid integer"),
        ('added = "all"', ".added: Must be one of: any, recorded"),
        ('expires = "24h"', ".expires: there is no such key"),
        ('emergency = "no"', ".emergency: Not a valid boolean"),
    ],
}
"""By table: a line, and the mistake in it. A line without a value takes the key away from what is right."""
RIGHT = {"trust": {"models": '["a"]', "mode": '"warn"'}, "approval": {"models": '["a"]'}}


@pytest.mark.parametrize(
    ("table", "line", "expected"),
    [(table, line, expected) for table, rows in MISTAKES.items() for line, expected in rows],
)
def test_mistake_names_its_place(file: Path, table: str, line: str, expected: str) -> None:
    (file.parent / "large").write_text("#" * (MAX_FILE_BYTES + 1))
    (file.parent / "latin").write_bytes(b"\xff")
    key, _, value = line.partition(" = ")
    lines = RIGHT[table] | {key: value}
    text = "\n".join(f"{name} = {given}" for name, given in lines.items() if given)
    file.write_text(f"port = 1\n[[{table}]]\n{text}\n")
    _, [mistake] = read_settings({"config": str(file)}, {})
    assert f"{mistake.place}: {mistake.text}".startswith(f"{file}:2: {table}[0]{expected}")


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (
            '[trust]\nmodels = ["a"]',
            "trust",
            "Must be a list of tables: write the name in [[double brackets]].",
        ),
        ("approval = [1]", "approval[0]", ""),
    ],
)
def test_what_is_no_list_of_tables_is_refused(file: Path, text: str, place: str, words: str) -> None:
    file.write_text(text)
    _, [mistake] = read_settings({"config": str(file)}, {})
    assert mistake.place == f"{file}:1: {place}"
    assert words in mistake.text


def test_all_mistakes_are_reported_together(file: Path) -> None:
    file.write_text(
        'port = "a"\n[[trust]]\nmode = "x"\n[[trust]]\nmodels = [1]\n[[approval]]\napprovals = 0\n'
    )
    with pytest.raises(ConfigError) as refused:
        load_config({"config": str(file), "repository": str(file.parent), "data": str(file.parent)}, {})
    places = [
        line.removeprefix(f"{file}:").rpartition(": ")[0].split(": ")[1]
        for line in str(refused.value).split("\n")
    ]
    assert sorted(places) == [
        "approval[0].approvals", "approval[0].models", "port", "trust[0].mode", "trust[0].models",
        "trust[1].mode", "trust[1].models[0]",
    ]  # fmt: skip
