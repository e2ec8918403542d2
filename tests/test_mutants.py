"""The drawing of mutants (`tools.mutants`): they are small changes that Python accepts."""

from tools.mutants import ROOT, draw_mutants

KINDS = {"condition negated", "bound off by one", "call dropped", "check skipped"}


def test_drawn_mutants_are_small_changes_that_compile() -> None:
    drawn = draw_mutants(7, 200)
    assert len(set(drawn)) == 200
    assert {mutant.kind for mutant in drawn} == KINDS
    for mutant in drawn:
        source = (ROOT / mutant.path).read_bytes()
        assert source[mutant.start : mutant.end].decode() == mutant.before
        compile(source[: mutant.start] + mutant.after.encode() + source[mutant.end :], mutant.path, "exec")
