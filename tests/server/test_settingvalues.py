"""The memory budget: a size like all others, or a percentage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from server.settingvalues import parse_budget


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("80%", 800), ("100%", 1000), ("100.000%", 1000), ("12.5%", 125), ("0.1%", 1), ("33.3%", 333),
        ("0.000000001%", 1), ("080%", 800), ("1", 1), ("1000", 1000), ("8589934592", 8589934592),
        ("9" * 18, 10**18 - 1), ("8GB", 8 * 10**9), ("2GiB", 2**31),
    ],
)  # fmt: skip
def test_budget_is_a_size_or_a_percentage(setting: str, expected: int) -> None:
    assert parse_budget(setting, limit_bytes=1000) == expected


@pytest.mark.parametrize(
    "setting",
    [
        "", "0", "-1", "+1", "1.5", "1e9", "8gb", "9" * 19, " 1", "1\n", "0%", "0.0%", "100.1%", "101%",
        "1000%", "-5%", "nan%", "inf%", "%", ".5%", "5.%", "80 %", "80%\n", "80%%", "\u0661%", "\u0661",
        "1_000", "0x10",
    ],
)  # fmt: skip
def test_other_budget_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"Must be (bytes, or a number of MB.* like 80%|a percentage)"):
        parse_budget(setting, limit_bytes=1000)


@PLAIN
@given(limit=st.integers(1, 2**62), thousandths=st.integers(1, 100_000))
def test_percentage_is_exact_and_within_the_limit(limit: int, thousandths: int) -> None:
    budget = parse_budget(f"{thousandths // 1000}.{thousandths % 1000:03}%", limit)
    assert budget == max(1, limit * thousandths // 100_000)
    assert budget <= limit
