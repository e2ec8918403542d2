"""The decisions of a node: its next action, and what the others have to know of what it appends.

Pure but for new ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import NoneType
from typing import Protocol

from msgspec import UNSET, UnsetType, structs

from events.approvals import answer_statement, load_statement
from events.clock import add_seconds, uuid7
from events.commands import Record, RequestLoad
from events.jobs import INSUFFICIENT_MEMORY, POLICY_DIFFERS, ApprovalAnswer, Job
from events.models import RELOADS, AdmittedBytes, LoadedModel, Model, ModelState
from events.nodes import Node
from events.registercommands import NodeCurrent
from events.state import State
from events.types import (
    SYSTEM,
    ApprovalBypassed,
    Cause,
    Draft,
    ModelLoaded,
    NodeSignature,
    UnloadRequested,
    contents_of,
    digest_of,
)
from nodes.placement import (
    NodeHints,
    NodeView,
    PlacementStrategy,
    draft_placement,
    find_node_for_model,
    find_reload_rules,
    find_share,
    list_held,
    place_elsewhere,
    place_loads,
)
from runtime.router import Elsewhere, ModelNotLoaded
from runtime.scheduler import actions
from runtime.scheduler.actions import Decision, RecordFact
from runtime.scheduler.placement import Placement, SystemCommand
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


class Signing(Protocol):
    """What nodes sign of approvals, and of loads under rules (`nodes.peers`)."""

    def sign(self, statement: bytes) -> NodeSignature:
        """Sign a statement with this node's key."""

    def is_signed(self, statement: bytes, signature: NodeSignature, state: State) -> bool:
        """Whether a trusted node, which may have left since, has signed a statement; called in a thread."""


