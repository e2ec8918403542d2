"""The ring has the latest events, without a gap, within its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import PLAIN

from events.stored import StoredEvent
from events.tail import Ring


def event(position: int, size: int = 10) -> StoredEvent:
    return StoredEvent(position, "LoadStarted", None, None, "system", b"x" * size)


def positions(events: list[StoredEvent] | None) -> list[int] | None:
    return None if events is None else [each.position for each in events]


def test_who_has_seen_what_is_before_the_ring_goes_on_from_it() -> None:
    ring = Ring()
    ring.restart(4)
    assert (ring.base, ring.head) == (4, 4)
    ring.extend([event(5), event(6), event(7)])
    assert (ring.base, ring.head) == (4, 7)
    assert positions(ring.after(3, 9)) is None
    assert positions(ring.after(4, 9)) == [5, 6, 7]
    assert positions(ring.after(4, 2)) == [5, 6]
    assert positions(ring.after(6, 2)) == [7]
    assert positions(ring.after(7, 2)) == []
    assert positions(ring.after(99, 2)) == []


def test_the_oldest_make_room_by_number_and_by_bytes() -> None:
    ring = Ring(max_events=3, max_bytes=1000)
    ring.extend([event(number) for number in range(1, 6)])
    assert (ring.base, ring.head, ring.held_bytes) == (2, 5, 30)
    ring.extend([event(6, 985)])
    assert (ring.base, ring.held_bytes) == (4, 995)
    ring.extend([event(7, 5000)])
    assert (ring.base, ring.head, ring.held_bytes) == (7, 7, 0)
    assert ring.after(6, 1) is None


def test_a_gap_is_refused_and_a_restart_forgets() -> None:
    ring = Ring()
    ring.extend([event(1)])
    for position in (1, 3):
        with pytest.raises(ValueError, match="does not follow 1"):
            ring.extend([event(position)])
    ring.restart(9)
    assert (ring.base, ring.head, ring.held_bytes) == (9, 9, 0)


@PLAIN
@given(
    sizes=st.lists(st.integers(1, 50), max_size=60),
    max_events=st.integers(1, 20),
    max_bytes=st.integers(1, 300),
    limit=st.integers(1, 9),
)
def test_it_never_has_more_than_it_may_and_gives_what_follows_in_order(
    sizes: list[int], max_events: int, max_bytes: int, limit: int
) -> None:
    ring = Ring(max_events, max_bytes)
    for number, size in enumerate(sizes, 1):
        ring.extend([event(number, size)])
        held = sizes[ring.base : ring.head]
        assert ring.head == number
        assert ring.held_bytes == sum(held) <= max_bytes
        assert len(held) <= max_events
        for after in range(number + 1):
            right = None if after < ring.base else list(range(after + 1, min(number, after + limit) + 1))
            assert positions(ring.after(after, limit)) == right
