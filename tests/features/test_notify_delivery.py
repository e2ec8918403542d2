"""Deliveries of a ledger's events: all after a progress, in order, and signed by Standard Webhooks 1.0."""

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import PLAIN
from support.ledgers import SIGN, copy_of, rows_of, sound_ledger

from events.audit.export import cloudevents, export
from events.audit.signing import key_id
from events.codec import GENESIS
from events.storage import Row
from features.notify.delivery import (
    LONGEST_BACK_OFF_S,
    Delivery,
    NotDelivered,
    back_off_s,
    describe_status,
    make_deliveries,
)
from features.notify.progress import Progress
from features.notify.table import parse_secrets

SOURCE = f"urn:loadledger:{key_id(SIGN.public_key)}"

with copy_of(sound_ledger()) as _path:
    ROWS = [Row(*row) for row in rows_of(_path)]
    EXPORTED = list(export(_path, cloudevents(SIGN.public_key), SIGN))[:-1]

HEAD = len(ROWS)
POSITIONS = st.integers(0, HEAD)
PAGES = st.integers(1, HEAD + 1)


def progress_at(position: int, *, knows_hash: bool = True) -> Progress:
    return Progress(position, ROWS[position - 1].hash.hex() if position and knows_hash else "")


def read_page(position: int, size: int) -> Sequence[Row]:
    """Return the rows for a progress, as the sender reads them: with the event at the position."""
    after = max(position - 1, 0)
    return ROWS[after : after + size]


def deliver(progress: Progress, rows: Sequence[Row]) -> list[Delivery]:
    return list(make_deliveries(progress, rows, SOURCE))


# The events after a progress.


@PLAIN
@given(POSITIONS, st.booleans())
def test_events_after_progress_are_delivered_once_in_order(position: int, knows_hash: bool) -> None:  # noqa: FBT001
    deliveries = deliver(progress_at(position, knows_hash=knows_hash), read_page(position, HEAD))
    events = [json.loads(each.body) for each in deliveries]
    assert [event["data"]["position"] for event in events] == list(range(position + 1, HEAD + 1))
    assert [each.reached for each in deliveries] == list(map(progress_at, range(position + 1, HEAD + 1)))
    assert [each.body for each in deliveries] == [line.rstrip(b"\n") for line in EXPORTED[position:]]
    digest = ROWS[position - 1].hash if position else GENESIS
    for each, event in zip(deliveries, events, strict=True):
        assert each.id == event["id"] == event["data"]["id"]
        assert event["source"] == SOURCE
        assert (event["sequence"], len(event["sequence"])) == (f"{event['data']['position']:019}", 19)
        text = each.body.decode()
        data = text[text.index('"data":') + len('"data":') : -1]
        assert event["ledgerprevious"] == digest.hex()
        digest = hashlib.sha256(digest + data.encode()).digest()
        assert event["ledgerhash"] == digest.hex() == each.reached.hash


@PLAIN
@given(POSITIONS, st.lists(PAGES, min_size=1))
def test_pages_and_restarts_change_no_delivery(position: int, sizes: list[int]) -> None:
    whole, parts = deliver(progress_at(position), read_page(position, HEAD)), list[Delivery]()
    progress = progress_at(position)
    for size in [*sizes, HEAD + 1]:
        parts += deliver(progress, read_page(progress.position, size))
        progress = parts[-1].reached if parts else progress
    assert parts == whole
    assert len({each.id for each in parts}) == len(parts)


def test_no_event_after_progress_is_no_delivery() -> None:
    assert deliver(progress_at(HEAD), ROWS[-1:]) == []
    assert deliver(Progress(0), []) == []


# Another ledger, or a damaged one.


@PLAIN
@given(st.integers(1, HEAD), st.integers(0, 255))
def test_other_hash_at_progress_is_refused(position: int, index: int) -> None:
    digits = list(ROWS[position - 1].hash.hex())
    digits[index % 64] = "0" if digits[index % 64] != "0" else "1"
    rows, text = read_page(position, HEAD), f"the event {position} that it has acknowledged is another one"
    for wrong in ("".join(digits), ROWS[position - 2].hash.hex(), "x"):
        with pytest.raises(NotDelivered, match=text) as caught:
            deliver(Progress(position, wrong), rows)
        assert 'give the receiver another name, and the position to begin at as its "from"' in str(
            caught.value
        )


@PLAIN
@given(st.integers(1, HEAD + 5), POSITIONS)
def test_missing_event_at_progress_is_refused(position: int, end: int) -> None:
    shorter = [row for row in ROWS[:end] if row.position != position]
    rows = [row for row in shorter if row.position > position - 1]
    for known in ("", "00" * 32):
        if known or rows:
            with pytest.raises(NotDelivered, match=f"the ledger has no event {position}, up to"):
                deliver(Progress(position, known), rows)
        else:  # a receiver that is to begin later than the ledger ends
            assert deliver(Progress(position), []) == []


