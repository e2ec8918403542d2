"""Asks if tests notice small changes of the product: `python -m tools.mutants --seed 1` (`make mutants`).

Each mutant changes one random place in a package. The tests that enter the changed function run, those that
enter the fewest functions first, until one fails; a mutant that no test notices has survived. A first run of
all tests, in a copy of the tree, records which tests enter which functions (`tools.calltrace`), which takes
Python 3.12 or later.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import pytest

from tools.calltrace import FOLDER, PACKAGES

ROOT = Path(__file__).parent.parent
TREE = "LC_MUTANTS"
"""The environment variable for the copy of the tree that Python processes import the product from."""
WRITES_NOTHING = "PYTHONDONTWRITEBYTECODE"
HOOK = (
    f'import os, sys; tree = os.environ.get("{TREE}"); tree and sys.path.insert(0, tree);'
    f' tree and "{FOLDER}" in os.environ and __import__("tools.calltrace")\n'
)
"""A line of a .pth file: it runs at the start of each process, isolated ones included."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TRACED = ("-p", "tools.calltrace", "-W", "ignore::pytest.PytestAssertRewriteWarning")
CACHE = "cache"
"""pytest's, in the folder of the records: it has the tests that fail without a mutant."""
LIMIT_S = 900
"""For one run of pytest, in which a mutant may hang."""
MISSING = ("ERROR: not found: ", "ERROR: file or directory not found: ")
"""Beginnings of lines that pytest prints for a test that is not there."""
FIRST_BATCH, GROWTH, LARGEST_BATCH = 8, 4, 400
"""Tests in a run of pytest: few at first, as most mutants are found soon; a command line has a limit."""
FILE_COST = 20
"""How many times later a whole file of tests is run than a test that enters as many functions."""
BOUNDS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}


@dataclass(frozen=True)
class Mutant:
    """One change of a module."""

    path: str
    function: str
    """Its qualified name; "" for code of the module or of a class."""
    line: int
    kind: str
    before: str
    after: str
    start: int
    """In bytes of the file."""
    end: int

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line} {self.function or '(module)'}: {self.kind}: {before} -> {after}"


