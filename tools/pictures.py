"""The documentation's pictures, each a function that returns an SVG file's text."""

from collections.abc import Sequence
from hashlib import sha256

from events.models import TRANSITIONS, ModelState, Trigger
from tools.drawing import Picture, Point, Rectangle


def pictures() -> dict[str, str]:
    """Return each picture's text by its path in the tree."""
    made = {
        "processes": process_tree(),
        "swaps": swaps(),
        "states": model_states(),
        "chain": hash_chain(),
        "budget": memory_budget(),
    }
    return {f"docs/images/{name}.svg": picture.svg() for name, picture in made.items()}


def process_tree() -> Picture:
    """Return who starts whom, and what goes between the processes."""
    picture = Picture(
        "The processes of loadledger",
        """Clients talk HTTP to the server process, which writes the ledger and starts the fork server. The
        fork server forks one worker for each instance of a loaded model, and one that waits for the next
        load. Inferences go between the server and a worker over a socket and shared memory, past the fork
        server.""",
        760,
        330,
    )
    picture.box((20, 60, 120, 56), ("clients", "any language"))
    picture.box((230, 40, 210, 96), ("server", "HTTP, tokens, scheduler,", "the ledger's only writer"), "new")
    picture.box((20, 200, 120, 56), ("ledger.db", "SQLite, in data/"))
    picture.box((230, 200, 210, 76), ("fork server", "one thread; has imported", "ONNX Runtime"), "new")
    workers = (
        ("worker", "digits, version 2"),
        ("worker", "ranker, instance 1"),
        ("worker", "ranker, instance 2"),
    )
    for index, (name, what) in enumerate(workers):
        top = 28 + index * 66
        picture.box((555, top, 185, 50), (name, what), "good")
        picture.arrow((440, 238), (495, 238), (495, top + 34), (554, top + 34))
        picture.line((440, 70), (520, 70), (520, top + 16), (554, top + 16), style="dashed")
    picture.arrow((140, 88), (229, 88))
    picture.words(185, 76, "HTTP", "quiet", anchor="middle")
    picture.arrow((260, 137), (260, 166), (80, 166), (80, 199))
    picture.words(170, 154, "each event", "quiet", anchor="middle")
    picture.arrow((335, 137), (335, 199))
    picture.words(345, 168, "starts", "quiet")
    picture.words(467, 226, "forks", "quiet", anchor="middle")
    picture.line((20, 306), (50, 306), style="dashed")
    picture.words(58, 306, "tensors: a socket, and memory that the server shares with one worker", "quiet")
    return picture


def swaps() -> Picture:
    """Return both strategies of a swap on one time axis."""
    picture = Picture(
        "A swap beside and a swap in place",
        """Beside: version 2 loads while version 1 serves; one step moves new requests to version 2; version
        1 answers what it has, and ends. No request fails, and both versions take memory for a while. In
        place: version 1 answers what it has and ends first, then version 2 loads. Until it is loaded,
        requests are answered 503 with Retry-After; the memory of one version suffices.""",
        760,
        420,
    )
    _strategy(picture, 20, "beside (the default)")
    picture.box((130, 52, 290, 28), ("loaded",), "good")
    picture.box((420, 52, 80, 28), ("drains",), "wait")
    picture.box((250, 88, 170, 28), ("loads, warms up",), "wait")
    picture.box((420, 88, 310, 28), ("loaded",), "good")
    picture.box((130, 124, 290, 28), ("version 1",))
    picture.box((420, 124, 310, 28), ("version 2",), "new")
    picture.box((130, 160, 120, 28), ("one version",))
    picture.box((250, 160, 250, 28), ("two versions",), "wait")
    picture.box((500, 160, 230, 28), ("one version",))
    picture.line((420, 44), (420, 156), style="dashed")
    picture.words(426, 32, "takes over in one step", "quiet")

    _strategy(picture, 210, "in place")
    picture.box((130, 242, 120, 28), ("loaded",), "good")
    picture.box((250, 242, 80, 28), ("drains",), "wait")
    picture.box((330, 278, 170, 28), ("loads, warms up",), "wait")
    picture.box((500, 278, 230, 28), ("loaded",), "good")
    picture.box((130, 314, 120, 28), ("version 1",))
    picture.box((250, 314, 250, 28), ("nobody: 503, Retry-After",), "bad")
    picture.box((500, 314, 230, 28), ("version 2",), "new")
    picture.box((130, 350, 200, 28), ("one version",))
    picture.box((330, 350, 400, 28), ("one version",))
    picture.arrow((130, 398), (730, 398))
    picture.words(20, 398, "time", "quiet")
    return picture