@PLAIN
@given(POSITIONS, st.integers(1, HEAD))
def test_gap_is_refused_after_the_events_before_it(position: int, missing: int) -> None:
    rows = [row for row in read_page(position, HEAD) if row.position != missing]
    made, problem = deliver_some(progress_at(position), rows)
    if position == missing:
        assert (made, problem[:24]) == ([], "the ledger has no event ")
    elif position < missing < HEAD:
        assert [each.reached.position for each in made] == list(range(position + 1, missing))
        assert problem == f"event {missing} is missing in the ledger: run `loadledger verify`"
    else:
        assert (len(made), problem) == (HEAD - position - (missing == HEAD), "")


@PLAIN
@given(POSITIONS, st.permutations(ROWS), PAGES)
def test_rows_in_any_order_give_no_wrong_delivery(position: int, rows: list[Row], size: int) -> None:
    made, problem = deliver_some(progress_at(position), rows[:size])
    assert [each.reached for each in made] == [
        progress_at(position + 1 + number) for number in range(len(made))
    ]
    assert problem or rows[:size] == list(read_page(position, size))


def deliver_some(progress: Progress, rows: Sequence[Row]) -> tuple[list[Delivery], str]:
    """Return the deliveries up to a problem, and the problem."""
    made = list[Delivery]()
    try:
        made.extend(make_deliveries(progress, rows, SOURCE))
    except NotDelivered as error:
        return made, str(error)
    return made, ""


# Headers and signatures.

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
VECTOR = Delivery("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', Progress(1))
AT_S = 1_614_265_330
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
"""Published with the libraries of Standard Webhooks, for this secret, id, time and payload."""

KEYS = st.binary(min_size=24, max_size=64)
DELIVERIES = st.builds(Delivery, st.text("abcdef-0123456789", min_size=1), st.binary(), st.just(Progress(1)))


def test_signature_is_that_of_the_public_vector() -> None:
    assert VECTOR.sign(parse_secrets(SECRET), AT_S) == {
        "Content-Type": "application/cloudevents+json",
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": SIGNATURE,
    }


def test_two_secrets_give_two_signatures_in_their_order() -> None:
    other = f"whsec_{base64.b64encode(bytes(24)).decode()}"
    [first, second] = (
        VECTOR.sign(parse_secrets(each), AT_S)["webhook-signature"] for each in (SECRET, other)
    )
    assert first == SIGNATURE != second
    both = VECTOR.sign(parse_secrets(f"{SECRET}\n{other}\n"), AT_S)
    assert both["webhook-signature"] == f"{first} {second}"


@PLAIN
@given(DELIVERIES, st.lists(KEYS, min_size=1, max_size=2), st.integers(0, 2**40))
def test_each_key_verifies_its_signature(delivery: Delivery, keys: list[bytes], at_s: int) -> None:
    headers = delivery.sign(keys, at_s)
    signatures = headers["webhook-signature"].split(" ")
    for key, signature in zip(keys, signatures, strict=True):
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + delivery.body
        digest = hmac.new(key, signed, hashlib.sha256).digest()
        assert signature == f"v1,{base64.b64encode(digest).decode()}"


@PLAIN
@given(DELIVERIES, KEYS, KEYS, st.integers(0, 2**40))
def test_signature_depends_on_all_that_is_signed(
    delivery: Delivery, key: bytes, other: bytes, at_s: int
) -> None:
    usual = delivery.sign([key], at_s)["webhook-signature"]
    changed = (
        replace(delivery, id=f"{delivery.id}0").sign([key], at_s),
        replace(delivery, body=delivery.body + b" ").sign([key], at_s),
        delivery.sign([key], at_s + 1),
        delivery.sign([key + b"1"], at_s),
        delivery.sign([other], at_s),
    )
    same = [each for each in changed if each["webhook-signature"] == usual]
    assert same == ([changed[-1]] if key == other else [])


def test_headers_of_events_are_ascii_and_have_no_secret() -> None:
    for delivery in deliver(Progress(0), ROWS):
        headers = delivery.sign(parse_secrets(SECRET), AT_S)
        assert all(value.isascii() and value.isprintable() for value in headers.values())
        assert "." not in headers["webhook-id"]  # a dot ends the id in what is signed
        assert not any(SECRET[6:] in value for value in headers.values())


# Answers, and pauses between attempts.


def test_only_success_acknowledges() -> None:
    problems = {status: describe_status(status) for status in range(100, 600)}
    assert [status for status, problem in problems.items() if problem is None] == list(range(200, 300))
    for status, problem in problems.items():
        assert problem is None or problem.startswith(f"it answered {status}")
        assert ("redirects are not followed" in (problem or "")) == (300 <= status < 400)


def test_pauses_double_up_to_a_minute() -> None:
    assert [back_off_s(failures) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


@PLAIN
@given(st.integers(1, 10**9))
def test_pause_grows_and_is_a_minute_at_most(failures: int) -> None:
    assert 1 <= back_off_s(failures) <= back_off_s(failures + 1) <= LONGEST_BACK_OFF_S == 60
    assert back_off_s(failures + 1) == min(2 * back_off_s(failures), 60)
