"""Rules of records: their tables in the configuration file, and the choice of a share."""

import hashlib
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from features.records.rules import Failures, RecordRule, What, find_rule, is_chosen
from server.config import Config
from server.configsources import read_settings

RULES = (
    RecordRule(models=("fraud-eu", "score-*"), share=0.1),
    RecordRule(models=("fraud-*",), share=0.2),
    RecordRule(models=("*-[ab]",), share=0.3),
)
SHARES = st.floats(0, 1, exclude_min=True) | st.integers(0, 64).map(lambda power: 2.0**-power)


@pytest.mark.parametrize(
    ("model", "share"),
    [
        ("fraud-eu", 0.1),
        ("score-a", 0.1),
        ("fraud-a", 0.2),
        ("other-a", 0.3),
        ("other-c", None),
        ("Fraud-1", None),
    ],
)
def test_first_rule_whose_glob_matches_holds(model: str, share: float | None) -> None:
    rule = find_rule(RULES, model)
    assert (None if rule is None else rule.share) == share


@PLAIN
@given(st.text(st.characters(codec="utf-8")), SHARES, SHARES)
def test_share_follows_formula_and_has_smaller_shares(request_id: str, one: float, other: float) -> None:
    digits = hashlib.sha256(request_id.encode()).hexdigest()[:16]
    assert is_chosen(request_id, one) == (Fraction(int(digits, 16), 2**64) < Fraction(one))
    small, large = sorted((one, other))
    assert is_chosen(request_id, large) or not is_chosen(request_id, small)
    assert is_chosen(request_id, 1.0)


def test_share_of_known_id_can_be_repeated_by_hand() -> None:
    # printf abc | sha256sum: ba7816bf8f01cfea..., which is 0.7283949... of 2**64
    assert (is_chosen("abc", 0.728394), is_chosen("abc", 0.728396)) == (False, True)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
def test_share_chooses_about_so_many(share: float) -> None:
    number = 50_000
    found = sum(is_chosen(f"{n:016x}", share) for n in range(number))
    assert abs(found - number * share) < 5 * (number * share * (1 - share)) ** 0.5


# The tables.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


TABLES = """
[[record]]
models = ["fraud-*", "digits"]
share = 0.25
failures = "all"
what = "tensors"
max_bytes = "20GB"
keep = "12h"

[[record]]
models = ["*"]
share = 1
max_bytes = 10000000
keep = "5200w"

[[record]]
models = ["a"]
"""


def test_tables_are_read_in_their_order_with_defaults(file: Path) -> None:
    file.write_text(f"port = 1\n{TABLES}")
    values, mistakes = read_settings({"config": str(file)}, {})
    assert mistakes == []
    assert Config(repository=file, data=file, **values).tables == {
        "record": (
            RecordRule(
                models=("fraud-*", "digits"),
                share=0.25,
                failures=Failures.ALL,
                what=What.TENSORS,
                max_bytes=20 * 10**9,
                keep_s=12 * 3600,
            ),
            RecordRule(models=("*",), share=1.0, max_bytes=10**7, keep_s=5200 * 7 * 86400),
            RecordRule(
                models=("a",),
                share=1.0,
                failures=Failures.SHARE,
                what=What.DIGESTS,
                max_bytes=10 * 10**9,
                keep_s=30 * 86400,
            ),
        )
    }


SIZE, LEAST = ".max_bytes: Must be bytes", ".max_bytes: Must be at least 10MB."
DURATION = '.keep: Must be a duration in quotes, like "12h", "30d" or "52w".'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shares = 1", ".shares: there is no such key; did you mean share?"),
        ("keep_s = 60", ".keep_s: there is no such key; did you mean keep?"),
        ("port = 1", ".port: there is no such key; settings stand above the tables"),
        ("models = ", ".models: Missing data"),
        ("models = []", ".models: Shorter than minimum length 1"),
        ('models = ["a", "b/1"]', ".models[1]: Must be a model or a glob"),
        ("share = 0", ".share: Must be greater than 0"),
        ("share = -0.5", ".share: Must be greater than 0"),
        ("share = 1.01", ".share: Must be greater than 0 and less than or equal to 1"),
        ("share = nan", ".share: "),
        ("share = inf", ".share: "),
        ("share = true", ".share: Not a valid number."),
        ('share = "half"', ".share: Not a valid number."),
        ('failures = "none"', ".failures: Must be one of: all, share"),
        ("failures = true", ".failures: Must be one of: all, share"),
        ('what = "all"', ".what: Must be one of: digests, tensors"),
        ('max_bytes = "9MB"', LEAST),
        ("max_bytes = 9999999", LEAST),
        ("max_bytes = 0", SIZE),
        ("max_bytes = -1", SIZE),
        ('max_bytes = "lots"', SIZE),
        ("max_bytes = 1e9", ".max_bytes: Must be a number of bytes, or a size in quotes"),
        ("max_bytes = true", ".max_bytes: Must be a number of bytes, or a size in quotes"),
        ("keep = 30", DURATION),
        ('keep = "30"', DURATION),
        ('keep = "0d"', DURATION),
        ('keep = "1y"', DURATION),
        ('keep = "1d12h"', DURATION),
        ('keep = "9999999w"', DURATION),
        ('keep = "\\u0661d"', DURATION),
    ],
)
def test_mistake_in_table_names_its_place(file: Path, line: str, expected: str) -> None:
    key, _, value = line.partition(" = ")
    lines = {"models": '["a"]', key: value}
    text = "\n".join(f"{name} = {given}" for name, given in lines.items() if given)
    file.write_text(f"[[record]]\nmodels = ['b']\n[[record]]\n{text}\n")
    values, [mistake] = read_settings({"config": str(file)}, {})
    assert f"{mistake.place}: {mistake.text}".startswith(f"{file}:1: record[1]{expected}")
    assert "tables" not in values


def test_all_mistakes_are_reported_together(file: Path) -> None:
    file.write_text('[[record]]\nshare = 2\nkeep = 1\n[[approval]]\nmodels = ["a"]\napprovals = 0\n')
    _, mistakes = read_settings({"config": str(file)}, {})
    assert {mistake.place.rpartition(": ")[2] for mistake in mistakes} == {
        "record[0].models",
        "record[0].share",
        "record[0].keep",
        "approval[0].approvals",
    }


def test_single_brackets_are_refused(file: Path) -> None:
    file.write_text('[record]\nmodels = ["a"]\n')
    _, [mistake] = read_settings({"config": str(file)}, {})
    assert mistake.place == f"{file}:1: record"
    assert "[[double brackets]]" in mistake.text
