"""The choice among the copies of a model, as figures say how busy they are."""

import random
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.clusters import KnownSigning, KnownStanding
from support.history import MODEL, History, model_loaded

from events.types import Cause, LoadStarted
from nodes import spread
from nodes.decisions import NodePlacement
from nodes.placement import NodeHints
from nodes.spread import CopyFigures, Spread

NODES = ("b", "c", "d", "e")
COUNTS, TIMES_US = st.integers(0, 1000), st.integers(0, 10**6)
FIGURES = st.builds(CopyFigures, COUNTS, TIMES_US, COUNTS)
OTHERS = st.dictionaries(st.sampled_from(NODES), st.none() | FIGURES)
SETS = st.frozensets(st.sampled_from(NODES))


def seeded(seed: int) -> Spread:
    return Spread(random.Random(seed).sample)


def busy(in_flight: int, service_us: int = 5000) -> CopyFigures:
    return CopyFigures(in_flight, service_us)


@given(st.integers(), st.none() | FIGURES, OTHERS, SETS, SETS)
def test_choice_is_a_copy_that_is_there(
    seed: int,
    own: CopyFigures | None,
    others: Mapping[str, CopyFigures | None],
    late: frozenset[str],
    failed: frozenset[str],
) -> None:
    known = seeded(seed)
    for node in failed:
        known.avoid(node, 10.0)
    chosen = known.choose("m", own, others, late, 10.5)
    able = others.keys() - late - failed
    if own is None and others:
        assert chosen in (able or others)
    else:
        assert chosen is None or chosen in able


@given(st.integers(), FIGURES, st.lists(st.sampled_from(NODES), min_size=1))
def test_own_copy_answers_if_others_are_as_busy(seed: int, own: CopyFigures, nodes: list[str]) -> None:
    assert seeded(seed).choose("m", own, dict.fromkeys(nodes, own), (), 0.0) is None


@pytest.mark.parametrize(
    ("own", "other", "chosen"),
    [
        (busy(0), busy(0), None),
        (busy(1), busy(0), None),
        (busy(2), busy(0), "b"),
        (busy(9), busy(5), None),
        (busy(9), busy(3), "b"),
        (busy(9, 50), busy(0, 50), None),  # the detour costs more
        (busy(0, 50_000), busy(0, 5000), "b"),
        (busy(0), None, None),
        (busy(9), None, "b"),  # as fast as the own one, for all that is known
        (busy(9), busy(0, 0), "b"),
        (busy(0, 0), busy(9, 0), None),
        (None, busy(9), "b"),
        (None, None, "b"),
    ],
)
def test_detour_is_taken_if_the_own_copy_is_clearly_busier(
    own: CopyFigures | None, other: CopyFigures | None, chosen: str | None
) -> None:
    assert Spread().choose("m", own, {"b": other}, (), 0.0) == chosen


def test_cheaper_of_two_copies_is_chosen() -> None:
    known, others = Spread(), {"b": busy(3), "c": busy(1), "d": busy(2)}
    assert {known.choose("m", None, others, (), 0.0) for _ in range(200)} == {"c", "d"}
    assert known.choose("m", None, {"b": busy(1, 50), "c": busy(0, 200)}, (), 0.0) == "c"


def test_requests_of_this_node_count_at_once() -> None:
    known, others = Spread(), {"b": busy(0), "c": busy(1)}
    with known.sending("b", "m"), known.sending("b", "m"):
        assert known.choose("m", None, others, (), 0.0) == "c"
        assert known.choose("other", None, others, (), 0.0) == "b"
    assert known.choose("m", None, others, (), 0.0) == "b"
    assert not known._sent


def test_answer_counts_before_hints_for_a_while() -> None:
    known, others = Spread(), {"b": busy(9), "c": busy(3)}
    assert known.choose("m", None, others, (), 0.0) == "c"
    known.hear("b", "m", busy(0).header, 0.0)
    assert known.choose("m", None, others, (), spread.HEARD_S) == "b"
    assert known.choose("m", None, others, (), spread.HEARD_S + 0.1) == "c"


def test_requests_that_an_answer_has_counted_count_once() -> None:
    known = Spread()

    def choose(in_flight_at_c: int) -> str | None:
        return known.choose("m", None, {"b": None, "c": busy(in_flight_at_c)}, (), 0.0)

    with known.sending("b", "m"):
        known.hear("b", "m", busy(4).header, 0.0)
        assert (choose(5), choose(3)) == ("b", "c")
    assert (choose(4), choose(2)) == ("b", "c")


@pytest.mark.parametrize("header", ["", "1", "1;", ";1", "-1;5", "1;5;6", "1;1e3", "1;" + "9" * 10, "٣;٣"])
def test_odd_header_is_ignored(header: str) -> None:
    known = Spread()
    known.hear("b", "m", header, 0.0)
    assert not known._heard


