"""`loadledger models | show | add | rm | resources`: models, memory and devices."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from features.approvals.cli import model_facts
from loadledger.cli import options, output
from loadledger.cli.jobs import MAX_DETAIL, describe_progress, report_request
from loadledger.cli.output import format_cell, format_size, format_table, to_printable
from loadledger.cli.snippets import DATATYPES, describe_guess, format_infer
from loadledger.errors import ClientProblem

COLUMNS = ("MODEL", "STATE", "VERSION", "VERSIONS", "MEMORY", "LOADED", "BY", "DETAIL")
HAVE_PROCESS = ("loading", "loaded", "unloading")
MAX_VERSIONS = 4
"""Versions in a cell: the highest ones."""
BROUGHT_BACK = {
    "restart": "by the system, after a restart of the server",
    "recovery": "by the system, after its worker ended",
    "swap": "by the system, after a replacement failed",
    "drain": "by the system, because the node that it was at drains",
    "copy": "by the system, which made this copy before another one ended",
}
"""Words for `brought_back`."""
UNSET = (None, False, 0)
"""Values of a load's parameters that are not shown."""
USE_HEAD = ("MODEL", "VERSION", "PHASE", "WORKERS", "MEMORY", "RESERVED", "IN FLIGHT", "LAST USED", "KEPT")
RIGHT = frozenset({"WORKERS", "MEMORY", "RESERVED", "IN FLIGHT", "LAST USED"})
DEVICES_HEAD = ("DEVICE", "PROVIDER", "HARDWARE", "USED", "RESERVED", "BUDGET", "FREE", "MODELS")
DEVICES_RIGHT = frozenset({"USED", "RESERVED", "BUDGET", "FREE", "MODELS"})
WAITING_HEAD = ("WAITING", "JOB", "NEEDS", "FOR")


at_option = click.option(
    "--at", type=options.MOMENT, help="Past state: a position, or a time like 10m (ago), 14:02 or 2026-01-31."
)


@click.command(context_settings={"allow_extra_args": True})
@click.option(
    "--loaded/--all", " /-a", help="Only models with a process, or that wait for one; by default all."
)
@at_option
@options.json_option
@options.server_options
@click.pass_context
def models(
    context: click.Context, *, loaded: bool, at: str | None, as_json: bool, where: options.ServerChoice
) -> None:
    """List the models and their states.

    A star marks the active model, the one loaded last, which `unload --active` unloads.
    """
    if context.args:
        raise click.UsageError(f"this lists all models; for one, `loadledger show {context.args[0]}`")
    with options.open_chosen_client(where) as client:
        known = list(client.models(at=at))
        past = client.model(known[0].id, at=at) if at is not None and known else None
        if at is None:
            note_not_ready(client.resources())
    rows = [each for each in known if not loaded or each.state in HAVE_PROCESS or each.open_load is not None]
    now = datetime.now(UTC) if at is None or past is None else output.note_moment(past, at)
    if past is not None and past.server is not None and past.server.state != "running":
        output.print_note(f"the server then: {format_presence(past.server)}")
    shown = output.with_column(
        COLUMNS, [_row(each, now) for each in rows], "NODE", [_nodes_of(each) for each in rows]
    )
    table = format_table(*shown, right={"MEMORY"})
    none = "no model is loaded" if loaded else "the repository has no models"
    output.print_result({"models": rows}, table if rows else [none], as_json=as_json)


@click.command()
@options.model_argument()
@at_option
@options.json_option
@options.server_options
def show(
    model: str, *, version: int | None, at: str | None, as_json: bool, where: options.ServerChoice
) -> None:
    """Show a model: its state, files, inputs and outputs.

    At the end it prints a command line for a first inference.
    """
    with options.open_chosen_client(where) as client:
        shown = client.model(model, at=at)
        options.check_version(shown, version, shown.version or shown.inputs_of_version or version)
        if shown.state == "loaded" and at is None:
            with suppress(ClientProblem):  # its server cannot be reached: the file's are shown
                shown = replace_tensors(shown, client.metadata(model))
    output.print_result(shown, _details(shown, where.words), as_json=as_json)


def note_not_ready(found: Any) -> None:
    """Print why the server is not ready, before anything else, with what to do."""
    for each in found.not_ready:
        output.print_note(f"the server is NOT READY: {each.cause}: {each.cure}")


