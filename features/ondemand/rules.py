"""On-demand loads: the version that an inference may have loaded, and the parameters. Pure.

An inference brings back what a person chose last: version, parameters and bytes (`Model.find_kept_files`). So
a rollback stays when its model is evicted or idle, whoever asks first then, and a model that a person has
unloaded stays out of service.
"""

from __future__ import annotations

from events.commands import MAX_QUEUE, CauseRules, Refused
from events.models import Model
from events.types import LoadParameters, contents_of, digest_of
from events.versions import ModelVersions

OUT_OF_SERVICE = "out_of_service"
"""Error code of an inference for a model that a person has unloaded."""


def find_chosen_version(model: Model | None) -> int | None:
    """Return the version that a person chose last, or None without one, or after an unload."""
    return model.chosen.version if model is not None and model.chosen else None


def find_demand_refusal(model: Model | None, versions: ModelVersions, version: int | None) -> Refused | None:
    """Return why an inference may not have a version (None is any) loaded, or None if it may.

    The first that applies:
    1. No person has chosen: each version may be loaded.
    2. The person has unloaded the model: no version.
    3. The person has chosen another version than this one, which a number or a name stands for: what requests
       without a version get must not depend on who asks first.
    4. The version was removed, or other bytes were added in its place since: no version.
    """
    if model is None or not model.chosen:
        return None
    chosen = model.chosen
    name, by = f"model '{model.id}'", f"{chosen.by} at {chosen.at} (job {chosen.job_id})"
    if chosen.version is None:
        return Refused(OUT_OF_SERVICE, f"{name} is out of service: unloaded by {by}, and not loaded since")
    loaded = f"version {chosen.version} of {name} was loaded by {by}"
    if version not in (None, chosen.version):
        body = f'{{"version": {version}}}'
        advice = f"to change that, load it with POST /api/v1/models/{model.id}/load and body {body}"
        return Refused("model_not_loaded", f"{loaded}, so an inference loads no version {version}; {advice}")
    if chosen.version in versions.removed:
        return Refused(OUT_OF_SERVICE, f"{loaded}, and was removed: load another version")
    added = versions.find_added(chosen.version)
    is_replaced = added is not None and added.position > chosen.position
    if added is not None and is_replaced and added.digest != digest_of(contents_of(chosen.files)):
        new = f"{added.by} has added other bytes in its place since"
        return Refused(OUT_OF_SERVICE, f"{loaded}, and {new}: load it to use these")
    return None


def demand_parameters(model: Model | None, version: int, given: LoadParameters) -> LoadParameters:
    """Return the parameters of an on-demand load: those of the person's choice, if it was this version.

    The time limits are at least the `given` ones: a short limit was not meant for each later inference.
    """
    before = model.chosen.parameters if model is not None and model.chosen else None
    if before is None or find_chosen_version(model) != version:
        return given
    return before.with_limits_from(given.timeout_s, given.progress_timeout_s or 0)


RULES = CauseRules(
    most_unended=MAX_QUEUE // 2,
    replaces=False,
    is_for_inferences=True,
    find_refusal=find_demand_refusal,
    choose_parameters=demand_parameters,
)
"""On-demand loads leave half of the queue to explicit ones, and replace no other version."""
