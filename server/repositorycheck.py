"""What `loadledger check` says of a repository: what its files show, and what comes of loading them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from events.jobs import LoadParameters
from runtime.defaults import InvalidDefaults, defaults_name
from runtime.errors import RuntimeProblem
from runtime.machine import budget_bytes, memory_limit
from runtime.needs import need_of
from runtime.rehearsal import rehearse, rehearsing
from runtime.repository import MODEL_FILE, ModelVersion, Repository
from runtime.scheduling.room import megabytes
from runtime.survey import NO_ONNX, Finding, Severity, is_folder, names_in, survey_model, survey_version
from server.api.parameters import default_parameters
from server.config import ON, Config

OnVersion = Callable[[str], None]
"""Is told of each version that is about to be loaded."""


@dataclass(slots=True)
class Checked:
    """What was checked, and found.

    Attributes:
        findings: in the order in which they were found.
        models: how many have a version.
        versions: how many these have together.
        loaded: how many of those were loaded, to try them.
    """

    findings: list[Finding] = field(default_factory=list)
    models: int = 0
    versions: int = 0
    loaded: int = 0

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong; notes are not."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)

    def forget_guess(self, place: str) -> None:
        """Drop what the look at a file was not sure of: the load knows."""
        name = f"{place}/{MODEL_FILE}"
        self.findings = [each for each in self.findings if (each.place, each.code) != (name, NO_ONNX)]

    def members(self) -> dict[str, Any]:
        """Return it for programs."""
        findings = [
            {"severity": each.severity.value, "place": each.place, "code": each.code, "text": each.text}
            for each in self.findings
        ]
        counted = {"models": self.models, "versions": self.versions, "loaded": self.loaded}
        return {"fine": self.fine, **counted, "findings": findings}


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A version that may be loaded, and with what."""

    found: ModelVersion
    parameters: LoadParameters

    @property
    def place(self) -> str:
        """What it is called."""
        return f"{self.found.model_id}/{self.found.version}"


def check_repository(
    config: Config, checked: Checked, *, limit_s: float | None, on_version: OnVersion
) -> None:
    """Check a repository; what is found is added to what has been.

    Args:
        config: where it is, and how it would be served.
        checked: what was found so far.
        limit_s: how long each version is given to load, in a worker of its own, one after the other; with
            None, none is loaded.
        on_version: see `OnVersion`.
    """
    try:
        if not is_folder(config.repository):
            return  # which was found with the configuration
        repository = Repository(config.repository)
    except ValueError:  # it is no path, or not UTF-8; so was that
        return
    candidates = list(_survey(repository, config, checked))
    if limit_s is not None and candidates:
        trial = _Trial(repository, config, limit_s, on_version)
        asyncio.run(trial.load_all(candidates, checked))


def _survey(repository: Repository, config: Config, checked: Checked) -> Iterator[_Candidate]:
    """Look at all there is, and yield what is worth a try."""
    try:
        names = names_in(repository.root)
    except OSError as error:
        checked.findings.append(Finding("--repository", "unreadable", f"cannot be listed: {error.strerror}"))
        return
    served = set(repository.models())
    checked.models = len(served)
    if not served:
        text = f"{repository.root} has no model that could be served"
        checked.findings.append(Finding("--repository", "empty", text, Severity.NOTE))
    for name in names:
        checked.findings += survey_model(repository, name)
        if name in served:
            yield from _survey_versions(repository, name, config, checked)


def _survey_versions(
    repository: Repository, model_id: str, config: Config, checked: Checked
) -> Iterator[_Candidate]:
    try:
        parameters = default_parameters(repository, model_id, config)
    except InvalidDefaults as error:  # no load is accepted before that is mended
        file = defaults_name(model_id)
        text = str(error).removeprefix(f"{file}: ").removeprefix(f"{file} ")
        checked.findings.append(Finding(file, error.code, text))
        parameters = None
    for found in _found(repository, model_id):
        checked.versions += 1
        findings = list(survey_version(repository, found))
        if parameters is not None:
            findings += _too_large(_Candidate(found, parameters), _budget(config))
            if all(finding.code == NO_ONNX for finding in findings):
                yield _Candidate(found, parameters)
        checked.findings += findings


def _found(repository: Repository, model_id: str) -> Iterator[ModelVersion]:
    for version in repository.versions(model_id):
        with suppress(RuntimeProblem):  # somebody has just taken it away
            yield repository.resolve(model_id, version)


def _too_large(candidate: _Candidate, budget: int) -> Iterator[Finding]:
    """Yield whether the server would refuse the load for its size alone, as its scheduler does."""
    need = need_of(candidate.found.files, candidate.found.version, candidate.parameters, ())
    if need.bytes > budget:
        text = (
            f"needs some {megabytes(need.bytes)} of memory, as its files are, and the budget is"
            f" {megabytes(budget)}: give a larger --memory-budget, or a memory_limit_bytes in"
            f" {defaults_name(candidate.found.model_id)} if it takes less"
        )
        yield Finding(candidate.place, "insufficient_memory", text)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Loads versions to see whether they do."""

    repository: Repository
    config: Config
    limit_s: float
    on_version: OnVersion

    async def load_all(self, candidates: list[_Candidate], checked: Checked) -> None:
        config, most = self.config, _budget(self.config)
        async with rehearsing(
            threads=config.threads, warm_up=config.warm_up == ON, huge_pages=config.huge_pages == "auto"
        ) as pool:
            for each in candidates:
                self.on_version(each.place)
                done = await rehearse(
                    pool,
                    self.repository,
                    each.found,
                    each.parameters,
                    most_bytes=most,
                    limit_s=self.limit_s,
                )
                checked.loaded += done.code is None
                checked.forget_guess(each.place)
                if done.code is not None:
                    checked.findings.append(Finding(each.place, done.code, done.message))


def _budget(config: Config) -> int:
    return budget_bytes(config.memory_budget, memory_limit().bytes)