def describe_state(model: Any, now: datetime) -> tuple[str, str]:
    """Return a model's state in one word, and what it waits for, its stage, or why it failed."""
    load, failure = model.open_load, ""
    if model.error is not None:
        failure = f"{model.error.code}: {model.error.message}"
    if load is None:
        return model.state, failure or model.not_served or ""
    doing = f"{output.format_age(load.started_at or load.created_at, now)}: {describe_progress(load)}"
    if model.state in {"unloaded", "failed", "loading"}:
        return ("waiting" if load.status == "pending" else "loading"), f"for {doing}"
    return model.state, f"version {load.version} for {doing}{f'; {failure}' if failure else ''}"


def _row(model: Any, now: datetime) -> tuple[str, ...]:
    state, detail = describe_state(model, now)
    version = output.NOTHING if model.version is None else str(model.version)
    if model.next_version is not None:
        version += f" → {model.next_version}"
    if model.repository_changed:
        version += " (newer files)"
    return (
        format_cell(model.id) + (" *" if model.active else ""),
        state,
        version,
        _versions(model.versions) + (f" ({format_cell(_labels(model), most=60)})" if model.labels else ""),
        format_size(model.memory_bytes),
        output.format_age(model.loaded_at, now),
        format_cell(model.loaded_by, most=24) + (f" ({model.brought_back})" if model.brought_back else ""),
        format_cell(detail, most=MAX_DETAIL),
    )


def _copies(model: Any) -> str | None:
    """Return the number of ready copies, or None for a model with one copy."""
    if model.copies is None:
        return None
    return f"{model.copies_ready} of {output.count_of(model.copies, 'copy')} ready"


def _nodes_of(model: Any) -> str | None:
    names = ", ".join(str(copy.node) for copy in model.copies_at) or model.node
    return names if model.copies is None else f"{_copies(model)}: {names or 'none'}"


def _copy_line(copy: Any) -> str:
    what = f"{output.count_of(copy.workers, 'worker')}, {format_size(copy.memory_bytes)}"
    loaded = f"loaded {output.format_timestamp(copy.loaded_at)}, position {copy.position}, job {copy.job_id}"
    return f"  copy at {format_cell(copy.node)}: version {copy.version}, {what}, {loaded}"


def _versions(versions: list[int] | None) -> str:
    if not versions:
        return output.NOTHING
    named = ", ".join(map(str, versions[-MAX_VERSIONS:]))
    return f"…, {named}" if len(versions) > MAX_VERSIONS else named


def _labels(model: Any) -> str:
    return ", ".join(f"{label} {version}" for label, version in model.labels.items())


def _details(model: Any, words: Sequence[str] = ()) -> Iterator[str]:
    state, detail = describe_state(model, datetime.now(UTC))
    yield f"{format_cell(model.id)}: {output.format_state(state)}{', active' if model.active else ''}"
    load = model.open_load
    facts = {
        "load": load and f"{detail}; job {load.id} by {format_cell(load.requested_by)}",
        "version": model.version,
        "next version": model.next_version,
        "repository": "has newer files than those that were loaded" if model.repository_changed else None,
        "versions": model.versions and ", ".join(map(str, model.versions)),
        "not served": model.not_served,
        "labels": _labels(model) or None,
        "instances": model.instances,
        "threads": model.threads,
        "parameters": model.parameters and _parameters(model.parameters),
        "batching": model.rows and describe_batching(model.rows),
        "memory": model.memory_bytes and f"{format_size(model.memory_bytes)} now",
        "memory at load": model.memory_at_load_bytes and format_size(model.memory_at_load_bytes),
        "devices": ", ".join(map(_describe_use, model.devices)) or None,
        "loaded": model.loaded_at
        and f"{output.format_timestamp(model.loaded_at)} by {format_cell(model.loaded_by)}",
        "brought back": model.brought_back and BROUGHT_BACK.get(model.brought_back, model.brought_back),
        "chosen": model.chosen and _choice(model.chosen),
        "node": model.node,
        "copies": _copies(model),
        "copies wait": model.copies_waiting_for,
        "job": model.job_id,
        "position": model.position,
        **model_facts(model),
        "error": model.error and f"{model.error.code}: {model.error.message}",
        "server": model.server and format_presence(model.server),
    }
    yield from output.format_facts(facts)
    yield from map(_copy_line, model.copies_at)
    yield from map(_origin_line, model.sources)
    for file in model.files:
        yield f"  {format_cell(file.path)}: {file.bytes} bytes, sha256 {format_cell(file.sha256)}"
    yield from format_tensors(model, words)


