"""The config check of `loadledger check`: settings, the files that they name, and the models.

`serve` refuses the same mistakes of the configuration before it opens anything.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from msgspec import structs

from events.audit.replay import replay
from events.clock import format_timestamp, utc_now, uuid7
from events.errors import LedgerProblem
from events.models import Model
from events.sqlite.datalock import LEDGER
from events.sqlite.queries import read_state
from events.sqlite.readonly import open_read_only
from events.sqlite.schema import begin_reading
from events.sqlite.storage import is_current
from events.state import State
from events.types import ALLOW, LoadedFile, LoadParameters, contents_of, digest_of
from features.beforeload import CheckInput
from features.checks import CheckedVersion, survey_version
from features.grpc.gatewaywire import find_missing_package
from features.rules import LoadPolicy, ModelRules
from features.server import choose_targets, describe_setup, find_rooms
from runtime.cgroups import count_usable_cpus
from runtime.consumer.loads import find_targets
from runtime.errors import (
    ForkServerUnavailable,
    RepositoryUnreadable,
    RuntimeProblem,
    UnknownModel,
    UnknownVersion,
)
from runtime.memory import MemoryUnknown, find_memory_limit, format_megabytes
from runtime.memoryplan import describe_plan
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import (
    FileWindows,
    check_external_data,
    describe_foreign_content,
    read_head,
    read_tensors,
)
from runtime.process.confinement import NotConfined, describe
from runtime.process.pool import WorkerPool, kill_and_wait
from runtime.repository import MODEL_ID, InvalidDefaults, Repository, defaults_name, read_warm_up
from runtime.rows.judgement import Judgement
from runtime.rows.walk import judge_rows
from runtime.scheduler.estimates import estimate_memory, is_same_files
from runtime.store.folder import STORE
from runtime.store.store import Store
from runtime.store.versions import Versions
from server.api.loads import default_parameters
from server.api.models import find_bytes
from server.auth.keys import KeyProblem, read_public_keys, refuse_unsafe
from server.config import OFF, ON, OWN, Config, ConfigError
from server.configsources import Mistake, default_folder, raise_mistakes, read_settings, unknown_variables
from server.http.connection import bind_address
from server.http.tls import load_context


@dataclass(frozen=True, slots=True)
class LoadableVersion:
    """A version without a problem so far, and the parameters of its load."""

    model_id: str
    version: int
    parameters: LoadParameters

    @property
    def place(self) -> str:
        return f"{self.model_id}/{self.version}"


class Severity(StrEnum):
    """Whether a finding is a problem, or only worth a note."""

    PROBLEM = "problem"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """One finding of the config check; its place is an option, or a path in the repository."""

    place: str
    code: str
    text: str
    severity: Severity = Severity.PROBLEM


@dataclass(slots=True)
class CheckResult:
    """The result of a config check.

    Attributes:
        on_finding: called with each finding, at once.
        models: how many have a version that was checked.
        versions: how many were checked.
        loaded: whether the version that was named was loaded.
        confinement: a sentence about what confines the workers.
        devices: sentences about devices.
        memory: sentences about the parts of the memory, if they fit.
        findings: all so far.
    """

    on_finding: Callable[[CheckFinding], None] = lambda _: None
    models: int = 0
    versions: int = 0
    loaded: bool = False
    confinement: str = ""
    devices: list[str] = field(default_factory=list)
    memory: str = ""
    findings: list[CheckFinding] = field(default_factory=list)

    def add(self, findings: Iterable[CheckFinding]) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.on_finding(finding)

    @property
    def fine(self) -> bool:
        """Whether there is no problem; notes do not count."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)

    def members(self) -> dict[str, Any]:
        shown = asdict(self)
        del shown["on_finding"]
        return {"fine": self.fine, **shown}


