"""Symbolic numbers: lengths of dimensions, and shapes that a graph computes as data.

A number is an int, a float, a bool, or a `Size`: a polynomial with whole coefficients over symbols. Symbol 0
is the number of rows, N. Other symbols are lengths that the file leaves open, and results of operations that
have no polynomial, such as the quotient of a length and a stride: the same operation on the same operands is
the same symbol, so that equal lengths are known to be equal. Every symbol but N has the same value for all
requests that may run together, or its definition mentions N (`mentions_rows`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_TERMS = 12
"""Terms of a polynomial; a longer sum becomes a symbol. Shapes of exported models have up to four."""
MAX_DEGREE = 8
"""Factors of a term; no exporter joins more dimensions."""
MAX_NUMBER = 2**62
"""Numbers beyond it do not fit ONNX's integers, and could grow without bound."""

MONOTONE = {"add", "multiply", "quotient", "Floor", "Ceil", "Round", "Max", "Min", "Sqrt", "Where", "Cast"}
"""Operations whose results are not negative if no operand is."""
ROUNDING = {"quotient", "Floor", "Ceil", "Round", "Cast"}
"""Operations whose results are whole numbers."""
ARITHMETIC = {"add", "multiply", "Max", "Min", "Where", "Mod", "Abs", "Neg"}
"""Operations whose results are whole numbers if all operands are."""

Number = Any
"""An int, a float, a bool, or a `Size`."""
Term = tuple[int, ...]
"""The symbols of a term, sorted; the empty term is 1."""