def _choice(chosen: Any) -> str:
    what = "unloaded" if chosen.version is None else f"version {chosen.version}"
    effect = "; no inference loads it" if chosen.version is None else ""
    return f"{what} by {format_cell(chosen.by)} {output.format_timestamp(chosen.at)}{effect}"


def describe_batching(rows: Any) -> str:
    """Return whether requests of several clients run together, and why not."""
    if rows.verdict == "independent":
        return "requests of several clients are joined: rows are independent"
    joined = "joined, as dependent_rows allows" if rows.joined else "not joined"
    return f"requests of several clients are {joined}: {rows.reason}"


def _describe_use(use: Any) -> str:
    memory = f", {format_size(use.memory_bytes)}" if use.memory_bytes is not None else ""
    nodes = output.count_of(use.nodes, "node")
    return f"{nodes} of its graph on {use.device} ({use.provider} {use.version}{memory})"


def _origin_line(origin: Any) -> str:
    resolved, source = (output.to_printable(each) for each in (origin.resolved, origin.source))
    asked = f" (asked as {source})" if source != resolved else ""
    by, age = format_cell(origin.added_by), output.format_age(origin.added_at, datetime.now(UTC))
    return f"  version {origin.version}: from {resolved}{asked}, added by {by}, {age} ago"


def _parameters(parameters: dict[str, Any]) -> str:
    """Return the parameters of a load that are set."""
    named = {name: value for name, value in sorted(parameters.items()) if value not in UNSET}
    return output.format_parameters(named)


def replace_tensors(model: Any, metadata: Any) -> Any:
    """Return a model with the inputs and outputs of its metadata: those of the server where it is loaded."""
    version = int(metadata.versions[0]) if metadata.versions else model.inputs_of_version
    return msgspec.structs.replace(
        model, inputs=metadata.inputs, outputs=metadata.outputs, inputs_of_version=version
    )


def format_tensors(model: Any, words: Sequence[str] = ()) -> Iterator[str]:
    """Yield inputs and outputs as tables, and command lines that the model answers.

    Args:
        model: its record.
        words: options for the printed commands, which name the server.
    """
    if model.inputs_of_version is None:  # the file cannot be read, or the state is a past one
        return
    for head, tensors in (("INPUT", model.inputs), ("OUTPUT", model.outputs)):
        yield ""
        yield from format_table(
            (head, "DATATYPE", "SHAPE"), [_tensor_row(tensor) for tensor in tensors or ()]
        )
    for tensor in model.outputs or ():
        if tensor.datatype not in DATATYPES:
            yield f"# answers leave {format_cell(tensor.name)} out, which is no tensor: export without ZipMap"
    commands = list(format_infer(model, words))
    if not commands:
        return
    yield ""
    if model.state != "loaded":
        yield shlex.join(["loadledger", "load", *words, model.id, "--wait"])
        yield shlex.join(["loadledger", "infer", *words, model.id])
        return
    yield commands[0]
    yield from (f"# with a file of yours: {each}" for each in commands[1:])
    guess = describe_guess(model)
    if guess is not None:
        yield f"# {to_printable(guess)}"


def _tensor_row(tensor: Any) -> tuple[str, ...]:
    name = f"{format_cell(tensor.name)}{' (optional)' if tensor.optional else ''}"
    return name, format_cell(tensor.datatype), format_cell(tensor.describe_shape())


def format_presence(server: Any) -> str:
    return (
        f"{server.state} since {output.format_timestamp(server.since)}" if server.since else str(server.state)
    )