def load_config(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Return the configuration of a server; a user's own repository is created.

    Raises:
        ConfigError: with all mistakes of the settings and of the files that they name.
    """
    values, mistakes = read_settings(flags, environment, needed=("repository", "data"))
    own = default_folder("models", environment)
    if own is not None and values.get("repository") == own:
        with suppress(OSError):  # below it says what is wrong
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
    raise_mistakes([*mistakes, *find_unusable_paths(values)])
    return Config(**values)


def check_configuration(
    flags: Mapping[str, Any], environment: Mapping[str, str], result: CheckResult
) -> Config:
    """Check a configuration; return it with defaults in place of invalid values.

    Raises:
        ConfigError: without a valid repository there is nothing to check.
    """
    values, mistakes = read_settings(flags, environment, needed=("repository",))
    if "repository" not in values:
        raise_mistakes(mistakes)
    mistakes += find_unusable_paths(values)
    result.add(CheckFinding(place, "invalid_setting", text) for place, text in mistakes)
    config = Config(**{"data": values["repository"], **values})  # nothing is written
    result.add(_check_memory(config, result))
    result.add(_check_address(config))
    result.add(
        CheckFinding(place, "unknown_variable", f"is unknown; {text}", Severity.NOTE)
        for place, text in unknown_variables(environment)
    )
    return config


def find_unusable_paths(values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Check the paths that settings name; yield a mistake for each unusable one."""
    checks = {"repository": _check_repository, "data": _check_data, "jwt_keys": read_public_keys}
    for name, check in checks.items():
        if values.get(name) is not None:
            yield from _find_mistake("--" + name.replace("_", "-"), check, values[name])
    cert, key = values["tls_cert"], values["tls_key"]
    if cert is not None and key is not None:
        yield from _find_mistake("--tls-cert, --tls-key", load_context, cert, key)
    elif cert is not None or key is not None:
        given, other = ("--tls-key", "--tls-cert") if cert is None else ("--tls-cert", "--tls-key")
        yield Mistake(given, f"is given alone: HTTPS takes {other}, too")
    if values["grpc_port"] is not None and (missing := find_missing_package()) is not None:
        yield Mistake("--grpc-port", missing)
    if values["repository_writable"] in (ON, OWN) and values["store_size"] == OFF:
        text = "on and own are refused with --store-size=off: workers load files that nobody may ever change"
        yield Mistake("--repository-writable", text)


def _find_mistake(place: str, check: Callable[..., object], *paths: Path) -> Iterator[Mistake]:
    try:
        check(*paths)
    except (ConfigError, KeyProblem) as error:
        yield Mistake(place, str(error))
    except (OSError, ValueError) as error:  # ValueError: an invalid character
        reason = getattr(error, "strerror", None) or error
        yield Mistake(place, f"{str(paths[0])!r:.200} cannot be read: {reason}; name another")


def _check_repository(path: Path) -> None:
    if not Repository(path).root.is_dir():
        raise ConfigError(f"{str(path)!r:.200} is not a directory; create it or name another")


def _check_data(path: Path) -> None:
    with suppress(FileNotFoundError):  # a missing folder will be created
        path.stat()
    folder = next(each for each in (path, *path.parents) if each.exists())
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} is not writable for this user: correct its mode or owner")
    refuse_unsafe(path)


def _check_memory(config: Config, result: CheckResult) -> Iterator[CheckFinding]:
    try:
        limit = find_memory_limit()
    except MemoryUnknown as error:
        yield CheckFinding("--memory-budget", error.code, str(error))
        return
    plan = config.plan_memory(limit)
    if plan.fits:
        result.memory = describe_plan(plan)
    else:
        yield CheckFinding("--memory-budget", "beyond_limit", describe_plan(plan), Severity.NOTE)


def _check_address(config: Config) -> Iterator[CheckFinding]:
    try:
        with bind_address(config.host, config.port):
            return
    except (socket.gaierror, UnicodeError) as error:
        yield CheckFinding("--host", "no_address", f"{config.host!r} cannot be resolved: {error}")
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        hint = "; another process does, which may be the server" if taken else ""
        text = f"{error.filename} cannot be listened on: {error.strerror}{hint}"
        yield CheckFinding("--port", "no_address", text, Severity.NOTE if taken else Severity.PROBLEM)


IsRemoved = Callable[[str, int], bool]
"""Whether the ledger has a version of a model as removed."""


