"""Mutants (`tools.mutants`): small changes of a module that Python accepts."""

import pytest

from tools.mutants import ROOT, MutantFinder

KINDS = {"condition negated", "bound off by one", "call dropped", "check skipped"}


@pytest.mark.parametrize("path", ["events/log.py", "server/http/connection.py"])
def test_mutants_are_small_changes_that_compile(path: str) -> None:
    source = (ROOT / path).read_bytes()
    found = MutantFinder(path, source).found
    assert {mutant.kind for mutant in found} == KINDS
    for mutant in found:
        assert source[mutant.start : mutant.end].decode() == mutant.before
        changed = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
        assert changed != source
        compile(changed, path, "exec")
