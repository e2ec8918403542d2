"""Loads and unloads of models: their routes, and the parameters of a load.

Parameters come from the request, then, for the loaded version, from its load (`events.accept`), else from the
model's loadledger.toml, then from the server's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

from aiohttp import web
from marshmallow import Schema, ValidationError, fields, validate
from msgspec import UNSET, UnsetType

from events.jobcommands import NO_BATCHING, NO_LEVEL, RequestLoad, RequestUnload
from events.models import Choice
from events.types import (
    ALLOW,
    DEPENDENT_ROWS,
    Cause,
    Contents,
    Idempotency,
    Justification,
    LoadParameters,
    contents_of,
)
from features.acceptance import CODES, add_conditions
from features.rules import ModelRules
from features.server import LoadFieldsSchema, settle_parameters
from runtime.consumer.loads import find_targets
from runtime.errors import LoadRefused, RepositoryUnreadable, RuntimeProblem, UnknownModel, UnknownVersion
from runtime.repository import (
    MAX_VERSION,
    REQUEST_LIMIT_S,
    InvalidDefaults,
    Repository,
    defaults_name,
    read_defaults,
)
from runtime.store.versions import Versions
from runtime.timeouts import PROGRESS_TIMEOUT_S
from server.api.jobs import AS_JOB, JOB_ERRORS, answer_with_job, hash_idempotency_key
from server.api.models import is_listed, look_at_model
from server.api.schemas import IS_DIGEST, IS_LABEL, IS_REASON, ModelPathSchema, about
from server.appkeys import CONFIG, GATE, LOG, POLICY, POOL, UPLOADS, VERSIONS
from server.auth.access import Access
from server.auth.gate import PRINCIPAL, Principal, credential_of
from server.cluster import CLUSTER
from server.config import MAX_KEEP_ALIVE_S, MAX_THREADS, MAX_TIMEOUT_S, Config
from server.errors import ServerProblem
from server.http.validation import (
    InvalidBody,
    NothingSchema,
    ParameterBoolean,
    StrictBoolean,
    StrictInteger,
    json_body,
    load_with,
    path_parameters,
    query_parameters,
)
from server.routing import ROUTES, Routes

routes = Routes(tag="models")

MAX_INSTANCES = 64
"""Each instance is a process with a copy of the model; more is a mistake on one machine."""
MAX_BATCH_SIZE = 65_536
MAX_QUEUE_DELAY_US = 1_000_000
"""A second: a longer wait for a batch costs more than it saves."""
MAX_QUEUE = 10_000
"""Each waiting inference has a connection, of which there are at most so many."""
MAX_PRIORITY_LEVELS = 1000
NEVER = -1
"""The `keep_alive_s` of a model without an idle timeout."""


class _ParametersSchema(Schema):
    """Parameters of each load."""

    version = StrictInteger(
        validate=validate.Range(1, MAX_VERSION), **about("Default: the highest version at acceptance.")
    )
    timeout_s = StrictInteger(
        validate=validate.Range(1, MAX_TIMEOUT_S),
        **about("Seconds from acceptance, waiting included, after which the load fails. Default: 300."),
    )
    progress_timeout_s = StrictInteger(
        validate=validate.Range(1, MAX_TIMEOUT_S),
        **about(
            "Seconds that the load, once it has started, may make no progress; then it fails with "
            "`no_progress`. Progress is a further stage, or a piece of a file that is copied or hashed. "
            f"Default: {PROGRESS_TIMEOUT_S}."
        ),
    )
    memory_limit_bytes = StrictInteger(
        validate=validate.Range(min=2**20),
        allow_none=True,
        **about(
            "Memory of each instance; a load that needs more fails with `out_of_memory`. Null is no limit."
        ),
    )
    priority = fields.String(
        validate=validate.OneOf(["high", "normal", "low"]),
        **about(
            "Waiting loads start by priority, then by age. Default: `normal`. A `low` one "
            "waits, up to a limit, while the machine is under pressure."
        ),
    )
    keep_alive_s = StrictInteger(
        validate=validate.Range(-1, MAX_KEEP_ALIVE_S),
        allow_none=True,
        **about(
            "Idle timeout: seconds after the end of the last request until the model is "
            "unloaded. -1 is never, 0 is at once. Default, also for null: the server's --keep-alive-s. A job "
            "shows null for never if neither request nor server set it."
        ),
    )
    strategy = fields.String(
        validate=validate.OneOf(["beside", "in_place", "auto"]),
        **about(
            "How a loaded model is replaced. `beside`: the old version serves until the new "
            "one is loaded; both use memory. `in_place`: the old version is unloaded first; requests get 503 "
            "until the new one is loaded. `auto`: beside if both fit into the memory budget, else in place. "
            "Default: `beside`."
        ),
    )
    pinned = StrictBoolean(
        **about("A pinned model is never evicted and has no idle timeout. Default: `false`.")
    )
    instances = StrictInteger(
        validate=validate.Range(1, MAX_INSTANCES),
        **about("Workers that serve the model in parallel. Default: 1."),
    )
    threads = StrictInteger(
        validate=validate.Range(1, MAX_THREADS),
        allow_none=True,
        **about("Threads that each worker computes with. Default, also for null: the server's --threads."),
    )
    max_batch_size = StrictInteger(
        validate=validate.Range(0, MAX_BATCH_SIZE),
        **about(
            "Queued requests are run together up to this size of the first dimension. "
            "Default: 0, no batching."
        ),
    )
    max_queue_delay_us = StrictInteger(
        validate=validate.Range(0, MAX_QUEUE_DELAY_US),
        **about("Microseconds that a request may wait for its batch to fill; needs a `max_batch_size`."),
    )
    max_queue = StrictInteger(
        validate=validate.Range(1, MAX_QUEUE),
        allow_none=True,
        **about("Inferences that may be queued or running. Default, also for null: the server's 1,024."),
    )
    priority_levels = StrictInteger(
        validate=validate.Range(0, MAX_PRIORITY_LEVELS),
        **about(
            "Levels of the requests' parameter `priority`, of which 1 runs first. "
            "Default: 0, all run in the order of arrival."
        ),
    )
    default_priority_level = StrictInteger(
        validate=validate.Range(0, MAX_PRIORITY_LEVELS),
        **about("Level of requests that name none of the levels. Default: 0, the lowest."),
    )


class LoadBodySchema(LoadFieldsSchema, _ParametersSchema):
    """Parameters of a load. Defaults: the model's loadledger.toml, then the server's settings."""

    dependent_rows = fields.String(
        validate=validate.OneOf(DEPENDENT_ROWS),
        **about(
            "With a `max_batch_size`: `refuse` a model whose rows of a batch change each other's answers, "
            "and join no requests of several clients where that is not known; or `allow` it. "
            "Default: `refuse`."
        ),
    )
    label = fields.String(
        validate=IS_LABEL,
        **about("A label that names the version from the moment when it is loaded.", example="champion"),
    )
    reason = fields.String(
        validate=IS_REASON, **about("Why, for who reads the ledger.", example="Fixes #17.")
    )
    emergency = fields.String(
        validate=IS_REASON,
        **about(
            "Why the load must not wait for other persons; needs the role `emergency`, too, and the `digest` "
            "of the files. Their signature is checked all the same."
        ),
    )
    digest = fields.String(
        validate=IS_DIGEST,
        **about("Of an emergency: of the files that it is for, as `GET .../verify` shows it."),
    )


class UnloadBodySchema(Schema):
    """An unload takes no body or an empty object."""


class UnloadQuerySchema(Schema):
    """Query of an unload."""

    force = ParameterBoolean(
        load_default=False, **about("Do not wait for running requests; end a load and a stuck worker, too.")
    )
    until_asked = ParameterBoolean(
        load_default=False,
        **about(
            "With `--on-demand on`: only free the memory; the next inference loads the model again. Without, "
            "inferences are refused with `out_of_service` until a person loads it."
        ),
    )


@routes.post(
    "/api/v1/models/unload",
    **AS_JOB,
    summary="Unload the active model",
    query=UnloadQuerySchema(),
    body=UnloadBodySchema(),
    errors=("nothing_loaded", *JOB_ERRORS),
)
async def unload_active(request: web.Request) -> web.Response:
    return await _unload(request, None)


@routes.post(
    "/api/v1/models/{id}/load",
    **AS_JOB,
    summary="Load a model, or replace its version",
    path=ModelPathSchema(),
    query=NothingSchema(),
    body=LoadBodySchema(),
    errors=(
        "unknown_model",
        "unknown_version",
        "emergency_forbidden",
        "invalid_defaults",
        "device_unavailable",
        "queue_full",
        *CODES,
        "repository_busy",
        "repository_unreadable",
        *JOB_ERRORS,
    ),
)
async def load_model(request: web.Request) -> web.Response:
    """Append `LoadRequested`, unless the model is loaded as requested or an equal load is under way."""
    model_id, person = path_parameters(request)["id"], request[PRINCIPAL]
    asked, key = json_body(request), hash_idempotency_key(request)
    if "emergency" in asked:
        _check_emergency(request, model_id)
    command = await make_load_command(request.app, model_id, asked, person.subject, key, person=person)
    return await answer_with_job(request, command)


@routes.post(
    "/api/v1/models/{id}/unload",
    **AS_JOB,
    summary="Unload a model",
    path=ModelPathSchema(),
    query=UnloadQuerySchema(),
    body=UnloadBodySchema(),
    errors=("unknown_model", "not_loaded", "repository_busy", "repository_unreadable", *JOB_ERRORS),
)
async def unload_model(request: web.Request) -> web.Response:
    """Append `UnloadRequested`, unless an unload is in progress."""
    model_id = path_parameters(request)["id"]
    if not is_listed(request, model_id):
        await look_at_model(request, model_id)
    return await _unload(request, model_id)


async def _unload(request: web.Request, model_id: str | None) -> web.Response:
    command = RequestUnload(
        model_id,
        request[PRINCIPAL].subject,
        idempotency=hash_idempotency_key(request),
        takes_out_of_service=request.app[CONFIG].loads_for_inferences,
        **query_parameters(request),
    )
    return await answer_with_job(request, command)


_AS_DEFAULTS = LoadBodySchema(only=LoadParameters.__struct_fields__)


async def make_load_command(
    app: web.Application,
    model_id: str,
    asked: Mapping[str, Any],
    subject: str,
    idempotency: Idempotency | None = None,
    *,
    person: Principal | None = None,
    cause: Cause = Cause.REQUEST,
    chosen: Choice | None = None,
) -> RequestLoad:
    """Return the command of a request whose body, as `LoadBodySchema` loads it, is `asked`.

    `person` asked for the load; None if an inference did, which is the `cause` then. That brings back what a
    person has `chosen`, if there is such a version: the ledger has all of it, so the repository is not read.

    Raises:
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is invalid.
        RuntimeProblem: `invalid_model_id`, `unknown_model`, `unknown_version`, `repository_busy`,
            `repository_unreadable`, `device_unavailable`.
    """
    wanted = {name: value for name, value in asked.items() if name not in _NO_PARAMETERS}
    found: _Found
    if chosen is not None and chosen.version is not None:
        found = _Found(chosen.version, None, contents_of(chosen.files), {})
    else:
        version = asked.get("version")
        look = partial(_look_up, app[VERSIONS], model_id, version)
        found = await look_in_repository(app, model_id, version, look)
    version, refusal, known, written = found
    defaults = load_with(_AS_DEFAULTS, written, defaults_name(model_id), InvalidDefaults)
    parameters = _merge_parameters(wanted, defaults, defaults_name(model_id), app[CONFIG])
    try:
        find_targets(parameters, app[POOL], app[POLICY].rooms)
    except RuntimeProblem:
        if not app[CLUSTER].can_run(parameters):
            raise
    rules = app[CONFIG].policy.of(model_id)
    command = RequestLoad(
        model_id,
        version,
        known,
        subject,
        parameters,
        cause,
        asked=frozenset(wanted),
        idempotency=idempotency,
        policy=UNSET if rules is None else rules.digest,
        is_checked=app[CONFIG].policy.count_persons(model_id) > 0,
        justification=UNSET if person is None else _justify(rules, asked, person),
        sign=app[CLUSTER].sign if asked.get("emergency") else None,
        version_name=asked.get("label", UNSET),
        passed_over=UNSET if refusal is None else str(refusal),
    )
    return add_conditions(command, app[CONFIG])


def _justify(
    rules: ModelRules | None, asked: Mapping[str, Any], person: Principal
) -> Justification | UnsetType:
    """Return the reasons that a person gives.

    Raises:
        InvalidBody: `invalid_body`, an emergency does not say which files it is for.
    """
    reason, emergency, digest = (asked.get(name) for name in ("reason", "emergency", "digest"))
    if rules is None and reason is None and emergency is None:
        return UNSET
    if emergency is not None and rules is not None and rules.persons > 0 and digest is None:
        raise InvalidBody(
            "body: digest: an emergency names the files that it is for, as GET .../verify shows it"
        )
    return Justification(credential_of(person), reason, emergency, digest=UNSET if digest is None else digest)


_NO_PARAMETERS = frozenset({"version", "label", "reason", "emergency", "digest"})


def _check_emergency(request: web.Request, model_id: str) -> None:
    """Refuse a load that must not wait for others, unless person and rules allow that.

    Raises:
        Forbidden: `forbidden`, the person lacks the role `emergency`.
        ServerProblem: `emergency_forbidden`, a rule of the model allows none.
    """
    app, rules = request.app, request.app[CONFIG].policy.of(model_id)
    action = f"{app[ROUTES][request.match_info.route].name} (emergency)"
    app[GATE].check_role(request[PRINCIPAL], Access.EMERGENCY, action)
    if rules is not None and not rules.allows_emergency:
        reason = f"the rules of {model_id!r} allow no emergency: load it without"
        raise ServerProblem(reason, code="emergency_forbidden")


T = TypeVar("T")


async def look_in_repository(
    app: web.Application, model_id: str, version: int | None, look: Callable[[], T]
) -> T:
    """Return what `look` finds; a version that was just added may be visible a moment later.

    Raises:
        RuntimeProblem: as `make_load_command`.
    """
    file_system = app[VERSIONS].repository.file_system
    with suppress(UnknownModel, UnknownVersion):
        return await file_system.run(model_id, look, REQUEST_LIMIT_S)
    await app[UPLOADS].changes.settle(model_id)
    try:
        return await file_system.run(model_id, look, REQUEST_LIMIT_S)
    except (UnknownModel, UnknownVersion) as unknown:
        unknown.args = (f"{unknown}{_name_holders(app, model_id, version)}",)
        raise


def _name_holders(app: web.Application, model_id: str, version: int | None) -> str:
    """Return which servers have a version that is not here, as the end of a message."""
    versions = app[LOG].state.registers.find_versions(model_id)
    held = [each for each in versions.holders if version in (None, each.version)]
    if not held:
        return ""
    latest = max(held, key=lambda each: each.version)
    servers = ", ".join(latest.servers)
    return f"; version {latest.version} was added at {servers}: ask there, or add it here, too"


def default_parameters(repository: Repository, model_id: str, config: Config) -> LoadParameters:
    """Return the parameters of a load whose request names none.

    Raises:
        InvalidDefaults: `invalid_defaults`, the model's loadledger.toml is invalid.
    """
    file = defaults_name(model_id)
    defaults = load_with(_AS_DEFAULTS, read_defaults(repository, model_id), file, InvalidDefaults)
    return _merge_parameters({}, defaults, file, config)


class _Found(NamedTuple):
    """A version that is to be loaded.

    Attributes:
        version: its number.
        refusal: why it is not the highest, if it should be.
        known: its contents, if they are known.
        written: the settings of the model's loadledger.toml.
    """

    version: int
    refusal: RuntimeProblem | None
    known: Contents | None
    written: dict[str, Any]


def _look_up(versions: Versions, model_id: str, version: int | None) -> _Found:
    repository, refusal, known = versions.repository, None, None
    if version is None:
        served, refusal = repository.find_served(model_id)
        chosen = served[-1]
    else:
        chosen = repository.find_version(model_id, version)
    with suppress(LoadRefused, RepositoryUnreadable):  # the load then says what is wrong
        known = versions.known_contents(model_id, chosen)
    return _Found(chosen, refusal, known, read_defaults(repository, model_id))


def _merge_parameters(
    wanted: Mapping[str, Any], defaults: Mapping[str, Any], file: str, config: Config
) -> LoadParameters:
    """Merge the sources; a request that switches batching off also drops its delay."""
    own = {name: getattr(config, name) for name in ("timeout_s", "progress_timeout_s")}
    merged = {**own, **defaults, **wanted}
    if merged.get("keep_alive_s") is None:  # null means the server's setting in each source
        merged["keep_alive_s"] = None if config.keep_alive_s == NEVER else config.keep_alive_s
    asks_delay = bool(wanted.get("max_queue_delay_us"))  # the loaded model may have batches: `events.accept`
    if merged.get("max_queue_delay_us") and not merged.get("max_batch_size") and not asks_delay:
        if not defaults.get("max_batch_size"):
            raise InvalidDefaults(f"{file}: {NO_BATCHING}")
        merged["max_queue_delay_us"] = 0
    if (defaults.get("default_priority_level") or 0) > (defaults.get("priority_levels") or 0):
        raise InvalidDefaults(f"{file}: {NO_LEVEL}")
    for name in ("max_queue", "priority_levels", "default_priority_level"):
        merged[name] = merged.get(name) or UNSET
    merged["dependent_rows"] = ALLOW if merged.get("dependent_rows") == ALLOW else UNSET
    try:
        return LoadParameters(**{**merged, **settle_parameters(merged, config)})
    except ValidationError as refusal:
        where, error = ("body", InvalidBody) if refusal.field_name in wanted else (file, InvalidDefaults)
        raise error(f"{where}: {refusal.field_name}: {refusal.messages[0]}") from None