def check_repository(config: Config, result: CheckResult, is_removed: IsRemoved) -> list[LoadableVersion]:
    """Check the models of a repository, as the ledger has them; return the versions without a problem."""
    try:
        repository = Repository(config.repository, is_removed)
        names = sorted(path.name for path in repository.root.iterdir())
    except (OSError, ValueError) as error:
        if not any(each.place == "--repository" for each in result.findings):
            text = f"cannot be listed: {getattr(error, 'strerror', error)}"
            result.add([CheckFinding("--repository", "unreadable", text)])
        return []
    for name in names:
        if not MODEL_ID.fullmatch(name) and not name.startswith((".", "__")):
            text = "is not served: a model's name has A-Z a-z 0-9 . _ - and a letter or digit first"
            result.add([CheckFinding(name, "invalid_model_id", text, Severity.NOTE)])
    result.add(CheckFinding(place, "not_served", text) for place, text in repository.find_unserved())
    served = repository.models()
    result.models = len(served)
    if not served:
        text = f"{repository.root} has no model that could be served"
        result.add([CheckFinding("--repository", "empty", text, Severity.NOTE)])
    checked = (
        _check_versions(repository, name, repository.versions(name), config, result) for name in served
    )
    return [candidate for each in checked for candidate in each]


def check_version(
    config: Config, result: CheckResult, is_removed: IsRemoved, model_id: str, version: int | None
) -> list[LoadableVersion]:
    """Check one version of a model, by default the highest; return it if it has no problem."""
    try:
        repository = Repository(config.repository, is_removed)
        version = repository.find_version(model_id, version)
    except (RuntimeProblem, ValueError) as problem:  # ValueError: an invalid character
        result.add([CheckFinding(model_id, getattr(problem, "code", "unreadable"), str(problem))])
        return []
    result.models = 1
    return [*_check_versions(repository, model_id, [version], config, result)]


def check_references(config: Config, result: CheckResult, candidates: Iterable[LoadableVersion]) -> None:
    """Check what the models' files name: their external data."""
    for each in candidates:
        repository = Repository(config.repository)
        try:
            path = repository.find_file(each.model_id, each.version)
            if path is not None:
                check_external_data(path, path.parent, repository.find_root())
        except (OSError, RuntimeProblem) as problem:
            code = getattr(problem, "code", RepositoryUnreadable.code)
            result.add([CheckFinding(each.place, code, str(problem))])


FIXED_BATCH = "with max_batch_size the first dimension of each input and output has to be of any length (-1)"


def check_rows(
    config: Config, result: CheckResult, candidates: Iterable[LoadableVersion], state: State
) -> list[LoadableVersion]:
    """Check whether rows of batches depend on each other; return the versions that are loaded all the same.

    The ledger says which versions an earlier release batched: these are not refused.
    """
    return [each for each in candidates if _check_rows(config, result, each, state)]


def _check_rows(config: Config, result: CheckResult, checked: LoadableVersion, state: State) -> bool:
    if checked.parameters.max_batch_size <= 1:
        return True
    try:
        path = Repository(config.repository).find_file(checked.model_id, checked.version)
        if path is None:
            return True
        with path.open("rb") as file:
            tensors = read_tensors(FileWindows(file.fileno()), path.stat().st_size)
        judged = judge_rows(path)
    except (OSError, RuntimeProblem, Unparsable, TooManyFields):  # the other checks say so
        return True
    fixed = [
        each for each in (*tensors.inputs, *tensors.outputs) if not each.optional and each.shape[:1] != (-1,)
    ]
    if fixed:
        text = f"would not load: {fixed[0].name!r} has shape {list(fixed[0].shape)}: {FIXED_BATCH}"
        result.add([CheckFinding(checked.place, "invalid_model", text)])
        return False
    model = state.models.get(checked.model_id) or Model(checked.model_id)
    finding = _describe_rows(checked, judged, is_excused=model.may_lose_batches(checked.version))
    result.add([finding])
    return finding.severity is Severity.NOTE


