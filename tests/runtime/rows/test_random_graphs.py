"""Random graphs, drawn by a generator that knows nothing of the walk, and what runs say of their tensors."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.fleet import of_both
from support.models import parse_model
from support.rowclaims import find_false_claims
from support.rowgraphs import COUPLINGS, DRAWN_OPERATORS, DrawnGraph, draw_graph

from runtime.rows.judgement import Judgement
from runtime.rows.walk import judge_rows

PARTS = 8
"""Parts of a test that run side by side."""
GRAPHS = of_both(short=24, long=1000)
"""Random graphs of a part."""
COUNTED = of_both(short=400, long=4000)
"""Random graphs of which most are shown to be independent."""
WRITING = "BatchNormalization in training"
"""A coupling for which ONNX Runtime 1.32 writes into constants of the model, which differ from run to run."""
PROVEN = 0.9
"""Least share of these."""


def judge(root: Path, drawn: DrawnGraph) -> Judgement:
    path = root / "model.onnx"
    path.write_bytes(drawn.model.SerializeToString())
    return judge_rows(path)


def check_tensors(root: Path, drawn: DrawnGraph, rng: np.random.Generator) -> None:
    rows, others = drawn.make_rows(rng, 3), drawn.make_rows(rng, 3)
    assert find_false_claims(root / "model.onnx", drawn.model, rows, others) == []


@pytest.mark.parametrize("part", range(PARTS))
def test_no_coupled_graph_is_independent(tmp_path: Path, part: int) -> None:
    """Each kind of coupling, at a random place of a random graph, and as many of any kind."""
    rng = np.random.default_rng([1, part])
    kinds = COUPLINGS[part::PARTS]
    for kind in [*kinds, *(None for _ in range(of_both(short=len(kinds), long=GRAPHS)))]:
        drawn = draw_graph(rng, is_coupled=True, coupling=kind)
        assert judge(tmp_path, drawn).verdict != "independent", drawn.coupling


def test_most_independent_graphs_are_shown_to_be(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    judged = [judge(tmp_path, draw_graph(rng, is_coupled=False)) for _ in range(COUNTED)]
    verdicts = Counter(each.verdict for each in judged)
    reasons = sorted(filter(None, (each.reason for each in judged)))
    assert verdicts["dependent"] == 0, reasons
    assert verdicts["independent"] >= PROVEN * COUNTED, reasons
    assert not any("a form that is not understood" in reason for reason in reasons)


@pytest.mark.parametrize("part", range(PARTS))
def test_runs_agree_with_what_is_said_of_each_tensor(tmp_path: Path, part: int) -> None:
    rng = np.random.default_rng([3, part])
    for number in range(GRAPHS):
        drawn = draw_graph(rng, is_coupled=number % 4 == 0)
        judge(tmp_path, drawn)
        if not drawn.coupling.startswith(WRITING):
            check_tensors(tmp_path, drawn, rng)


@pytest.mark.parametrize("part", range(PARTS))
def test_each_operator_is_followed(tmp_path: Path, part: int) -> None:
    rng = np.random.default_rng([4, part])
    for operator in sorted(DRAWN_OPERATORS)[part::PARTS]:
        drawn = draw_graph(rng, is_coupled=False, operator=operator)
        assert judge(tmp_path, drawn).verdict != "dependent", operator
        check_tensors(tmp_path, drawn, rng)


def test_runs_disprove_a_false_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else runs that agree would say nothing."""
    model = parse_model("(float[N, 4] x) => (float[N, 4] y) { y = Softmax<axis = 0>(x) }")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    rows, others = ({"x": np.random.default_rng(each).random((3, 4), np.float32)} for each in (5, 6))
    assert find_false_claims(path, model, rows, others) == []
    monkeypatch.setattr("runtime.rows.values.Call.refuse_axis", lambda *_: None)
    assert find_false_claims(path, model, rows, others)