def _strategy(picture: Picture, top: float, name: str) -> None:
    picture.words(20, top + 12, name, "strong")
    for index, row in enumerate(("version 1", "version 2", "who answers", "memory")):
        picture.words(20, top + 46 + index * 36, row, "quiet")


STATES: dict[ModelState, tuple[Rectangle, str]] = {
    ModelState.UNLOADING: ((300, 30, 140, 44), "wait"),
    ModelState.UNLOADED: ((30, 130, 140, 44), "box"),
    ModelState.LOADING: ((300, 130, 140, 44), "wait"),
    ModelState.LOADED: ((560, 130, 140, 44), "good"),
    ModelState.FAILED: ((300, 240, 140, 44), "bad"),
    ModelState.LOST: ((560, 240, 140, 44), "bad"),
}

MOVES: tuple[tuple[ModelState, Trigger, tuple[Point, ...], Point, str, tuple[str, ...]], ...] = (
    (ModelState.UNLOADED, Trigger.LOAD_STARTED, ((170, 152), (299, 152)), (235, 140), "middle", ()),
    (ModelState.LOADING, Trigger.LOADED, ((440, 152), (559, 152)), (500, 140), "middle", ()),
    (ModelState.LOADED, Trigger.UNLOAD_STARTED, ((630, 130), (630, 52), (441, 52)), (535, 40), "middle", ()),
    (ModelState.UNLOADING, Trigger.UNLOADED, ((300, 52), (100, 52), (100, 129)), (200, 40), "middle", ()),
    (ModelState.LOADING, Trigger.FAILED, ((335, 174), (335, 239)), (325, 207), "end", ()),
    (
        *(ModelState.FAILED, Trigger.LOAD_STARTED, ((405, 240), (405, 175))),
        *((415, 207), "start", ("you load", "it again")),
    ),
    (
        *(ModelState.LOADED, Trigger.ENDED, ((630, 174), (630, 239))),
        *((640, 199), "start", ("its last worker", "or the server", "ends")),
    ),
    (
        *(ModelState.LOST, Trigger.LOAD_STARTED, ((560, 252), (500, 252), (500, 165), (441, 165))),
        *((510, 209), "start", ("the server", "loads it again")),
    ),
    (ModelState.LOST, Trigger.FAILED, ((560, 273), (441, 273)), (500, 286), "middle", ("it gives up",)),
)
"""The moves of the life of a model that the picture has: the state before, what moves it, the arrow, and its
words with their place and anchor; without words, those of the trigger."""


def model_states() -> Picture:
    """Return the states of a model and the events between them."""
    picture = Picture(
        "The states of a model",
        """An unloaded model is loading from LoadStarted on, and loaded at ModelLoaded, or failed at
        LoadFailed; a failed model can be loaded again. UnloadStarted makes a loaded model unloading,
        ModelUnloaded unloaded. When its last worker dies or the server ends, a loaded model is lost; the
        server loads it again by itself, which ends in loaded, or in failed when it gives up.""",
        760,
        340,
    )
    for state, (place, looks) in STATES.items():
        picture.box(place, (state,), looks)
    for before, trigger, points, (x, y), anchor, lines in MOVES:
        _check_ends(before, TRANSITIONS[trigger][before], points)
        picture.arrow(*points)
        for index, line in enumerate(lines or (trigger,)):
            picture.words(x, y + index * 16, line, "quiet", anchor=anchor)
    picture.words(
        30, 312, "A model stays loaded while another version of it loads beside the one that serves.", "quiet"
    )
    return picture


def _check_ends(before: ModelState, after: ModelState, points: Sequence[Point]) -> None:
    """Refuse an arrow that does not go from one state to the other, as the table says."""
    for state, (x, y) in ((before, points[0]), (after, points[-1])):
        left, top, width, height = STATES[state][0]
        if not (left - 1 <= x <= left + width + 1 and top - 1 <= y <= top + height + 1):
            raise ValueError(f"the arrow at {x}, {y} does not touch the state {state}")