class MutantFinder(ast.NodeVisitor):
    """Collects all mutants of a module."""

    def __init__(self, path: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._path, self._source = path, source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._names: list[str] = []
        self._functions = 0
        self.visit(ast.parse(source))

    def _add(self, node: ast.expr | ast.stmt, kind: str, after: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        before = self._source[start:end].decode()
        names = self._names[:-1] if self._names[-1:] == ["<locals>"] else self._names
        function = ".".join(names) if self._functions else ""
        self.found.append(Mutant(self._path, function, node.lineno, kind, before, after, start, end))

    def _negate(self, test: ast.expr) -> None:
        self._add(test, "condition negated", f"(not ({ast.unparse(test)}))")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        self._names.append(node.name)
        self._functions += 1
        self._names.append("<locals>")
        for statement in node.body:
            self.visit(statement)
        self._names[-2:] = []
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    def visit_If(self, node: ast.If) -> None:
        self._negate(node.test)
        if not node.orelse and isinstance(node.body[-1], ast.Raise | ast.Return):
            self._add(node.test, "check skipped", "False")
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if not isinstance(node.test, ast.Constant):
            self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and (other := BOUNDS.get(type(node.ops[0]))):
            changed = ast.Compare(node.left, [other()], node.comparators)
            self._add(node, "bound off by one", f"({ast.unparse(changed)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int:
            self._add(node, "bound off by one", str(node.value + 1))

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(call, ast.Call) and not ast.unparse(call.func).startswith("logger."):
            self._add(node, "call dropped", "pass")
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave out the text of messages: positions in it are those of the string before Python 3.12."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Match(self, node: ast.Match) -> None:
        for case in node.cases:  # a pattern is no expression
            for part in filter(None, (case.guard, *case.body)):
                self.visit(part)


def draw_mutants(seed: int, count: int) -> list[Mutant]:
    """Return different random mutants, as many of each package as of any other, as far as it has them.

    A kind is drawn first, then a place, so that rare kinds come as often as frequent ones.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeatable, not secret
    left: dict[str, dict[str, list[Mutant]]] = {package: defaultdict(list) for package in PACKAGES}
    for package, kinds in left.items():
        for path in sorted((ROOT / package).rglob("*.py")):
            for mutant in MutantFinder(str(path.relative_to(ROOT)), path.read_bytes()).found:
                kinds[mutant.kind].append(mutant)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(left.values()):
        for package in [package for package, kinds in left.items() if kinds]:
            kind = rng.choice(sorted(left[package]))
            places = left[package][kind]
            drawn.append(places.pop(rng.randrange(len(places))))
            if not places:
                del left[package][kind]
    return drawn[:count]


class Calls:
    """Which tests enter which functions, as `tools.calltrace` recorded it."""

    def __init__(self, folder: Path) -> None:
        self._tests: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._sizes: dict[str, int] = defaultdict(int)
        failed = folder / CACHE / "v" / "cache" / "lastfailed"
        self.fails = list(json.loads(failed.read_text())) if failed.exists() else list[str]()
        fails = {name.partition("[")[0] for name in self.fails}
        for record in filter(Path.is_file, folder.iterdir()):
            for line in record.read_text().splitlines():
                test, path, function = line.split("\t")
                exact = test.startswith("=")
                name = test.removeprefix("=").partition("[")[0] if exact else test.partition("::")[0]
                function = innermost(function)
                if name and name not in self._tests[path, function] and name not in fails:
                    self._tests[path, function].add(name)
                    self._sizes[name] += 1

    def find(self, mutant: Mutant) -> list[str]:
        """Return ids of tests and paths of test files, those that enter the fewest functions first."""
        if mutant.function:
            found = self._tests[mutant.path, mutant.function]
        else:
            found = set().union(*(tests for (path, _), tests in self._tests.items() if path == mutant.path))
        ordered = sorted(
            found, key=lambda name: (self._sizes[name] * (1 if "::" in name else FILE_COST), name)
        )
        return [name for name in ordered if "::" not in name or name.partition("::")[0] not in found]


def innermost(function: str) -> str:
    """Return the qualified name of the named function that a lambda or a generator expression is part of."""
    names = function.split(".<locals>.")
    while names[-1].startswith("<"):
        names.pop()
        if not names:
            return ""
    return ".<locals>.".join(names)


def copy_tree(folder: Path) -> None:
    """Copy the files that git knows, changed or not, and new ones."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def compile_tree(tree: Path) -> None:
    """Write the compiled form of product and tests: later processes write none, also not of mutants."""
    writing = {name: value for name, value in environment(tree).items() if name != WRITES_NOTHING}
    for command in (
        [sys.executable, "-m", "compileall", "-q", *PACKAGES],
        [*PYTEST, "-n", "0", "--collect-only"],
    ):
        subprocess.run(command, cwd=tree, check=False, env=writing, capture_output=True)  # noqa: S603 - our own


def environment(tree: Path) -> dict[str, str]:
    """Return the environment of tests of a tree."""
    return os.environ | {TREE: str(tree), WRITES_NOTHING: "1"}


def record_calls(tree: Path, folder: Path) -> None:
    """Run all tests; record which functions they enter, and which tests fail already.

    Raises:
        SystemExit: pytest could not run them.
    """
    folder.mkdir(parents=True)
    traced = environment(tree) | {FOLDER: str(folder)}
    cached = ("-p", "cacheprovider", "-o", f"cache_dir={folder / CACHE}")
    ran = subprocess.run([*PYTEST, *TRACED, *cached], cwd=tree, check=False, env=traced)  # noqa: S603 - our own
    if ran.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit("pytest could not run the tests, so none is known that enters a mutant")


def try_mutant(mutant: Mutant, calls: Calls, tree: Path) -> str:
    """Return the first test that fails for a mutant; "" if it survives."""
    module = tree / mutant.path
    source = module.read_bytes()
    changed = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
    compile(changed, mutant.path, "exec")
    try:
        module.write_bytes(changed)
        return run_tests(calls.find(mutant), calls.fails, tree)
    finally:
        module.write_bytes(source)


def run_tests(tests: list[str], fails: Iterable[str], tree: Path) -> str:
    """Return the first of these tests that fails, but for those that fail anyway; "" if all pass.

    Raises:
        SystemExit: one of them is not there.
    """
    deselected = [f"--deselect={name}" for name in fails]
    for names in batches(tests):
        command = [*PYTEST, "-n", "0", "-x", "--no-header", *deselected, *names]
        try:
            ran = subprocess.run(  # noqa: S603 - our own command
                command,
                cwd=tree,
                check=False,
                env=environment(tree),
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {LIMIT_S} s"
        lines = ran.stdout.splitlines() + ran.stderr.splitlines()
        if any(line.startswith(MISSING) for line in lines):
            raise SystemExit("the records name a test that is not there: they are of other tests")
        if ran.returncode:
            return next(
                (line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "?"
            )
    return ""


def batches(tests: list[str]) -> Iterator[list[str]]:
    """Yield the tests of each run of pytest."""
    size = FIRST_BATCH
    while tests:
        yield tests[:size]
        tests = tests[size:]
        size = min(size * GROWTH, LARGEST_BATCH)


def try_mutants(mutants: Iterable[Mutant], calls: Calls, trees: list[Path]) -> int:
    """Try mutants, one at a time in each tree; print what found each, and return how many survived."""
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def survives(mutant: Mutant) -> bool:
        tree = free.get()
        try:
            found = try_mutant(mutant, calls, tree)
        finally:
            free.put(tree)
        print(*(("found", mutant, f"({found[:150]})") if found else ("SURVIVED", mutant)), flush=True)  # noqa: T201
        return not found

    with ThreadPoolExecutor(len(trees)) as pool:
        return sum(pool.map(survives, mutants))


def main() -> None:
    """Draw mutants, and try them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, required=True, help="repeats the mutants of the same product")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", type=int, nargs="*", help="try these of the drawn mutants, numbered from 1")
    parser.add_argument(
        "--calls", type=Path, help="the folder for the first run's records, or with those of an earlier one"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and try none")
    options = parser.parse_args()
    mutants = draw_mutants(options.seed, options.count)
    if options.only:
        mutants = [mutants[number - 1] for number in options.only]
    if options.list:
        print(*(f"{number}. {mutant}" for number, mutant in enumerate(mutants, 1)), sep="\n")  # noqa: T201
        return
    hook = Path(sysconfig.get_path("purelib"), "loadledger-mutants.pth")
    hook.write_text(HOOK)
    try:
        with TemporaryDirectory(prefix="mutants-") as work:
            trees = [Path(work, str(number)) for number in range(len(os.sched_getaffinity(0)))]
            for tree in trees:
                copy_tree(tree)
                compile_tree(tree)
            records = options.calls or Path(work, "calls")
            if not records.exists():
                record_calls(trees[0], records)
            survived = try_mutants(mutants, Calls(records), trees)
    finally:
        hook.unlink()
    print(f"{len(mutants) - survived} of {len(mutants)} found, {survived} survived")  # noqa: T201


if __name__ == "__main__":
    main()
