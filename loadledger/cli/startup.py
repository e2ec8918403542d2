"""Steps of `serve` and `run` after a server is ready: sign its user in, report its models, load one of them.

On a terminal the user gets a profile with a token. `run` adds its model if it is new, loads it, and prints
how to send it a request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import jwt

from answers.models import ModelInfo
from events.errors import LedgerProblem
from events.tokens import Token
from loadledger import AsyncClient, BadAnswer, ClientProblem, NotFound, ServerError, ServerUnreachable
from loadledger.cli.chosenmodel import ChosenModel, place_of
from loadledger.cli.models import format_tensors, replace_tensors
from loadledger.cli.options import name_similar
from loadledger.cli.output import (
    NEGATIVE_RESULT,
    OutputLost,
    count_of,
    drop_output,
    print_note,
    to_printable,
)
from loadledger.cli.snippets import format_curl
from loadledger.profiles import (
    DEFAULT_PROFILE,
    TOKEN,
    ProfileProblem,
    ServerTarget,
    profile_path,
    read_profile,
    write_profile,
)
from loadledger.sources.terminal import display_transfer, print_upload_size
from loadledger.uploads import LocalVersion, VersionSource, find_version_files, hash_files
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import FileWindows, find_model_file, read_tensors
from runtime.repository import MODEL_ID, RepositoryBusy
from server.appkeys import CONFIG, LOG, VERSIONS
from server.auth.keys import KeyProblem
from server.auth.subjects import subject_refusal
from server.auth.tokens import TOKENS, timestamp_in
from server.check import CheckFinding, CheckResult, Severity, check_repository, load_config
from server.configsources import warn_of_unknown_variables
from server.errors import ServerProblem
from server.serve import RunningServer, serve

_log = logging.getLogger(__name__)

OWN_PROFILE = "local"
"""The profile for this machine's server, if the default profile is for another server."""

PROFILE_LIFE_S = 30 * 86400
"""Lifetime of the profile's token: a month, and each start of the server issues a new one."""

KEPT_TOKEN_S = 86400
"""Rest of the lifetime from which on a token in the profile is kept."""

CHECK_LIMIT_S = 60.0
"""Time limit of reading the repository: thousands of models on a network mount take a while."""

MAX_FINDINGS = 20
"""Findings printed at the start; `loadledger check` prints all."""

LONG_BYTES = 2**24
"""Size of an upload from which on it has a progress bar."""

LEVEL = "LOADLEDGER_LOG_LEVEL"
"""Variable of the log level; by default the command's own server logs only warnings, for a person."""

TOKEN_LIFE_S = 12 * 3600
"""Lifetime of the token with which the command uses its own server, as `loadledger token` has by default."""


async def announce(server: RunningServer) -> None:
    """Print that the server is ready, its models, and the next command; without a reader it goes on."""
    try:
        options = choose_options(server, await greet(server))
        for line in await check_models(server, options):
            click.echo(line)
    except OutputLost as lost:
        drop_output()
        _log.warning("nothing can be written to stdout (%s); the server goes on", lost)


async def greet(server: RunningServer) -> SignedIn | None:
    """Print that the server is ready; on a terminal, sign its user in, and return the profile."""
    warn_of_unknown_variables(os.environ)  # after logging is set up
    click.echo(f"loadledger is ready at {server.url}")
    profile = await sign_in_user(server) if sys.stdout.isatty() else None
    options = choose_options(server, profile)
    click.echo(f"console: {server.url}/ (`{shlex.join(['loadledger', 'console', *options])}` signs you in)")
    if profile is not None:
        hint = f"; commands use it with {shlex.join(profile.options)}" if profile.options else ""
        click.echo(f"profile: {to_printable(str(profile.path))} has an admin's token{hint}")
    return profile


def choose_options(server: RunningServer, profile: SignedIn | None) -> list[str]:
    """Return the options with which commands find the server, in any terminal."""
    return ["--url", server.url] if profile is None else profile.options