def _describe_rows(checked: LoadableVersion, judged: Judgement, *, is_excused: bool) -> CheckFinding:
    if judged.verdict == "independent":
        text = "requests of several clients are joined in batches: rows are independent"
        return CheckFinding(checked.place, "rows_independent", text, Severity.NOTE)
    is_dependent = judged.verdict == "dependent"
    code = "rows_depend" if is_dependent else "rows_unknown"
    when = (
        "if answers that depend on other clients will do"
        if is_dependent
        else "if you know that rows are independent"
    )
    cure = f'dependent_rows = "allow" in {defaults_name(checked.model_id)}, {when}'
    if checked.parameters.dependent_rows == ALLOW:
        text = f"requests of several clients are joined in batches, as dependent_rows allows: {judged.reason}"
        return CheckFinding(checked.place, code, text, Severity.NOTE)
    if is_dependent and not is_excused:
        text = f"would not load: {judged.reason}. Set max_batch_size = 0, or {cure}"
        return CheckFinding(checked.place, code, text)
    text = f"requests of several clients are not joined in batches: {judged.reason}. To join them, set {cure}"
    return CheckFinding(checked.place, code, text, Severity.NOTE)


def _check_versions(
    repository: Repository, model_id: str, versions: Iterable[int], config: Config, result: CheckResult
) -> Iterator[LoadableVersion]:
    parameters: LoadParameters | None = None
    try:
        parameters = default_parameters(repository, model_id, config)
    except InvalidDefaults as error:  # no load is accepted with it
        file = defaults_name(model_id)
        result.add([CheckFinding(file, error.code, str(error).removeprefix(file).lstrip(": "))])
    budget = config.plan_memory(find_memory_limit()).budget_bytes
    for version in versions:
        place = f"{model_id}/{version}"
        try:
            with repository.open_version(model_id, version) as (folder, files):
                result.add(_check_hard_links(place, folder.find_hard_links()))
                for each in files:
                    with folder.open_file(each.path):  # may be read
                        pass
        except (UnknownModel, UnknownVersion):  # just deleted
            continue
        except RuntimeProblem as problem:
            result.add([CheckFinding(place, problem.code, str(problem))])
            continue
        result.versions += 1
        foreign = list(_check_content(place, partial(repository.find_file, model_id, version)))
        result.add(foreign)
        if parameters is None or foreign:
            continue
        need = estimate_memory(files, version, parameters, ())
        if need.bytes <= budget:
            yield LoadableVersion(model_id, version, parameters)
            continue
        text = (  # the scheduler refuses such a load without trying it
            f"needs about {format_megabytes(need.bytes)} of memory, estimated from its files, and the budget"
            f" is {format_megabytes(budget)}: give a larger --memory-budget, or a memory_limit_bytes in"
            f" {defaults_name(model_id)} if it takes less"
        )
        result.add([CheckFinding(place, "insufficient_memory", text)])


def _check_content(place: str, find_file: Callable[[], Path | None]) -> Iterator[CheckFinding]:
    """Yield what the file of a version is, if it is no ONNX file, or not all of one."""
    with suppress(OSError, RuntimeProblem):  # just changed
        path = find_file()
        foreign = None if path is None else describe_foreign_content(*read_head(path))
        if path is not None and foreign is not None:
            yield CheckFinding(place, "invalid_model", f"{path.name} {foreign}")


def _check_hard_links(place: str, linked: Sequence[str]) -> Iterator[CheckFinding]:
    if linked:
        more = f" and {len(linked) - 1} more have" if len(linked) > 1 else " has"
        text = (
            f"{linked[0]}{more} other names (hard links), perhaps outside the repository: who may write to"
            " one of those can change the version without access to this folder; copy files, do not link them"
        )
        yield CheckFinding(place, "hard_link", text, Severity.NOTE)


def check_policy(config: Config, result: CheckResult, state: State) -> None:
    """Check each model against its rules: a load of its highest version today, and a reload after a restart.

    The ledger in the data directory says what was verified and loaded, and what persons said; signatures of
    servers in it are taken as good.
    """
    if config.policy == LoadPolicy():
        return
    if not config.has_store:
        text = "is off, so the server does not start: a policy checks private copies, from which models load"
        result.add([CheckFinding("--store-size", "policy_needs_store", text)])
        return
    repository, names = Repository(config.repository, state.is_removed), {*state.models}
    with suppress(RuntimeProblem):  # `check_repository` says that it cannot be listed
        names |= {*repository.models()}
    ruled = [(name, rules) for name in sorted(names) if (rules := config.policy.of(name)) is not None]
    sizes = [size for name, _ in ruled if (size := _size_highest(repository, name)) is not None]
    if sizes:
        what = f"{len(sizes)} versions" if len(sizes) > 1 else "1 version"
        text = f"{sum(sizes) / 1e9:.1f} GB of {what} are hashed, to check the rules for loads"
        result.add([CheckFinding("--repository", "policy", text, Severity.NOTE)])
    for model_id, rules in ruled:
        result.add(_check_rules(config, repository, model_id, rules, state))