EVENTS = (
    ("LoadRequested", "by alice"),
    ("LoadStarted", "attempt 1"),
    ("ModelLoaded", "model.onnx 448173…"),
    ("UnloadRequested", "by alice"),
)
"""What the picture of the chain shows as bodies; its hashes are theirs."""

CHANGED = (("LoadRequested", "by bob"), *EVENTS[1:])
KEPT = 3
"""The position of the head that somebody keeps."""


def hash_chain() -> Picture:
    """Return the chain of hashes, and how a kept head finds a changed event."""
    picture = Picture(
        "The hash chain and a kept head",
        """Each event's hash covers its body and the hash before it. Somebody outside keeps the head: a
        position and its hash. If an event is changed later and all hashes are recomputed, the chain holds
        again, but at the kept position it has another hash, so the verification with that head fails.""",
        760,
        370,
    )
    kept = _chain(picture, 20, "the ledger: hash = SHA-256(previous hash, body)", EVENTS)
    other = _chain(picture, 250, "event 1 changed, all hashes computed again", CHANGED)
    picture.box((379, 156, 176, 56), ("kept elsewhere", f"head {KEPT}:{kept}…"), "new")
    picture.arrow((467, 156), (467, 117))
    picture.words(477, 137, "the same hash: verified", "quiet")
    picture.arrow((467, 212), (467, 277), style="bad")
    picture.words(477, 233, f"{other}… is another hash: refused", "quiet")
    return picture


def _chain(picture: Picture, top: float, name: str, bodies: tuple[tuple[str, str], ...]) -> str:
    """Draw a chain; return the beginning of the hash at the kept position."""
    picture.words(20, top, name, "strong")
    digest, kept = "", ""
    for index, (kind, detail) in enumerate(bodies):
        digest = _digest(digest, kind + detail)
        left = 20 + index * 181
        looks = "bad" if bodies[index] != EVENTS[index] else "wait" if bodies != EVENTS else "box"
        picture.box((left, top + 28, 166, 68), (f"{index + 1} {kind}", detail, f"hash {digest[:6]}…"), looks)
        if index:
            picture.arrow((left - 15, top + 62), (left - 1, top + 62))
        if index + 1 == KEPT:
            kept = digest[:6]
    return kept


def _digest(before: str, body: str) -> str:
    return sha256(f"{before}{body}".encode()).hexdigest()


GIGABYTE = 72
"""Pixels; ten of them fill the width."""


def memory_budget() -> Picture:
    """Return what the memory budget counts."""
    picture = Picture(
        "The memory budget",
        """An example: of 10 GB of the machine the budget is 8 GB. A loaded model counts with what its
        workers use, a loading one with its reservation; 1.5 GB are free. A load that is estimated to need
        2.5 GB waits, unless an idle model of 1.5 GB may be evicted. The server itself and
        memory shared for tensors lie beside the budget.""",
        760,
        290,
    )
    _share(picture, (20, 24), 10, ("the machine, or the container: 10 GB",), "box")
    _share(picture, (20, 74), 8, ("the budget, --memory-budget: 8 GB",), "new")
    picture.box((596, 74, 144, 106), ("beside it", "server, memory", "shared for tensors"))
    left = 20.0
    for size, lines, kind in (
        (3, ("ranker, busy", "3 GB in use"), "good"),
        (2, ("captioner loads", "2 GB reserved"), "wait"),
        (1.5, ("digits, idle", "1.5 GB in use"), "good"),
        (1.5, ("free", "1.5 GB"), "box"),
    ):
        _share(picture, (left, 124), size, lines, kind)
        left += size * GIGABYTE
    _share(picture, (380, 204), 2.5, ("detector waits", "estimate: 2.5 GB"), "new")
    picture.words(20, 216, "1.5 GB are free, so the load of detector waits,", "quiet")
    picture.words(20, 234, "or, with --evict idle, digits is unloaded for it.", "quiet")
    picture.words(
        20,
        270,
        "A load's estimate is reserved before its worker starts, and corrected by measurement.",
        "quiet",
    )
    return picture


def _share(picture: Picture, at: Point, gigabytes: float, lines: tuple[str, ...], kind: str) -> None:
    left, top = at
    picture.box((left, top, gigabytes * GIGABYTE, 56 if len(lines) > 1 else 40), lines, kind)