class Size:
    """A polynomial that is no number: at least one of its terms has a symbol."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[Term, int]) -> None:
        self.terms = terms
        self._hash = hash(frozenset(terms.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash


ROWS = Size({(0,): 1})
"""N, the number of rows."""


class Symbols:
    """The symbols of one walk."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._operands: dict[int, tuple[Number, ...]] = {}
        self._ratios = set[int]()  # quotients by lengths that are not known
        self._mentions_rows = [True]
        self._may_be_negative = set[int]()
        self._may_be_fractions = set[int]()
        self._lengths = {0}

    def unknown(self) -> Size:
        """Return a length that is not known, and is the same for all requests that may run together."""
        made = self._add(mentions_rows=False)
        self._lengths.update(*made.terms)
        return made

    def _add(self, *, mentions_rows: bool) -> Size:
        self._mentions_rows.append(mentions_rows)
        return Size({(len(self._mentions_rows) - 1,): 1})

    def result(
        self, operation: str, *operands: Number, is_length: bool = False, is_whole: bool = False
    ) -> Size:
        """Return the result of an operation that has no polynomial, as a symbol.

        Args:
            operation: its name.
            operands: its operands; equal operations on equal operands have the same result.
            is_length: whether the result is certainly not negative.
            is_whole: whether the result is certainly a whole number.
        """
        key = (operation, *((type(each), each) for each in operands))
        if key not in self._known:
            mentions = any(map(self.mentions_rows, operands))
            ((symbol,),) = self._add(mentions_rows=mentions).terms
            self._known[key] = symbol
            self._operands[symbol] = operands
            if operation == "quotient" and isinstance(operands[1], Size):
                self._ratios.add(symbol)
            if is_length:
                self._lengths.add(symbol)
            if not is_length and not (operation in MONOTONE and all(map(self.is_length, operands))):
                self._may_be_negative.add(symbol)
            if (
                not is_whole
                and operation not in ROUNDING
                and (operation not in ARITHMETIC or not all(map(self.is_whole, operands)))
            ):
                self._may_be_fractions.add(symbol)
        return Size({(self._known[key],): 1})

    def mentions_rows(self, number: Number) -> bool:
        """Whether a number may depend on the number of rows."""
        if not isinstance(number, Size):
            return False
        return any(self._mentions_rows[symbol] for term in number.terms for symbol in term)

    def mentioned(self, number: Size) -> set[int]:
        """Return all symbols in a number, also those in the operands of operations."""
        found, left = set[int](), {symbol for term in number.terms for symbol in term}
        while left:
            symbol = left.pop()
            found.add(symbol)
            operands = self._operands.get(symbol, ())
            left |= {
                each for one in operands if isinstance(one, Size) for term in one.terms for each in term
            } - found
        return found

    def is_computed(self, number: Number) -> bool:
        """Whether a number has results of operations that have no polynomial, such as a quotient."""
        return isinstance(number, Size) and any(each in self._operands for each in self.mentioned(number))

    def has_ratios_only(self, number: Size) -> bool:
        """Whether all symbols are ratios of lengths, which may be the same whatever the lengths are."""
        return all(symbol in self._ratios for term in number.terms for symbol in term)

    def add(self, first: Number, second: Number, times: int = 1) -> Number:
        """Return `first + times * second`."""
        if not isinstance(first, Size) and not isinstance(second, Size):
            return self._limit(first + times * second, "sum", first, second, times)
        left, right = _terms(first), _terms(second)
        if left is None or right is None:
            return self.result("add", first, second, times)
        made = dict(left)
        for term, factor in right.items():
            made[term] = made.get(term, 0) + times * factor
        simple = self._simplify(made)
        return self.result("add", first, second, times) if simple is None else simple

    def multiply(self, first: Number, second: Number) -> Number:
        if not isinstance(first, Size) and not isinstance(second, Size):
            return self._limit(first * second, "product", first, second)
        if first == 1 or second == 1:  # the layout of most rows: `outer * N * inner`
            return second if first == 1 else first
        left, right = _terms(first), _terms(second)
        if left is None or right is None:
            return self.result("multiply", *sorted((first, second), key=_order))
        made = dict[Term, int]()
        for one, factor in left.items():
            for other, times in right.items():
                term = tuple(sorted(one + other))
                made[term] = made.get(term, 0) + factor * times
        simple = self._simplify(made)
        return self.result("multiply", *sorted((first, second), key=_order)) if simple is None else simple

    def _limit(self, number: Number, operation: str, *operands: Number) -> Number:
        """Return a symbol in place of a number that ONNX could not hold, either."""
        is_held = isinstance(number, float) or abs(number) <= MAX_NUMBER
        return number if is_held else self.result(operation, *operands)

    def product(self, numbers: Iterable[Number]) -> Number:
        result: Number = 1
        for number in numbers:
            result = self.multiply(result, number)
        return result

    def _simplify(self, terms: Mapping[Term, int]) -> Number:
        """Return a polynomial without terms of 0, a plain number if it is one; None if it is too long."""
        kept = {term: factor for term, factor in terms.items() if factor}
        if not kept.keys() - {()}:
            return kept.get((), 0)
        too_long = len(kept) > MAX_TERMS or any(len(term) > MAX_DEGREE for term in kept)
        return None if too_long or any(abs(each) > MAX_NUMBER for each in kept.values()) else Size(kept)

    def divide(self, number: Number, divisor: Number) -> Number | None:
        """Return the quotient of whole numbers if it is exact, whatever the symbols are; else None."""
        left, right = _terms(number), _terms(divisor)
        if left is None or right is None or not right:
            return None
        if not left:
            return 0
        rest, quotient = dict(left), dict[Term, int]()
        lead = max(right)
        for _ in range(MAX_TERMS):
            term = max(rest)
            factors = _remove(term, lead)
            if factors is None or rest[term] % right[lead]:
                return None
            times = rest[term] // right[lead]
            quotient[factors] = times
            for each, factor in right.items():
                product = tuple(sorted(each + factors))
                rest[product] = rest.get(product, 0) - times * factor
                if not rest[product]:
                    del rest[product]
            if not rest:
                return self._simplify(quotient)
        return None

    def is_equal(self, first: Number, second: Number) -> bool | None:
        """Whether two numbers are equal; None if that is not known."""
        if first == second:
            return True
        if not isinstance(first, Size) and not isinstance(second, Size):
            return False
        difference = self.add(first, second, -1)
        if not isinstance(difference, Size):
            return bool(difference == 0)
        if self.is_length(difference):
            return False if difference.terms.get((), 0) else None
        negative = self.multiply(difference, -1)
        return False if self.is_length(negative) and difference.terms.get((), 0) else None

    def is_length(self, number: Number) -> bool:
        """Whether a number is not negative, whatever its symbols are."""
        if not isinstance(number, Size):
            return bool(number >= 0)
        if any(factor < 0 for factor in number.terms.values()):
            return False
        return not any(symbol in self._may_be_negative for term in number.terms for symbol in term)

    def has_lengths_only(self, number: Size) -> bool:
        """Whether all symbols are lengths, and none is a result that may be large."""
        return all(symbol in self._lengths for term in number.terms for symbol in term)

    def is_whole(self, number: Number) -> bool:
        """Whether a number is whole, whatever its symbols are."""
        if not isinstance(number, Size):
            return isinstance(number, int) or (math.isfinite(number) and number.is_integer())
        return not any(symbol in self._may_be_fractions for term in number.terms for symbol in term)


def _terms(number: Number) -> Mapping[Term, int] | None:
    """Return a number's terms; None for a number that is not whole."""
    if isinstance(number, Size):
        return number.terms
    if isinstance(number, float):
        if not math.isfinite(number) or not number.is_integer() or abs(number) > MAX_NUMBER:
            return None
        number = int(number)
    return {(): int(number)} if number else {}


def _remove(term: Term, factors: Term) -> Term | None:
    left = list(term)
    for each in factors:
        if each not in left:
            return None
        left.remove(each)
    return tuple(left)


def _order(number: Number) -> tuple[Any, ...]:
    if isinstance(number, Size):
        return (1, sorted(number.terms.items()))
    return (0, [((), number)])
