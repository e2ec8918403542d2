"""The house rules about imports, read from the source: who may know whom, and who may know which library."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("answers", "events", "features", "loadledger", "migrations", "nodes", "runtime", "server")
WORKER = "runtime.worker.main"
# A text such as `loadledger.cli.main:main`, by which something is imported later.
ENTRY_POINT = re.compile(r"(\w+\.)+\w+:\w+")
# The assembly, and commands about a ledger in a database; nothing else knows of several servers.
USERS_OF_NODES = {
    "features.nodes.cli",
    "loadledger.cli.serve",
    "server.app",
}
# What runs in the fork server and in each worker, where the HTTP stack and the log must never be.
CHILD_PROCESSES = ("runtime.process.forkserver", WORKER, "features.grpc.gateway")
# What runs in the process that speaks gRPC.
GATEWAY = ("features.grpc.calls", "features.grpc.gateway")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every name that the file imports, inside functions too; `from a import b` gives `a` and `a.b`."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            # A name that only run time knows could not be held to the rules.
            assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
            yield str(node.args[0].value)
        elif isinstance(node, ast.Constant) and ENTRY_POINT.fullmatch(str(node.value)):
            yield str(node.value).partition(":")[0]


def called(call: ast.Call) -> str:
    """The last name of what is called, or "" if that has no name."""
    return str(getattr(call.func, "attr", "") or getattr(call.func, "id", ""))


@cache
def all_imports() -> dict[str, set[str]]:
    """Return what each module of the product imports."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): set(imports(path)) for path in files}


def top(name: str) -> str:
    return name.partition(".")[0]


def importers_of(*libraries: str) -> set[str]:
    imported = all_imports().items()
    return {module for module, names in imported if any(top(name) in libraries for name in names)}


def packages_that_import(*libraries: str) -> set[str]:
    return {top(module) for module in importers_of(*libraries)}


def own(names: set[str]) -> set[str]:
    """The project's modules among names; importing `a.b` runs `a` too."""
    found = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    return found & all_imports().keys()


@cache
def reachable(module: str) -> set[str]:
    """The project's modules that are imported when this one is."""
    found: set[str] = set()
    todo = {module}
    while todo:
        name = todo.pop()
        found |= own({name})
        todo |= own(all_imports()[name] | {name}) - found
    return found


def without_its_package(names: set[str]) -> set[str]:
    """Leave out `a` of names that have `a.b`."""
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def only_the_worker_uses() -> set[str]:
    """The worker's module, and those that nothing but these imports."""
    imported = {user: own(names) for user, names in all_imports().items()}
    users = {module: {user for user in imported if module in imported[user]} for module in imported}
    found = {WORKER}
    while True:
        more = {module for module, by in users.items() if by and by <= found} - found
        if not more:
            return found
        found |= more


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("answers", {"events", "features", "loadledger", "migrations", "nodes", "runtime", "server"}),
        ("migrations", {"events", "features", "loadledger", "nodes", "runtime", "server"}),
        ("events", {"loadledger", "nodes", "runtime", "server"}),
        ("runtime", {"loadledger", "nodes", "server"}),
        ("server", {"loadledger"}),
        ("nodes", {"loadledger"}),
    ],
)
def test_imports_point_from_the_command_to_server_to_runtime_to_events(package: str, above: set[str]) -> None:
    """What a module reaches through a feature counts, too."""
    back = {
        (module, name)
        for module in all_imports()
        if top(module) == package
        for name in reachable(module)
        if top(name) in above
    }
    assert not back


def test_no_modules_import_each_other() -> None:
    """Nor do more of them in a circle: what imports none of those that are left goes, until none is left."""
    left = {
        module: without_its_package(names & all_imports().keys()) for module, names in all_imports().items()
    }
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left


def test_what_ships_imports_nothing_that_does_not() -> None:
    assert not importers_of("bench", "tests", "tools")


def test_web_framework_appears_in_server_nodes_and_clients_only() -> None:
    assert packages_that_import("aiohttp_apispec") == {"server"}
    beside = {module for module in importers_of("aiohttp") if top(module) not in {"nodes", "server"}}
    beside = {module for module in beside if not re.fullmatch(r"features\.\w+\.(app|routes|setup)", module)}
    clients = {"loadledger.transports.asynchronous"}  # the client for event loops
    assert beside == {*clients, *GATEWAY}


@pytest.mark.parametrize(
    ("drivers", "package"),
    [(("sqlite3", "aiosqlite"), "events.sqlite."), (("asyncpg", "psycopg"), "nodes.postgres.")],
)
def test_database_driver_appears_in_its_storage_only(drivers: tuple[str, ...], package: str) -> None:
    assert not {module for module in importers_of(*drivers) if not module.startswith(package)}


@pytest.mark.parametrize(
    ("library", "module"),
    [("obstore", "cloud"), ("huggingface_hub", "huggingface"), ("urllib.request", "web")],
)
def test_client_of_a_source_appears_in_its_module_only(library: str, module: str) -> None:
    users = {user for user, names in all_imports().items() if library in names}
    assert users == {f"loadledger.sources.{module}"}


def test_server_and_runtime_have_no_client_of_http() -> None:
    """Nodes ask each other, and telemetry has its own; nothing else in a server connects."""
    clients = {
        "urllib.request",
        "http.client",
        "requests",
        "httpx",
        "aiohttp.client",
        "aiohttp.ClientSession",
    }
    users = {user for user, names in all_imports().items() if names & clients}
    assert {user for user in users if top(user) in {"events", "runtime", "server"}} == set()


def test_grpc_appears_in_its_gateway_only() -> None:
    assert importers_of("grpc") == {*GATEWAY}
    assert {module for module in importers_of("google") if not module.startswith("features.grpc.")} == set()


def test_only_the_assembly_and_commands_import_the_nodes() -> None:
    users = {user for user, names in all_imports().items() if any(top(name) == "nodes" for name in names)}
    assert {user for user in users if top(user) != "nodes"} <= USERS_OF_NODES


def test_onnx_runtime_appears_in_the_worker_only() -> None:
    assert importers_of("onnxruntime")
    assert importers_of("onnxruntime") <= only_the_worker_uses()


@pytest.mark.parametrize("module", CHILD_PROCESSES)
def test_a_child_process_imports_nothing_of_server_or_events(module: str) -> None:
    assert not {name for name in reachable(module) if top(name) in {"server", "events"}}


def test_no_module_hides_an_import_behind_type_checking() -> None:
    hidden = {
        path.relative_to(ROOT)
        for folder in (*PACKAGES, "bench", "examples", "tests", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__) and "TYPE_CHECKING" in path.read_text(encoding="utf-8")
    }
    assert not hidden


def test_a_folder_of_runtime_and_server_imports_nothing_by_itself() -> None:
    """Else whoever wants one module of it, a worker most of all, would have the others too."""
    files = [*(ROOT / "runtime").glob("*/__init__.py"), *(ROOT / "server").glob("*/__init__.py")]
    assert files
    assert not {module_name(file): names for file in files if (names := all_imports()[module_name(file)])}
