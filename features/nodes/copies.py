"""Copies: a model may serve from several loads at a time, each at another node. Pure.

`nodes.copies` decides when a model gets another copy, and when one ends.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.serving import Serving
from events.types import Cause


class Servings(Struct, frozen=True, gc=False, kw_only=True):
    """The loads that a model serves from.

    Attributes:
        serving: set in the phases `loaded`, `unloading` and `lost`; `Model.loaded` is the same as a type.
        copies: further loads of a model that is `loaded`, each at another node, the oldest first. During a
            swap some are of the version before. If `serving` ends, one of them takes its place; not stored
            without any.
        target: the load that ended while only copies of the version before it were left: they serve until it
            is loaded again; not stored without one.
    """

    serving: Serving | None = None
    copies: tuple[Serving, ...] | UnsetType = UNSET
    target: Serving | UnsetType = UNSET

    @property
    def servings(self) -> tuple[Serving, ...]:
        """The load that the model serves from, and its copies."""
        return (() if self.serving is None else (self.serving,)) + self.others

    @property
    def others(self) -> tuple[Serving, ...]:
        """The loads that the model serves from beside `serving`; in the gap of a swap, all of them."""
        return self.copies or ()

    @property
    def template(self) -> Serving | None:
        """The load of which its copies are to be."""
        return self.target or self.serving

    def find_serving(self, load_job_id: str | None) -> Serving | None:
        """Return the load of this job, if the model serves from it."""
        return next((each for each in self.servings if each.load_job_id == load_job_id), None)

    def with_load(self, loaded: Serving, cause: Cause, *, is_loaded: bool) -> Self:
        """Return the model once a load of it is loaded, by itself or beside others.

        What was loaded before at the same node, or at all where one copy is wanted, is being unloaded.
        """
        before, is_copy, target = self.servings if is_loaded else (), cause is Cause.COPY, self.target
        elsewhere = tuple(each for each in before if each.server != loaded.server)
        is_first = target and loaded.is_copy_of(target)
        if is_copy and not is_first and before and before[0] in elsewhere:
            return replace(self, copies=(*elsewhere[1:], loaded))
        if before and is_first:
            loaded = replace(loaded, parameters=before[0].parameters.give_settings(loaded.parameters))
        is_kept = is_copy or loaded.parameters.wanted_copies > 1
        return replace(self, serving=loaded, copies=(elsewhere if is_kept else ()) or UNSET, target=UNSET)

    def without(self, load_job_ids: Collection[str | None]) -> Self:
        """Return the model without loads that have ended; if it served from one, it serves from a copy.

        That is the oldest of those that have the bytes of what it served from, or else the oldest of all. It
        has the settings from before. Without a copy the model is returned without `serving`.
        """
        first, target = self.serving, self.target
        left = tuple(each for each in self.others if each.load_job_id not in load_job_ids)
        if first is not None and first.load_job_id in load_job_ids:
            chosen = next((each for each in left if each.is_copy_of(first)), left[0] if left else None)
            left = tuple(each for each in left if each is not chosen)
            if chosen is not None:
                target = target if target or chosen.is_copy_of(first) else first
                chosen = replace(chosen, parameters=first.parameters.give_settings(chosen.parameters))
            first = chosen
        return replace(self, serving=first, copies=left or UNSET, target=target)

    def without_servers(self) -> Self:
        """Return the model after the end of all processes that it served from."""
        return replace(self, serving=self.serving and self.serving.without_server(), copies=UNSET)

    def exchange(self, before: Serving, after: Serving) -> Self:
        """Return the model with one of its loads changed."""
        if before is self.serving:
            return replace(self, serving=after)
        return replace(self, copies=tuple(after if each is before else each for each in self.others))

    def view_at(self, server: str | None) -> Self:
        """Return the model as the node of a copy sees it: serving from that, beside the others.

        That node neither repairs it, since a degraded copy is replaced, nor unloads it for being idle, which
        is decided for all copies at the node of `serving`.
        """
        for own in self.others:  # each decision looks at each model
            if own.at == server:
                break
        else:
            return self
        others = tuple(each for each in self.servings if each is not own)
        first = own if self.serving is None else self.serving
        parameters = replace(first.parameters.give_settings(own.parameters), keep_alive_s=None)
        serving = replace(own, parameters=parameters, kept_as_is=True)
        return replace(self, serving=serving, copies=others)

    def view_as(self, seen: Servings) -> Self:
        """Return the model as the node has seen it that has seen `seen`."""
        return self if not self.copies or seen.serving is None else self.view_at(seen.serving.server)
