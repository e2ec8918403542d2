"""What was used last, and what has to go for it: the least recently used, of forms and of keys without."""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_WITHOUT_FORM = 1_000
"""Keys of which is only known that no form is of use. Each takes a folder and a file; one that is forgotten
and asked for again costs one more attempt to prepare."""


@dataclass(frozen=True, slots=True)
class Use:
    """When something was used last, in nanoseconds since 1970, and what its form takes; None is no form."""

    used_ns: int
    bytes: int | None


class Uses:
    """The last use of each key, within limits.

    Args:
        limit_bytes: what all forms may take together.
        max_without_form: how many keys without one are remembered.
    """

    def __init__(self, limit_bytes: int, max_without_form: int) -> None:
        self._limit_bytes = limit_bytes
        self._max_without_form = max_without_form
        self._uses = dict[str, Use]()
        self._bytes = 0
        self._without_form = 0
        self._latest_ns = 0

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._uses))

    @property
    def kept(self) -> tuple[int, int]:
        """How many forms there are, and the bytes of all."""
        return len(self._uses) - self._without_form, self._bytes

    def forms(self) -> list[tuple[str, int]]:
        """List the keys that have a form, with the bytes of each, the one used the longest ago first."""
        return [(key, use.bytes) for key, use in self._oldest_first() if use.bytes is not None]

    def put(self, key: str, use: Use) -> None:
        """Take what was found of a key, instead of what was known of it."""
        self.forget(key)
        self._uses[key] = use
        self._latest_ns = max(self._latest_ns, use.used_ns)
        self._count(use, 1)

    def use(self, key: str, bytes_: int | None, now_ns: int) -> int:
        """Note that a key is used now.

        Returns:
            The time to remember: later than all others, even if the clock was set back or has not moved.
        """
        used_ns = max(now_ns, self._latest_ns + 1)
        self.put(key, Use(used_ns, bytes_))
        return used_ns

    def forget(self, key: str) -> None:
        """Leave a key out, if it is there."""
        use = self._uses.pop(key, None)
        if use is not None:
            self._count(use, -1)

    def are_too_many(self) -> bool:
        """Tell whether something has to go."""
        return self._bytes > self._limit_bytes or self._without_form > self._max_without_form

    def next_to_go(self) -> Iterator[str]:
        """Give what has to go, each of which is to be forgotten before the next; the oldest goes first."""
        for key, use in self._oldest_first():
            too_many = (
                self._without_form > self._max_without_form
                if use.bytes is None
                else self._bytes > self._limit_bytes
            )
            if too_many:
                yield key

    def _oldest_first(self) -> list[tuple[str, Use]]:
        return sorted(self._uses.items(), key=lambda item: (item[1].used_ns, item[0]))

    def _count(self, use: Use, sign: int) -> None:
        if use.bytes is None:
            self._without_form += sign
        else:
            self._bytes += sign * use.bytes