async def check_models(server: RunningServer, options: Sequence[str]) -> list[str]:
    """Return the findings of a quick check of the repository, as lines, and the next command."""
    config, result = server.app[CONFIG], CheckResult()
    look = partial(check_repository, config, result, server.app[LOG].is_removed)
    try:
        await server.app[VERSIONS].repository.file_system.run("", look, CHECK_LIMIT_S)
    except RepositoryBusy as problem:
        return [str(problem)]
    return list(describe_models(server.app[VERSIONS].repository.root, result, options))


def describe_models(root: Path, result: CheckResult, options: Sequence[str] = ()) -> Iterator[str]:
    """Yield the number of usable models, the defects of others, and the next command."""
    shown = result.findings[:MAX_FINDINGS]
    counted = f"{count_of(result.models, 'model')} with {count_of(result.versions, 'version')}"
    yield f"models: {counted if result.models else 'none'} in {to_printable(str(root))}"
    yield from (format_finding(each) for each in shown if each.code != "empty")
    if len(result.findings) > len(shown):
        yield f"{len(result.findings) - len(shown)} more: `loadledger check` prints them"
    named = shlex.join(["", *options])[2:]
    if result.models:
        yield f"next: `loadledger models{named}` lists them, `loadledger load{named} MODEL --wait` loads one"
    else:
        yield (
            f"next: `loadledger add{named} NAME FILE.onnx` adds a model, "
            f"`loadledger run{named} FILE.onnx` also loads it"
        )


def format_finding(finding: CheckFinding) -> str:
    colour = "red" if finding.severity is Severity.PROBLEM else "yellow"
    word = click.style(finding.severity.value, fg=colour)
    return f"{word}: {to_printable(f'{finding.place}: {finding.text}')} ({finding.code})"


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A profile with a token for the server."""

    name: str
    path: Path
    token: str = field(repr=False)

    @property
    def options(self) -> list[str]:
        """The option that selects this profile; empty for the default profile."""
        return [] if self.name == DEFAULT_PROFILE else ["--profile", self.name]


async def sign_in_user(server: RunningServer) -> SignedIn | None:
    """Write a profile with an admin's token for the user of the terminal; return None if that is impossible.

    A default profile of another server stays as it is, and so does a token that still works.
    """
    if server.app[CONFIG].jwt_keys is not None:
        return None  # an identity provider issues the tokens
    try:
        name = DEFAULT_PROFILE if _is_ours(server, _read_if_there(DEFAULT_PROFILE)) else OWN_PROFILE
        path, kept = profile_path(name, os.environ), _read_if_there(name)
        if kept is not None and kept.token and kept.url == server.url and _works(server, kept.token):
            return SignedIn(name, path, kept.token)
        token = await _issue_token(server, PROFILE_LIFE_S)
        await asyncio.to_thread(write_profile, path, ServerTarget(server.url, token))
    except (ProfileProblem, OSError, LedgerProblem, KeyProblem) as problem:
        _log.warning("no profile with a token was written for commands: %s", problem)
        return None
    return SignedIn(name, path, token)


def local_subject() -> str:
    """Return the subject of this process's user."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = ""
    return name if subject_refusal(name) is None else f"user-{os.getuid()}"


def _read_if_there(name: str) -> ServerTarget | None:
    with suppress(FileNotFoundError):
        return read_profile(profile_path(name, os.environ))
    return None


def _is_ours(server: RunningServer, kept: ServerTarget | None) -> bool:
    """Whether a profile is for this server, or has a token from an earlier start of it."""
    if kept is None or kept.url.rstrip("/") == server.url:
        return True
    known = _find_known(server, kept.token)
    return known is not None and known.via == "serve"


def _works(server: RunningServer, token: str) -> bool:
    """Whether a token is of this ledger and valid for at least a day."""
    known = _find_known(server, token)
    return known is not None and not known.is_revoked and known.expires_at > timestamp_in(KEPT_TOKEN_S)


