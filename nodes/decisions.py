"""The decisions of a node: its next action, and the completion of its commands for other nodes.

Pure but for new ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from types import NoneType
from typing import Protocol

from msgspec import UNSET, UnsetType, structs

from events.clock import add_seconds, uuid7
from events.commands import Condition, Record
from events.errors import EpochOver
from events.jobcommands import RequestLoad
from events.jobs import INSUFFICIENT_MEMORY, POLICY_DIFFERS, Job
from events.models import RELOADS, LoadedModel, Model, ModelState
from events.serving import AdmittedBytes, Serving
from events.state import State
from events.statements import load_statement
from events.types import (
    SYSTEM,
    Cause,
    Draft,
    ModelLoaded,
    UnloadRequested,
    UnloadStarted,
    contents_of,
    digest_of,
)
from features.nodes.commands import NodeCurrent
from features.nodes.facts import NodeSignature
from features.nodes.register import Node, find_placer
from nodes.copies import find_steps
from nodes.placement import (
    NodeHints,
    NodeView,
    draft_placement,
    find_node_for_model,
    find_reload_rules,
    find_share,
    list_held,
    place_elsewhere,
    place_loads,
)
from nodes.spread import Spread, measure_copy
from runtime.consumer.running import RunningLoad
from runtime.elsewhere import Elsewhere, SystemCommand
from runtime.errors import ModelNotLoaded
from runtime.scheduler import actions
from runtime.scheduler.actions import Decision, RecordFact
from runtime.scheduler.scheduler import back_off_s, decide
from runtime.scheduler.view import SchedulerView

NO_EPOCH = 0
"""Epoch of a node between two: nothing is its own, since real ones begin at 1."""


class NodeAway(ModelNotLoaded):
    """This node has not renewed its lease: its models may be loaded at other nodes; ask one of them."""


_AFTER_PLACEMENTS = (
    actions.StartLoad,
    actions.ChangeSettings,
    actions.UnloadForReplacement,
    actions.UnloadAutomatically,
    NoneType,
)
"""Actions before which a load is placed: the others end something, or bring a lost model back."""


class Standing(Protocol):
    """A node's knowledge of its membership and of the others (`nodes.membership`)."""

    @property
    def epoch(self) -> int | None:
        """Its present epoch; None between two."""

    @property
    def peers(self) -> Mapping[str, NodeHints]:
        """The hints of all nodes."""

    @property
    def may_serve(self) -> bool:
        """Whether it may answer inferences."""

    @property
    def late(self) -> Collection[str]:
        """The nodes that did not renew their leases in time."""


class Signing(Protocol):
    """Signatures of nodes: of persons' statements, and of loads under rules (`nodes.peers`)."""

    def sign(self, statement: bytes) -> NodeSignature:
        """Sign a statement with this node's key."""

    def is_signed(self, statement: bytes, signature: NodeSignature, state: State) -> bool:
        """Whether a node that may sign, or might before it left, has signed it; called in a thread."""


