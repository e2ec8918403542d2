"""Who has a place: the total, the bound of one address, and the reserve."""

from pathlib import Path

import pytest

from server.config import Config
from server.connections.places import RESERVE, Place, Places

HOME = "192.0.2.7"


def taken(places: Places, address: str | None = HOME) -> Place:
    place = places.take(address)
    assert place is not None
    return place


def test_what_is_given_back_can_be_taken_again_and_only_once() -> None:
    places = Places(1, reserve=0)
    place = taken(places)
    assert places.take(HOME) is None
    places.leave(place)
    places.leave(place)
    assert not taken(places).is_spare
    assert places.take(HOME) is None


def test_who_is_too_many_of_one_address_has_a_place_of_the_reserve_as_who_is_too_many_at_all() -> None:
    places = Places(4, most_of_peer=2)
    first = taken(places)
    assert [taken(places).is_spare for _ in range(2)] == [False, True]
    assert [taken(places, "192.0.2.8").is_spare for _ in range(3)] == [False, False, True]
    assert taken(places, "192.0.2.9").is_spare  # of which there is none, but there are four in all
    places.leave(first)
    assert not taken(places).is_spare
    assert taken(places).is_spare


def test_nothing_is_kept_of_addresses_that_have_gone() -> None:
    places = Places(10, most_of_peer=1)
    held = [taken(places), taken(places), taken(places, None)]
    for place in held:
        places.leave(place)
    assert not places.taken
    assert not places.spare
    assert not places.of_peers


@pytest.mark.parametrize(
    ("address", "same"),
    [("::ffff:192.0.2.7", HOME), ("2001:db8::1", "2001:db8::2:3"), ("fe80::1%eth0", "fe80::2%eth1")],
)
def test_one_host_is_one_address_however_it_is_written(address: str, same: str) -> None:
    places = Places(10, most_of_peer=1)
    assert not taken(places, address).is_spare
    assert taken(places, same).is_spare


def test_of_the_reserve_the_oldest_gives_way_that_may() -> None:
    places = Places(0, reserve=3)
    gone = list[str]()
    answered, silent, other = (taken(places) for _ in range(3))
    silent.give_way = lambda: gone.append("silent")
    other.give_way = lambda: gone.append("other")
    assert taken(places).is_spare
    assert taken(places).is_spare
    assert gone == ["silent", "other"]
    assert places.take(HOME) is None  # those that are left may not be ended
    assert answered in places.spare
    assert len(places.spare) == 3


def test_who_gave_way_is_ended_when_more_than_the_reserve_has_take_their_time_to_leave() -> None:
    places = Places(0, reserve=2)
    aborted, held = list[int](), list[Place]()
    for number in range(6):
        held.append(taken(places))
        held[-1].give_way = lambda: None
        held[-1].abort = lambda number=number: aborted.append(number)
        places.leave(held[0])  # who goes by itself is not counted
    assert aborted == [1]
    assert list(places.leaving) == held[2:4]
    for place in held:
        places.leave(place)
    assert not places.leaving


def test_connections_leave_descriptors_to_the_models_and_the_ledger(tmp_path: Path) -> None:
    places = Places.of(Config(repository=tmp_path, data=tmp_path, max_connections=7))
    assert places.most == 7
    assert 1 <= places.reserve <= RESERVE
    many = Places.of(Config(repository=tmp_path, data=tmp_path, max_connections=1_000_000))
    assert 1 <= many.most <= 1_000_000