def _size_highest(repository: Repository, model_id: str) -> int | None:
    """Return the bytes of a model's highest version, or None if the repository has it no more."""
    with suppress(RuntimeProblem):
        return sum(
            each.bytes for each in repository.stat_version(model_id, repository.find_version(model_id))
        )
    return None


def check_changes(config: Config, result: CheckResult, state: State) -> None:
    """Note the versions whose files differ from those that were loaded, which stay until a person's load.

    Files with other times are hashed.
    """
    repository = Repository(config.repository, state.is_removed)
    for model_id in sorted(state.models):
        with suppress(RuntimeProblem, OSError):  # of what cannot be read, the other checks say it
            present = repository.versions(model_id)
            kept = find_bytes(state, model_id, present, on_demand=config.loads_for_inferences)
            if kept is None or kept[0] not in present:
                continue
            version, files = kept
            is_same = is_same_files(files, repository.stat_version(model_id, version))
            versions = Versions(repository, None)
            if is_same or asyncio.run(versions.has_bytes_of(model_id, version, files)):
                continue
            text = (
                "the repository has newer files than those that were loaded, which stay until a person"
                f" loads again: `loadledger load {model_id}/{version}` takes the newer ones"
            )
            result.add([CheckFinding(f"{model_id}/{version}", "newer_files", text, Severity.NOTE)])


def read_ledger(config: Config, result: CheckResult) -> State:
    """Return the state of the ledger in the data directory; empty without one that this user can see."""
    if not os.access(config.data / LEDGER, os.R_OK):
        return State()
    try:
        with open_read_only(config.data / LEDGER) as ledger:
            begin_reading(ledger)
            if is_current(ledger):
                return read_state(ledger)
            ledger.rollback()
            # Before the first start of a new release the stored state is that of the old one's folds.
            return replay(ledger, None)[1]
    except (LedgerProblem, ValueError) as error:
        result.add([CheckFinding("--data", getattr(error, "code", "ledger_damaged"), str(error))])
        return State()


def _check_rules(
    config: Config, repository: Repository, model_id: str, rules: ModelRules, state: State
) -> Iterator[CheckFinding]:
    """Yield the effect of the rules on the highest version, and their refusals of the serving one."""
    model, versions = state.models.get(model_id) or Model(model_id), state.registers.find_versions(model_id)
    highest = list[int]()
    with suppress(RuntimeProblem):  # the repository does not have it any more
        highest = repository.versions(model_id)[-1:]
    under = ", ".join(rules.names)
    for version, loaded in [
        *((number, None) for number in highest),
        *{each.version: each.files for each in model.servings}.items(),
    ]:
        place, is_reload = f"{model_id}/{version}", loaded is not None
        try:
            contents = contents_of(loaded or asyncio.run(_hash_version(repository, model_id, version)))
            read = partial(_read_file, config, digest_of(contents), (model_id, version))
            now = format_timestamp(utc_now())
            given = CheckInput(rules, model, versions, contents, read, now, is_reload, lambda *_: True)
            seen = survey_version(given, version)
            is_below = is_reload and version not in highest
            later = survey_version(replace(given, is_reload=False), version) if is_below else seen
        except (RuntimeProblem, OSError) as problem:
            text = f"cannot be checked under {under}: {problem}"
            yield CheckFinding(place, getattr(problem, "code", "unreadable"), text, Severity.NOTE)
            continue
        if seen.problem is not None:
            fate = "is loaded, and would not be loaded again after a restart" if loaded else "would not load"
            yield CheckFinding(place, seen.problem.code, f"{fate}, under {under}: {seen.problem.message}")
        elif later.problem is not None:
            fate = "is loaded and comes back after a restart, and the next load of it would be refused"
            text = f"{fate}, under {under}: {later.problem.message}"
            yield CheckFinding(place, later.problem.code, text, Severity.NOTE)
        elif loaded is None:
            code = (seen.evidence.signature and seen.evidence.signature.problem) or "policy"
            text = f"under {under}: {_describe_outcome(seen, rules)}"
            yield CheckFinding(place, code, text, Severity.NOTE)