class _FileOrSource(click.Path):
    """An existing file or folder, or the name of a source, which has `://`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


@click.command()
@options.model_argument(completes=None)
@click.argument("source", type=_FileOrSource(path_type=Path, exists=True), metavar="FILE|DIR|SOURCE")
@options.int_option("--version", "-v", metavar="N", text="Version; default: the highest plus 1.")
@click.option("--load", "loads", is_flag=True, help="Load it, and wait.")
@click.option(
    "--signature",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Signature of a FILE or DIR (OpenSSF model signing); it becomes a file of the version.",
)
@click.option("--digest", metavar="sha256:HEX", help="SHA-256 that a SOURCE must have.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Write it into this repository's folder; no server is asked.",
)
@options.json_option
@options.server_options
def add(
    model: str,
    source: Path | str,
    *,
    version: int | None,
    loads: bool,
    signature: Path | None,
    digest: str | None,
    into: Path | None,
    as_json: bool,
    where: options.ServerChoice,
) -> None:
    """Put a version of a model into the server's repository.

    FILE is an ONNX file; files that it names for its weights go along. DIR is a folder with one model, or a
    snapshot of Hugging Face with onnx/model.onnx. A version is never overwritten. The files are sent one by
    one: after a failure or Ctrl-C, the same command sends those that are missing.

    SOURCE is a name with ://, from which this command downloads the files first, with your credentials:
    hf://ORG/REPO@REVISION, oci://REGISTRY/REPOSITORY:TAG, https://HOST/FILE.onnx, s3://BUCKET/PATH, gs:// or
    az://. The ledger keeps the name, and what it meant, as your statement.

    --into writes a folder for repositories that the server only reads, such as images, volumes and git: the
    ledger then has no VersionAdded of it, and learns of the version when it is loaded.

    --json prints the version with its files, or with --load the load's job.
    """
    if digest is not None and isinstance(source, Path):
        raise click.UsageError("--digest is for a SOURCE, which has ://")
    if signature is not None and not isinstance(source, Path):
        raise click.UsageError("--signature is for a FILE or DIR; the *.sig of a SOURCE comes along with it")
    if into is not None and loads:
        raise click.UsageError(
            "--load asks a server, and --into none: load it once the server has the folder"
        )
    from loadledger.sources import terminal

    try:
        if into is not None:
            from loadledger.sources.folder import write_version

            with terminal.find_or_download(model, source, digest, signature) as local:
                added = write_version(local.files, into, model, version)
                local.discard()
            output.print_result(added, terminal.added_lines(added, local, into), as_json=as_json)
            return
        with options.open_chosen_client(where) as client:
            if not isinstance(source, Path):
                client.health()  # before a download that would be useless
            with terminal.find_or_download(model, source, digest, signature) as local:
                added = terminal.send_version(client, local, model, version)
            if not (as_json and loads):
                output.print_result(added, terminal.added_lines(added, local), as_json=as_json)
            if loads:
                report_request(client, client.load(model, added.version), wait=True, as_json=as_json)
            elif not as_json:
                click.echo(f"to load it: loadledger load {to_printable(model)} --version {added.version}")
    except KeyboardInterrupt:
        output.print_note("interrupted: the same command goes on where this one was")
        sys.exit(output.INTERRUPTED)


@click.command("rm")
@options.model_argument(needs_version=True)
@options.int_option("--version", "-v", metavar="N", text="Version that goes, if MODEL does not name it.")
@click.option("--force", "-f", is_flag=True, help="First end its loads, without waiting for requests.")
@options.server_options
def remove(model: str, *, version: int, force: bool, where: options.ServerChoice) -> None:
    """Remove a version from the server's repository.

    Its files are deleted. A version that is loaded, or will be, is refused without --force, and one that a
    label names always.
    """
    with options.open_chosen_client(where) as client:
        client.remove(model, version, force=force)
    click.echo(f"{to_printable(model)} version {version}: removed")


@click.command()
@options.json_option
@options.server_options
def resources(*, as_json: bool, where: options.ServerChoice) -> None:
    """Show the memory budget, its use, the devices, and waiting jobs.

    Of the devices, the memory of cpu is that of all workers. Below them it says which installed providers
    cannot be used, and why. `loadledger nodes` shows the devices of other nodes as attributes.
    """
    with options.open_chosen_client(where) as client:
        found = client.resources()
    note_not_ready(found)
    output.print_result(found, [status_line(client.url, found), *_resource_lines(found)], as_json=as_json)


def use_row(use: Any, now: datetime) -> tuple[str, ...]:
    """Return the resources of one load, as cells of `COLUMNS`."""
    return (
        format_cell(use.model_id),
        str(use.version),
        format_cell(use.phase),
        str(use.workers),
        format_size(use.memory_bytes),
        format_size(use.reserved_bytes) if use.reserved_bytes else "-",
        str(use.in_flight),
        output.format_age(use.last_used_at, now),
        format_keep_alive(use),
    )


def format_keep_alive(use: Any) -> str:
    if use.pinned:
        return "pinned"
    return "-" if use.keep_alive_s is None or use.keep_alive_s < 0 else f"{use.keep_alive_s}s idle"


def status_line(url: str, found: Any) -> str:
    """Return whether a server is ready, and its counts."""
    loads = f"{output.count_of(len(found.models), 'load')} with processes, {len(found.waiting)} waiting"
    return f"{to_printable(url)}: {'NOT ready' if found.not_ready else 'ready'}, {loads}"


def budget_line(found: Any) -> str:
    free = f"free {format_size(found.free_bytes)}"
    parts = [f"used {format_size(found.used_bytes)}", f"reserved {format_size(found.reserved_bytes)}", free]
    most = f"; at most {found.max_loaded} loaded" if found.max_loaded is not None else ""
    return f"budget {format_size(found.budget_bytes)}: {', '.join(parts)}{most}"


def pressure_line(found: Any) -> str | None:
    """Return the pressure stall information, or None if the kernel has none."""
    if found.pressure is None:
        return None
    shares = {"memory": found.pressure.memory_some_percent, "cpu": found.pressure.cpu_some_percent}
    parts = [f"{name} {value:g} %" for name, value in shares.items() if value is not None]
    return f"pressure of the last 10 s: {', '.join(parts)}" if parts else None


def reloads_line(found: Any) -> str | None:
    """Return the reloads after evictions; None without any."""
    if found.reloads is None:
        return None
    waits = f"inferences spent {found.reloads.share:.0%} of their time waiting for loads"
    limits = ", ".join(map(format_cell, found.reloads.limits))
    tight = f"; no room by {limits}" if limits else ""
    return f"reloads after evictions in the last hour: {found.reloads.last_hour}; {waits}{tight}"


def notice_lines(found: Any, *levels: str) -> list[str]:
    """Return what needs an operator, by default of all levels."""
    return [
        f"{each.title}: {each.why} {each.todo}"
        for each in found.notices
        if not levels or each.level in levels
    ]


def confinement_line(confinement: Any, whose: str = "workers") -> str | None:
    """Return the workers' confinement; None for workers on devices, if there are none."""
    if confinement is None:
        return None
    applied = [f"Landlock {confinement.landlock_abi}"] if confinement.landlock_abi else []
    applied += ["seccomp"] if confinement.seccomp else []
    could = [format_cell(act) for act in confinement.not_prevented]
    return f"{whose} confined by {' and '.join(applied) or 'nothing'}" + (
        f"; not prevented: {', '.join(could)}" if could else ""
    )