class NodePlacement(Elsewhere):
    """The placement of a node, for the consumer and the router of its server.

    Args:
        node_id: this node.
        standing: of it.
        signing: signs its loads, and verifies signatures of others.
        untrusted: returns the nodes whose joins are not signed with a key that the nodes share.

    Attributes:
        spread: this node's knowledge of copies at other nodes.
    """

    name: str

    def __init__(
        self,
        node_id: str,
        standing: Standing,
        signing: Signing,
        untrusted: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self.name = node_id
        self._standing = standing
        self._signing = signing
        self._untrusted = untrusted
        self.spread = Spread()

    @property
    def _epoch(self) -> int:
        return self._standing.epoch or NO_EPOCH

    def servers(self, state: State) -> object:
        return state.registers.nodes

    def find_epoch(self, state: State) -> tuple[str, tuple[Condition, ...]]:
        node = state.registers.nodes.get(self.name)
        if node is None or not node.is_present:
            raise EpochOver
        return node.epoch_name, (NodeCurrent(node.id, node.epoch),)

    def share(self, state: State) -> State:
        return find_share(state, self.name, self._epoch, self._untrusted())

    def decide(self, view: SchedulerView) -> Decision:
        """Return the next action of this node; in an epoch that is over, only the end of its workers.

        Outcomes and reloads go first, then placements, then what starts here. What has no room here goes
        elsewhere before a model is evicted for it.
        """
        node = view.state.registers.nodes.get(self.name)
        if node is None or not node.is_present or node.epoch != self._epoch:
            return Decision()
        everything = NodeView(view, node, self._standing.peers, self._untrusted())
        here = everything.hold(list_held(everything))
        decision = decide(here)
        if isinstance(decision.action, _AFTER_PLACEMENTS):
            placing = _fail_outdated_reload(here, decision) or _place_next(here, decision)
            if placing.action is not None or decision.action is None:
                return placing
            decision = replace(decision, unestimated=placing.unestimated)
        return replace(decision, action=_avoid_here(here, decision.action))

    def complete(self, command: SystemCommand, state: State) -> SystemCommand:
        """Add the epoch that it rests on, this node to its facts, and the unload of a load elsewhere.

        A reload is requested by rules that a node has, and loads are signed.
        """
        conditions = (*command.conditions, NodeCurrent(self.name, self._epoch))
        if isinstance(command, RequestLoad):
            model, untrusted = state.models.get(command.model_id), self._untrusted()
            before = None if model is None else model.find_reloadable(command.version)
            rules = None
            if model is not None and before is not None:
                rules = find_reload_rules(state, self.name, untrusted, LoadedModel(model, before))
            return replace(command, policy=rules or UNSET, conditions=conditions)
        if not isinstance(command, Record):
            return replace(command, conditions=conditions)
        unloads = chain.from_iterable(self._draft_unloads(draft, state) for draft in command.drafts)
        drafts = [*command.drafts, *unloads]
        named = tuple(self._sign(name_node(draft, self.name), state) for draft in drafts)
        return replace(command, drafts=named, conditions=conditions)

    def _draft_unloads(self, draft: Draft, state: State) -> Iterator[Draft]:
        """Yield the unload requests that a fact implies: those nodes unload their copies.

        A load replaces all others where one copy is wanted, and an unload ends the copies, too.
        """
        model, job = state.models.get(draft.model_id or ""), state.unended_job(draft.job_id)
        if model is None or model.phase is not ModelState.LOADED or job is None:
            return
        match draft.data:
            case ModelLoaded() if job.cause is not Cause.COPY and job.load and job.load.wanted_copies == 1:
                others = [each for each in model.servings if each.server not in (None, self.name)]
                cause = Cause.DRAIN if job.cause is Cause.DRAIN else Cause.SWAP
            case UnloadStarted() if job.id in model.unloads:
                others, cause = list(model.others), Cause.COPY
            case _:
                return
        for each in others:
            data = UnloadRequested(job.forced, each.load_job_id, cause, draft.id, server=each.at)
            worker_id = each.worker_ids[0] if len(each.worker_ids) == 1 else None
            unload_id = uuid7()
            yield Draft(unload_id, data, SYSTEM, unload_id, model.id, each.version, worker_id)

    def _sign(self, draft: Draft, state: State) -> Draft:
        """Return a draft with this node's signature if it is of a load."""
        data, job = draft.data, state.unended_job(draft.job_id)
        if not isinstance(data, ModelLoaded) or job is None or job.version is None:
            return draft
        passed = AdmittedBytes(digest_of(contents_of(data.files)), job.id, job.version, data.evidence)
        signature = self._signing.sign(load_statement(job.model_id, passed))
        return structs.replace(draft, data=structs.replace(data, server_signature=signature))

    def is_signed(self, statement: bytes, signature: NodeSignature | UnsetType, state: State) -> bool:
        """Whether a node that may sign has signed it: the database's role may append what none has."""
        return signature is not UNSET and self._signing.is_signed(statement, signature, state)

    def locate(self, model: Model, state: State) -> str | None:
        """Return the name of the other node, present and not untrusted, at which a model is loaded."""
        nodes = list_copies(model, state, self._untrusted())
        names = (node.id for node, serving in nodes if serving is model.serving)
        return next((name for name in names if name != self.name), None)

    def view(self, model: Model) -> Model:
        """Return a model as this node sees it: serving from its own copy, if it has one."""
        return model.view_at(self.name)

    def choose(
        self,
        model: Model,
        state: State,
        version: int | None,
        own: RunningLoad | None = None,
        *,
        tried: Node | None = None,
    ) -> str | None:
        """Return the node of another copy that is to answer; None if there is none, or the copy here is to.

        It is not the one that was tried, as it was then: without one, this one.
        """
        hints, without = self._standing.peers, tried or state.registers.nodes.get(self.name)
        others = {
            node.id: hints[node.id].loads.get(model.id) if node.id in hints else None
            for node, serving in list_copies(model, state, self._untrusted())
            if version in (None, serving.version)
            and (without is None or (node.id, node.epoch) != (without.id, without.epoch))
        }
        figures = None if own is None else measure_copy(own)
        return self.spread.choose(model.id, figures, others, self._standing.late, time.monotonic())

    def list_addresses(self, model: Model, state: State) -> list[str]:
        """Return the addresses of the nodes that have copies of a model, as far as they are reached."""
        late, now_s = self._standing.late, time.monotonic()
        nodes = [node for node, _ in list_copies(model, state, self._untrusted()) if node.id not in late]
        return [node.address for node in nodes if not self.spread.is_avoided(node.id, now_s)]

    def refusal(self) -> NodeAway | None:
        """Return why this node may not answer inferences, or None."""
        return None if self._standing.may_serve else NodeAway()


def list_copies(model: Model, state: State, untrusted: Collection[str]) -> list[tuple[Node, Serving]]:
    """Return the loads that a model serves from, each with its node that is present and not untrusted."""
    servings = model.servings if model.phase is ModelState.LOADED else ()
    nodes = ((state.registers.nodes.get(each.server or ""), each) for each in servings)
    return [
        (node, each)
        for node, each in nodes
        if node is not None and node.is_present and node.id not in untrusted
    ]


def name_node(draft: Draft, node_id: str) -> Draft:
    """Return a draft with this node, if its type has one and it names none: its processes are here."""
    if getattr(draft.data, "server", None) is not UNSET:
        return draft
    return structs.replace(draft, data=structs.replace(draft.data, server=node_id))


def _avoid_here(view: NodeView, action: actions.Action | None) -> actions.Action | None:
    """Place a load elsewhere that would fail here for want of memory, or cost a model its place.

    Of a model with copies, only the copy here is evicted.
    """
    elsewhere: RecordFact | None = None
    match action:
        case actions.FailLoad(job, code) if code == INSUFFICIENT_MEMORY:
            elsewhere = place_elsewhere(view, job, needs_budget_only=True)
        case actions.UnloadAutomatically(_, Cause.EVICTION, job_id):
            needing = view.own.unended_job(job_id)
            elsewhere = None if needing is None else place_elsewhere(view, needing)
    match action:
        case actions.UnloadAutomatically(loaded, Cause.EVICTION) if not elsewhere and loaded.model.copies:
            return replace(action, cause=Cause.COPY)
    return elsewhere or action


def _fail_outdated_reload(view: NodeView, decision: Decision) -> Decision | None:
    """Fail a reload by rules that no node has any more: the next one is requested by others."""
    for job in view.unended:
        reason = view.share.held.get(job.id, "")
        if job.cause in RELOADS and reason.startswith(POLICY_DIFFERS):
            return replace(decision, action=actions.FailLoad(job, POLICY_DIFFERS, f"it waited for {reason}"))
    return None


def _place_next(view: NodeView, decision: Decision) -> Decision:
    """Return the decision with a placement, a move, or a step of copies; without one it has no action.

    Placements go first, since many waiting loads take long to decide on. A load whose place is here is
    estimated before, and starts with its placement: so what starts here without delay takes one append, and
    the estimate may still change its place.
    """
    unestimated = list(decision.unestimated)
    action: actions.Action | None = None
    for job, chosen in place_loads(view):
        placement = draft_placement(view, job, chosen)
        if chosen.node == view.node:
            if job.id not in view.observations.estimates:
                unestimated.append(job)
                continue
            others = {job_id: reason for job_id, reason in view.share.held.items() if job_id != job.id}
            match decide(view.hold(others)).action:
                case actions.StartLoad(Job(id=job.id)) as start:
                    action = replace(start, before=placement)
                    break
            if job.id in view.observations.estimating:
                continue
        action = placement
        break
    if action is None:
        elsewhere = (place_elsewhere(view, job) for job in decision.without_room)
        action = next(filter(None, elsewhere), None)
    due_later = list[str]()
    if action is None:
        is_placer = find_placer(view.state.registers.nodes, view.untrusted) == view.node.id
        for due_at, step in chain(_find_moves(view), find_steps(view) if is_placer else ()):
            if due_at <= view.now:
                action = step
                break
            due_later.append(due_at)
    wake_at = min(filter(None, [decision.wake_at, *due_later]), default=None)
    return replace(decision, action=action, wake_at=wake_at, unestimated=tuple(unestimated))


def _find_moves(view: NodeView) -> list[tuple[str, actions.Action]]:
    """Return the moves of models of this node to others, since it is being drained, and when they are due."""
    if view.node.takes_loads:
        return []
    loaded = [each for model in view.own.models if (each := view.find_loaded(model)) is not None]
    return [
        (_move_at(view, each), actions.RequestReload(each, Cause.DRAIN))
        for each in loaded
        if not (each.model.loads or each.model.unloads or each.model.copies)
        and each.serving.parameters.wanted_copies == 1
        and find_node_for_model(view, each) is not None
    ]


def _move_at(view: NodeView, loaded: LoadedModel) -> str:
    retries = loaded.model.retries
    if retries is None:
        return view.now
    since = view.to_monotonic(retries.last_at, loaded.model.back_off_position)
    return add_seconds(since, back_off_s(retries.count))