async def _hash_version(repository: Repository, model_id: str, version: int) -> tuple[LoadedFile, ...]:
    async with Versions(repository, None).version(model_id, version) as files:
        await files.hash()
        return files.loaded_files


def _read_file(config: Config, digest: str, name: tuple[str, int], path: str, most_bytes: int) -> bytes:
    """Read a file of a version from the store, or else from the repository."""
    stored = Store(config.data / STORE).folder_of(digest) / path
    with suppress(OSError), stored.open("rb") as file:
        return file.read(most_bytes)
    with (
        Repository(config.repository).open_version(*name) as (folder, _),
        folder.open_file(path) as descriptor,
        open(descriptor, "rb", closefd=False) as file,
    ):
        return file.read(most_bytes)


def _describe_outcome(seen: CheckedVersion, rules: ModelRules) -> str:
    signature, signed = seen.evidence.signature, "no signature is needed"
    if signature:
        by = f"verified, by {signature.method} {signature.signer}"
        signed = f"its signature is {by if signature.method else 'not verified, which lets it load'}"
    return f"{signed}; other persons that it needs: {rules.persons}"


def check_workers(config: Config, result: CheckResult, loaded: Sequence[LoadableVersion] = ()) -> None:
    """Check confinement and targets, and load versions, each for at most its `timeout_s`."""

    async def check() -> None:
        pool = WorkerPool(
            threads=config.model_threads(count_usable_cpus()),
            targets=choose_targets(config),
            max_request_bytes=config.max_request_bytes,
        )
        try:
            await pool.open()
            await _check_confinement(pool, config, result)
            for each in loaded:
                await _load(pool, each, config, result)
        except ForkServerUnavailable as problem:
            result.add([CheckFinding("--confine", problem.code, str(problem))])
        finally:
            await pool.close()

    asyncio.run(check())


async def _check_confinement(pool: WorkerPool, config: Config, result: CheckResult) -> None:
    try:
        await pool.confine(config.confine, Path(gettempdir()))
    except NotConfined as problem:
        result.add([CheckFinding("--confine", problem.code, str(problem))])
        return
    result.confinement = describe(pool.applied.confinement)
    await _check_targets(pool, config, result)
    if pool.applied.confinement.not_prevented:
        text = f"{result.confinement}{pool.applied.reasons}"
        result.add([CheckFinding("--confine", NotConfined.code, text, Severity.NOTE)])


async def _check_targets(pool: WorkerPool, config: Config, result: CheckResult) -> None:
    try:
        rooms = await find_rooms(config, pool, find_memory_limit().bytes)
        result.devices += describe_setup(pool, rooms)
    except ConfigError as error:
        place, _, text = str(error).partition(": ")
        result.add([CheckFinding(place, "invalid_setting", text)])


async def _load(pool: WorkerPool, loaded: LoadableVersion, config: Config, result: CheckResult) -> None:
    repository, parameters = Repository(config.repository), loaded.parameters
    budget = config.plan_memory(find_memory_limit()).budget_bytes
    versions = Versions(repository, None)  # a check takes nothing into a store
    try:
        warm_up = read_warm_up(repository, loaded.model_id)
        async with versions.version(loaded.model_id, loaded.version) as files:
            order = find_targets(parameters, pool, {})[0].allocate({}, parameters, None, pool, tuple).order()
            # `check_rows` has let it pass.
            message = pool.build_load(files, parameters, warm_up, order, rows_required=False)
            message = structs.replace(message, ceiling_bytes=budget)
            worker = await pool.start(uuid7())
            try:
                async with asyncio.timeout(parameters.timeout_s):
                    await worker.load(message, lambda _: None, warm_up.inputs)
            finally:
                await kill_and_wait(worker)
        result.loaded = True
    except TimeoutError:
        text = f"was not loaded within its timeout_s of {parameters.timeout_s} s"
        result.add([CheckFinding(loaded.place, "timeout", text)])
    except RuntimeProblem as problem:
        result.add([CheckFinding(loaded.place, problem.code, str(problem))])