class NodePlacement(Placement, Elsewhere):
    """The placement of a node, for the consumer and the router of its server.

    Args:
        node_id: this node.
        standing: of it.
        signing: signs what it says of approvals, and verifies what others say.
        strategy: how loads are distributed over the nodes.
        untrusted: returns the nodes whose joins are not signed with a key that the nodes share.
    """

    def __init__(
        self,
        node_id: str,
        standing: Standing,
        signing: Signing,
        strategy: PlacementStrategy = PlacementStrategy.SPREAD,
        untrusted: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._node_id = node_id
        self._standing = standing
        self._signing = signing
        self._strategy = strategy
        self._untrusted = untrusted

    @property
    def _epoch(self) -> int:
        return self._standing.epoch or NO_EPOCH

    def share(self, state: State) -> State:
        return find_share(state, self._node_id, self._epoch, self._untrusted())

    def decide(self, view: SchedulerView) -> Decision:
        """Return the next action of this node; none in an epoch that is over, which only ends its workers.

        Outcomes and reloads go first, then placements, then what starts here. What has no room here goes
        elsewhere before a model is evicted for it.
        """
        node = view.state.registers.nodes.get(self._node_id)
        if node is None or not node.is_present or node.epoch != self._epoch:
            return Decision()
        everything = NodeView(view, node, self._standing.peers, self._untrusted(), self._strategy)
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

        A reload is requested by rules that a node has, and facts about approval are signed.
        """
        conditions = (*command.conditions, NodeCurrent(self._node_id, self._epoch))
        if isinstance(command, RequestLoad):
            model, untrusted = state.models.get(command.model_id), self._untrusted()
            lost = None if model is None else model.loaded
            rules = None if lost is None else find_reload_rules(state, self._node_id, untrusted, lost)
            return replace(command, policy=rules or UNSET, conditions=conditions)
        if not isinstance(command, Record):
            return replace(command, conditions=conditions)
        drafts = [*command.drafts]
        if not any(isinstance(draft.data, UnloadRequested) for draft in drafts):
            loaded = (draft for draft in command.drafts if isinstance(draft.data, ModelLoaded))
            drafts += [unload for draft in loaded if (unload := draft_unload_elsewhere(draft, state))]
        named = tuple(self._sign(name_node(draft, self._node_id), state) for draft in drafts)
        return replace(command, drafts=named, conditions=conditions)

    def _sign(self, draft: Draft, state: State) -> Draft:
        """Return a draft with this node's signature if it is of a load, or of a bypassed approval."""
        statement = draft_statement(draft, state)
        if statement is None:
            return draft
        signature = self._signing.sign(statement)
        return structs.replace(draft, data=structs.replace(draft.data, node_signature=signature))

    def is_signed(self, statement: bytes, signature: NodeSignature | UnsetType, state: State) -> bool:
        """Whether a trusted node has signed a statement: the database's role may append what none has."""
        return signature is not UNSET and self._signing.is_signed(statement, signature, state)

    def locate(self, model: Model, state: State) -> str | None:
        """Return the name of the other node at which a model is loaded, if that is present and trusted."""
        node = find_node(model, state, self._untrusted())
        return None if node is None or node.id == self._node_id else node.id

    def refusal(self) -> NodeAway | None:
        """Return why this node may not answer inferences; None if it may."""
        return None if self._standing.may_serve else NodeAway()


def find_node(model: Model, state: State, untrusted: Collection[str]) -> Node | None:
    """Return the present, trusted node at which a model is loaded."""
    serving = model.serving if model.phase is ModelState.LOADED else None
    node = None if serving is None or serving.node_id is None else state.registers.nodes.get(serving.node_id)
    return None if node is None or not node.is_present or node.id in untrusted else node


def draft_statement(draft: Draft, state: State) -> bytes | None:
    """Return what a node signs of a fact: a load, or a bypassed approval; None of any other."""
    data, job = draft.data, state.unended_job(draft.job_id)
    if job is None or job.version is None:
        return None
    if isinstance(data, ApprovalBypassed):
        return answer_statement(job, data.digest, data.rule, ApprovalAnswer(draft.actor, data.reason))
    if not isinstance(data, ModelLoaded):
        return None
    digest = digest_of(contents_of(data.files))
    passed = AdmittedBytes(digest, job.id, job.version, data.signature, data.approval)
    return load_statement(job.model_id, passed)


def draft_unload_elsewhere(loaded: Draft, state: State) -> Draft | None:
    """Return the unload request of a load at another node that this one replaces: that node unloads it."""
    model, job = state.models.get(loaded.model_id or ""), state.unended_job(loaded.job_id)
    old = model.loaded if model is not None and model.phase is ModelState.LOADED else None
    if old is None or job is None or old.serving.node_id is None:
        return None
    request = UnloadRequested(
        force=False,
        load_job_id=old.serving.load_job_id,
        cause=Cause.DRAIN if job.cause is Cause.DRAIN else Cause.SWAP,
        cause_event_id=loaded.id,
        node_id=old.serving.node,
    )
    worker_ids, unload_id = old.serving.worker_ids, uuid7()
    worker_id = worker_ids[0] if len(worker_ids) == 1 else None
    return Draft(unload_id, request, SYSTEM, unload_id, old.id, old.serving.version, worker_id)


def name_node(draft: Draft, node_id: str) -> Draft:
    """Return a draft with this node, if its type has one and it names none: its processes are here."""
    if getattr(draft.data, "node_id", None) is not UNSET:
        return draft
    return structs.replace(draft, data=structs.replace(draft.data, node_id=node_id))


def _avoid_here(view: NodeView, action: actions.Action | None) -> actions.Action | None:
    """Place a load elsewhere that would fail here for want of memory, or cost a model its place."""
    elsewhere: RecordFact | None = None
    match action:
        case actions.FailLoad(job, code) if code == INSUFFICIENT_MEMORY:
            elsewhere = place_elsewhere(view, job, needs_budget_only=True)
        case actions.UnloadAutomatically(_, Cause.EVICTION, job_id):
            needing = view.own.unended_job(job_id)
            elsewhere = None if needing is None else place_elsewhere(view, needing)
    return elsewhere or action


def _fail_outdated_reload(view: NodeView, decision: Decision) -> Decision | None:
    """Fail a reload by rules that no node has any more: the next one is requested by others."""
    for job in view.unended:
        reason = view.share.held.get(job.id, "")
        if job.cause in RELOADS and reason.startswith(POLICY_DIFFERS):
            return replace(decision, action=actions.FailLoad(job, POLICY_DIFFERS, f"it waited for {reason}"))
    return None


def _place_next(view: NodeView, decision: Decision) -> Decision:
    """Return the decision with a move or a placement; without one it has no action.

    A load whose place is here is estimated before, and starts with its placement: so what starts here without
    delay takes one append, and the estimate may still change its place.
    """
    moves = _find_moves(view)
    for model_id, move_at in moves.items():
        loaded = view.find_loaded(model_id)
        if loaded is not None and move_at <= view.now:
            return replace(decision, action=actions.RequestReload(loaded, Cause.DRAIN))
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
                case actions.StartLoad(Job(id=job.id)):
                    action = actions.StartLoad(job, placement)
                    break
            if job.id in view.observations.estimating:
                continue
        action = placement
        break
    if action is None:
        elsewhere = (place_elsewhere(view, job) for job in decision.without_room)
        action = next(filter(None, elsewhere), None)
    wake_at = min(filter(None, [decision.wake_at, *moves.values()]), default=None)
    return replace(decision, action=action, wake_at=wake_at, unestimated=tuple(unestimated))


def _find_moves(view: NodeView) -> dict[str, str]:
    """Return the models of this node that move to others, since it is being drained, and when."""
    if view.node.takes_loads:
        return {}
    loaded = [each for model in view.own.models if (each := view.find_loaded(model)) is not None]
    return {
        each.id: _move_at(view, each)
        for each in loaded
        if not (each.model.loads or each.model.unloads)
        and find_node_for_model(view, each.model, each.serving) is not None
    }


def _move_at(view: NodeView, loaded: LoadedModel) -> str:
    retries = loaded.model.retries
    if retries is None:
        return view.now
    since = view.to_monotonic(retries.last_at, loaded.model.back_off_position)
    return add_seconds(since, back_off_s(retries.count))
