"""Symbolic numbers beside plain ones: whatever the symbols are, the results are those of arithmetic."""

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runtime.rows.sizes import MAX_NUMBER, ROWS, Number, Size, Symbols

Expression = tuple[Any, ...]
EXPRESSIONS: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.integers(-4, 4), st.sampled_from(["N", "T", "C"])),
    lambda inner: st.tuples(st.sampled_from(["add", "subtract", "multiply"]), inner, inner),
    max_leaves=8,
)
LENGTHS = st.fixed_dictionaries({name: st.integers(0, 7) for name in "NTC"})


def build(symbols: Symbols, names: dict[str, Number], expression: Any) -> Number:
    if isinstance(expression, int | str):
        return names[expression] if isinstance(expression, str) else expression
    operation, *parts = expression
    first, second = (build(symbols, names, part) for part in parts)
    if operation == "multiply":
        return symbols.multiply(first, second)
    return symbols.add(first, second, 1 if operation == "add" else -1)


def compute(expression: Any, lengths: dict[str, int]) -> int:
    if isinstance(expression, int | str):
        return lengths[expression] if isinstance(expression, str) else expression
    operation, *parts = expression
    first, second = (compute(part, lengths) for part in parts)
    results: dict[str, Callable[[], int]] = {
        "add": lambda: first + second,
        "subtract": lambda: first - second,
        "multiply": lambda: first * second,
    }
    return results[operation]()


def evaluate(number: Number, names: dict[str, Number], lengths: dict[str, int]) -> int | None:
    """Return a number for lengths of its symbols; None if it has other symbols."""
    if not isinstance(number, Size):
        return int(number)
    known = {next(iter(names[name].terms))[0]: length for name, length in lengths.items()}
    total = 0
    for term, factor in number.terms.items():
        for symbol in term:
            if symbol not in known:
                return None
            factor *= known[symbol]  # noqa: PLW2901
        total += factor
    return total


def make() -> tuple[Symbols, dict[str, Number]]:
    symbols = Symbols()
    return symbols, {"N": ROWS, "T": symbols.unknown(), "C": symbols.unknown()}


@given(EXPRESSIONS, LENGTHS)
def test_polynomial_has_the_value_of_its_expression(expression: Any, lengths: dict[str, int]) -> None:
    symbols, names = make()
    found = evaluate(build(symbols, names, expression), names, lengths)
    assert found in {None, compute(expression, lengths)}


@given(EXPRESSIONS, EXPRESSIONS, LENGTHS)
def test_quotient_times_divisor_is_the_number(number: Any, divisor: Any, lengths: dict[str, int]) -> None:
    symbols, names = make()
    whole, part = build(symbols, names, number), build(symbols, names, divisor)
    quotient = symbols.divide(whole, part)
    if quotient is not None:
        values = [evaluate(each, names, lengths) for each in (quotient, part, whole)]
        assert None in values or values[0] * values[1] == values[2]  # type: ignore[operator]


@given(EXPRESSIONS, st.sampled_from(["N", "T", "C"]))
def test_product_is_divided_by_its_factor(number: Any, factor: str) -> None:
    symbols, names = make()
    product = symbols.multiply(build(symbols, names, number), names[factor])
    assert symbols.divide(product, names[factor]) is not None


@given(EXPRESSIONS, EXPRESSIONS, LENGTHS)
def test_numbers_are_equal_or_not_only_if_they_always_are(
    first: Any, second: Any, lengths: dict[str, int]
) -> None:
    symbols, names = make()
    equal = symbols.is_equal(build(symbols, names, first), build(symbols, names, second))
    assert equal in {None, compute(first, lengths) == compute(second, lengths)}


@given(EXPRESSIONS, LENGTHS)
def test_length_is_not_negative_and_mentions_what_it_depends_on(
    expression: Any, lengths: dict[str, int]
) -> None:
    symbols, names = make()
    number = build(symbols, names, expression)
    if symbols.is_length(number):
        assert compute(expression, lengths) >= 0
    if not symbols.mentions_rows(number):
        others = [compute(expression, lengths | {"N": count}) for count in (1, 2, 5)]
        assert len(set(others)) == 1


def test_result_of_an_operation_is_one_symbol() -> None:
    symbols, names = make()
    first, second = (symbols.result("quotient", names["T"], 4) for _ in range(2))
    assert first == second != symbols.result("quotient", names["T"], 8)
    assert symbols.mentions_rows(symbols.result("quotient", symbols.add(ROWS, 1), 2))
    assert not symbols.mentions_rows(first)
    assert symbols.is_length(first)
    assert not symbols.is_length(symbols.result("Where", names["T"], -1))


def test_sums_numbers_and_degrees_are_bounded() -> None:
    symbols = Symbols()
    total: Number = 1
    for _ in range(40):
        total = symbols.multiply(symbols.add(total, symbols.unknown()), 3)
        assert len(total.terms) <= 12
        assert max(map(len, total.terms)) <= 8
    number: Number = 3
    for _ in range(64):
        number = symbols.multiply(number, number)
        assert isinstance(number, Size) or number <= MAX_NUMBER