def _device_lines(found: Any) -> Iterator[str]:
    """Yield the confinement of workers on devices, a table of the devices, and unusable providers."""
    yield from filter(None, [confinement_line(found.confinement_of_devices, "workers on devices")])
    if found.devices[1:]:  # the first one is the CPU
        yield ""
        yield from format_table(
            DEVICES_HEAD, [_device_row(each) for each in found.devices], right=DEVICES_RIGHT
        )
    yield from map(to_printable, found.device_problems)


def _device_row(device: Any) -> tuple[str, ...]:
    return (
        format_cell(device.device),
        format_cell(f"{device.provider} {device.version}"),
        format_cell(device.hardware, most=60),
        format_size(device.used_bytes),
        format_size(device.reserved_bytes) if device.reserved_bytes else output.NOTHING,
        format_size(device.budget_bytes),
        format_size(device.free_bytes),
        str(device.models),
    )


def _resource_lines(found: Any) -> Iterator[str]:
    now = datetime.now(UTC)
    yield budget_line(found)
    yield f"limit {format_size(found.limit_bytes)} ({format_cell(found.limit_source)})"
    yield format_cell(found.memory.summary, most=1000)
    yield f"threads of each worker: {found.threads}, unless its load says otherwise"
    yield from (format_cell(text, most=1000) for text in notice_lines(found))
    yield from filter(None, [reloads_line(found), pressure_line(found), confinement_line(found.confinement)])
    yield from _device_lines(found)
    if found.models:
        yield ""
        yield from format_table(USE_HEAD, [use_row(use, now) for use in found.models], right=RIGHT)
    if found.waiting:
        yield ""
        rows = [
            (
                format_cell(wait.model_id),
                format_cell(wait.job_id),
                format_size(wait.needs_bytes),
                format_cell(wait.waiting_for),
            )
            for wait in found.waiting
        ]
        yield from format_table(WAITING_HEAD, rows)