def _find_known(server: RunningServer, token: str | None) -> Token | None:
    """Return the ledger's record of a token; its signature is not verified here."""
    try:
        claims = jwt.decode(token or "", options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return None
    return server.app[LOG].state.registers.tokens.get(str(claims.get("jti")))


async def run_on_server(
    target: ServerTarget, chosen: ChosenModel, options: Sequence[str], *, may_be_absent: bool
) -> bool:
    """Run a model on a server and return True, or return False if none is there, and may be absent.

    Args:
        target: the server.
        chosen: the model.
        options: the options that name the server.
        may_be_absent: not if a person named it.
    """
    show = shlex.join(["loadledger", "token", "show", *options])
    word = f"${TOKEN}" if os.environ.get(TOKEN) else f"$({show})"
    async with AsyncClient(target.url, token=target.token, ca_file=target.ca) as client:
        try:
            await client.health()
        except (ServerUnreachable, BadAnswer):
            if may_be_absent:
                return False
            raise
        try:
            await bring_up(client, chosen, word, options)
        except (ClientProblem, ValueError, OSError) as problem:
            text = str(problem)
            if isinstance(problem, NotFound):
                text = name_similar(problem, chosen.name, [each.id async for each in client.models()])
            print_note(text)
            sys.exit(NEGATIVE_RESULT)
    return True


def serve_and_run(chosen: ChosenModel) -> NoReturn:
    """Serve until Ctrl-C, and run a model on the server; if the model cannot run, the server stops."""
    problems: list[str] = []
    lost: list[OutputLost] = []

    async def announce_and_run(running: RunningServer) -> None:
        try:
            profile = await greet(running)
            options = choose_options(running, profile)
            if profile is not None:
                token, word = profile.token, f"$({shlex.join(['loadledger', 'token', 'show', *options])})"
            else:
                token, word = await _issue_token(running, TOKEN_LIFE_S), f"${TOKEN}"
            async with AsyncClient(running.url, token=token) as client:
                await bring_up(client, chosen, word, options)
            if profile is None:
                issue = ["loadledger", "token", "--data", str(config.data), "--role", "infer", "--subject"]
                click.echo(
                    f'\nBoth need a token: export {TOKEN}="$({shlex.join([*issue, local_subject()])})"'
                )
            click.echo("\nCtrl-C stops the server; the model stays in its repository.")
        except (ClientProblem, ServerProblem, KeyProblem, LedgerProblem, ValueError, OSError) as problem:
            problems.append(str(problem))
            running.stop()
        except OutputLost as output:
            lost.append(output)
            running.stop()

    settings = {} if LEVEL in os.environ else {"log_level": "warning"}
    config = load_config(settings, os.environ)
    status = serve(config, announce_and_run)
    if lost:
        raise lost[0]
    for problem in problems:
        print_note(problem)
    sys.exit(status or (NEGATIVE_RESULT if problems else 0))


async def _issue_token(running: RunningServer, life_s: int) -> str:
    """Issue a token for this process's user; in the ledger the server is its issuer."""
    subject, tokens = local_subject(), running.app[TOKENS]
    return (await tokens.issue(subject, ["admin"], expires_s=life_s, actor=subject, via="serve")).token


async def bring_up(client: AsyncClient, chosen: ChosenModel, token: str, options: Sequence[str]) -> None:
    """Add a model if it is new, load it, and print its inputs and a command for an inference.

    Args:
        client: a client of the server, with the token of an admin.
        chosen: the model.
        token: a shell expression that expands to a token.
        options: options of printed commands, which name the server.

    Raises:
        ClientProblem: the server refused, or the load failed.
        ValueError: there is no model at the chosen path.
        OSError: a file cannot be read.
    """
    name, version = await _add_if_new(client, chosen)
    await client.load(name, version, wait=True)
    model = replace_tensors(await client.model(name), await client.metadata(name))
    click.echo(f"{name} version {model.version}: loaded")
    for line in format_tensors(model, options):
        click.echo(line)
    command = format_curl(client.url, model, token)
    if command is not None:
        click.echo(f"\n{command}")


async def _add_if_new(client: AsyncClient, chosen: ChosenModel) -> tuple[str, int | None]:
    """Return the model and the version to load, which is added unless the server has it."""
    local = chosen.local
    if local is None:
        if chosen.path is None:
            return chosen.name, chosen.version
        local = LocalVersion(await asyncio.to_thread(find_version_files, chosen.path))
    source = local.files
    digests = set((await asyncio.to_thread(hash_files, source)).values())
    same = await _find_same(client, chosen, digests)
    if same is not None:
        return same
    model = await _find_model(client, chosen.name)
    if model is not None and not chosen.is_named:
        if not await asyncio.to_thread(_have_like_tensors, model, source):
            await _ask_for_name(chosen, model, "with other inputs or outputs")
        elif chosen.is_guessed:
            await _ask_for_name(
                chosen, model, "and this name is only that of a folder, or a part of the file's"
            )
    print_upload_size(client.url, source.bytes)
    is_long = source.bytes >= LONG_BYTES
    with display_transfer(f"{chosen.name}: sending") if is_long else nullcontext() as show:
        added = await client.add_files(chosen.name, source, provenance=local.provenance, on_progress=show)
    local.discard()
    click.echo(f"{chosen.name} version {added.version}: added")
    return chosen.name, added.version


async def _find_model(client: AsyncClient, name: str) -> ModelInfo | None:
    """Return a model that has versions."""
    with suppress(NotFound):
        model = await client.model(name)
        return model if model.versions else None
    return None


async def _find_same(
    client: AsyncClient, chosen: ChosenModel, digests: Collection[str]
) -> tuple[str, int] | None:
    """Return the model and the version with the same files, which may even be the files in its folder.

    Of versions that were put into the repository's folders, the server hashes the one in the same folder, and
    the highest.
    """
    laid, number = place_of(chosen.path) if chosen.path else ("", "")
    is_laid = number.isdecimal() and not chosen.is_named and MODEL_ID.fullmatch(laid)
    for name in dict.fromkeys([laid, chosen.name] if is_laid else [chosen.name]):
        model, found = await _find_model(client, name), dict[int | None, set[str]]()
        versions = [] if model is None else model.versions or []
        async for event in client.events(types=["VersionAdded"], models=[name]):
            found[event.version] = {file["sha256"] for file in event.data["files"]}
        for version in reversed(versions):
            if version not in found and (version == versions[-1] or (name, str(version)) == (laid, number)):
                with suppress(ServerError):
                    known = await client.verify_model(name, version)
                    found[version] = {file.sha256 for file in known.files}
            if found.get(version, set()).issuperset(digests):
                return name, version
    return None


async def _ask_for_name(chosen: ChosenModel, model: ModelInfo, why: str) -> None:
    """Ask before a version is added to a model that may be an unrelated one; without a terminal, refuse.

    Raises:
        ValueError: there is no terminal, or the person says no; the message says what to do.
    """
    number = (model.versions or [0])[-1] + 1
    taken = f"there is a model {chosen.name} already, {why}"
    if sys.stdin.isatty() and await _confirm(f"{taken}: add this as its version {number}?"):
        return
    raise ValueError(
        f"{taken}: give this one a name with --name,"
        f" or --name {chosen.name} to add it as version {number} of that"
    )


async def _confirm(question: str) -> bool:
    """Return whether the person at the terminal says yes; a reading thread would outlast Ctrl-C."""
    click.echo(f"{question} [y/N]: ", nl=False)
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _have_like_tensors(model: ModelInfo, source: VersionSource) -> bool:
    """Whether a model and a file have the same inputs and outputs; True for a file that will be refused.

    Optional inputs for weights do not count, and lengths differ only if both are fixed.
    """
    file = find_model_file(each.path for each in source.files)
    [path] = [each.source for each in source.files if each.path == file]
    with path.open("rb") as opened, suppress(Unparsable, TooManyFields):
        read = read_tensors(FileWindows(opened.fileno()), os.fstat(opened.fileno()).st_size)
        ours, theirs = (
            [*(each for each in one.inputs or () if not each.optional), *(one.outputs or ())]
            for one in (read, model)
        )
        return len(ours) == len(theirs) and all(map(_is_like, ours, theirs))
    return True


def _is_like(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours.shape, theirs.shape, strict=False)
    one, other = [(each.name, each.datatype, len(each.shape)) for each in (ours, theirs)]
    return one == other and all(-1 in lengths or lengths[0] == lengths[1] for lengths in pairs)