def test_failed_node_is_avoided_for_a_second() -> None:
    known, others = Spread(), {"b": busy(0), "c": busy(50)}
    known.avoid("b", 0.0)
    assert known.choose("m", None, others, (), 0.5) == "c"
    assert known.choose("m", busy(99), {"b": busy(0)}, (), 0.5) is None
    assert known.choose("m", None, others, (), spread.AVOIDED_S) == "b"


def test_late_node_is_avoided_unless_there_is_no_other() -> None:
    known, others = Spread(), {"b": busy(0), "c": busy(50)}
    assert known.choose("m", None, others, ["b"], 0.0) == "c"
    assert known.choose("m", None, {"b": busy(0)}, ["b"], 0.0) == "b"


def test_memory_of_the_spread_is_bounded() -> None:
    known = Spread()
    for number in range(spread.MAX_HEARD + 10):
        known.hear("b", f"m{number}", "1;1", 0.0)
        known.avoid(f"n{number}", float(number))
    assert len(known._heard) == spread.MAX_HEARD
    assert len(known._avoided) <= 2


def test_figures_of_copies_are_told_as_hints() -> None:
    hints = NodeHints(7, loads={"m": CopyFigures(3, 5000, 0)})
    assert msgspec.json.decode(msgspec.json.encode(hints), type=NodeHints) == hints
    assert msgspec.json.decode(b'{"position": 7}', type=NodeHints) == NodeHints(7)


def loaded_at(*nodes: str) -> History:
    """Return a history of nodes `a` to `d`, and a model that was loaded at these, one after the other."""
    history = History()
    for name in ("a", "b", "c", "d"):
        history.join(name)
    for number, name in enumerate(nodes):
        cause = Cause.COPY if number else Cause.REQUEST
        history.load_at(name, f"L{name}", cause=cause, copies=len(nodes))
    return history


def placement_of(
    name: str, standing: KnownStanding | None = None, untrusted: frozenset[str] = frozenset()
) -> NodePlacement:
    given = standing or KnownStanding(1)
    return NodePlacement(name, given, KnownSigning(name), untrusted=lambda: untrusted)


@pytest.mark.parametrize(("node", "own"), [("a", "La"), ("b", "Lb"), ("c", "La")])
def test_node_sees_its_own_copy(node: str, own: str) -> None:
    history = loaded_at("a", "b")
    placement = placement_of(node)
    seen = placement.view(history.model())
    assert seen.serving is not None
    assert seen.serving.load_job_id == own
    assert placement.locate(seen, history.state) == (None if node != "c" else "a")


def choices(placement: NodePlacement, history: History, tried: str | None = None) -> set[str | None]:
    """Return the nodes that are chosen for a model which is not loaded here, or whose copy has failed."""
    model, state = history.model(), history.state
    node = state.registers.nodes.get(tried or "")
    return {placement.choose(model, state, None, tried=node) for _ in range(100)}


def test_choice_is_among_the_other_present_and_trusted_nodes() -> None:
    history = loaded_at("a", "b", "c")
    assert choices(placement_of("a"), history) == {"b", "c"}
    assert choices(placement_of("d"), history) == {"a", "b", "c"}
    assert choices(placement_of("d"), history, tried="b") == {"a", "c"}
    assert choices(placement_of("d", untrusted=frozenset("b")), history) == {"a", "c"}
    assert choices(placement_of("d", KnownStanding(1, late=["a"])), history) == {"b", "c"}
    history.lose("c")
    assert choices(placement_of("a"), history) == {"b"}
    history.ask_unload("U", "Lb", cause=Cause.COPY, node_id="b")
    assert choices(placement_of("a"), history) == {None}
    assert choices(placement_of("d"), history) == {"a"}


def test_choice_has_the_requested_version() -> None:
    history = loaded_at("a", "b")
    history.ask_load("L2", version=2, copies=2)
    history.place("L2", "a", version=2)
    history.add(LoadStarted(1, server="a"), "L2", version=2)
    history.add(replace(model_loaded("w2"), server="a"), "L2", version=2)
    assert {each.version for each in history.model().servings} == {1, 2}
    placement = placement_of("d")
    found = {version: placement.choose(history.model(), history.state, version) for version in (1, 2, 3)}
    assert found == {1: "b", 2: "a", 3: None}


def test_addresses_of_copies_are_those_that_are_reached() -> None:
    history = loaded_at("a", "b", "c")
    placement = placement_of("d", KnownStanding(1, late=["b"]))
    assert placement.list_addresses(history.model(), history.state) == ["http://a", "http://c"]


def test_hints_count_in_the_choice() -> None:
    history = loaded_at("a", "b")
    hints = {"a": NodeHints(9, loads={MODEL: busy(9)}), "b": NodeHints(9, loads={MODEL: busy(1)})}
    assert choices(placement_of("d", KnownStanding(1, hints)), history) == {"b"}
