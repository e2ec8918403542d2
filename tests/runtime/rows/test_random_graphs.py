"""Random graphs, drawn by a generator that knows nothing of the walk, and what runs say of their tensors."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.models import parse_model
from support.rowclaims import find_false_claims
from support.rowgraphs import COUPLINGS, DRAWN_OPERATORS, draw_graph

from runtime.rows.walk import judge_rows

PARTS = 8
"""Parts of a test that run side by side."""
GRAPHS = 60
"""Random graphs of a part."""
PROVEN = 0.9
"""Least share of the independent graphs that is shown to be independent."""


@pytest.mark.parametrize("part", range(PARTS))
def test_no_coupled_graph_is_independent(tmp_path: Path, part: int) -> None:
    """Each kind of coupling, at a random place of a random graph."""
    rng = np.random.default_rng([1, part])
    for kind in [*COUPLINGS[part::PARTS], *(None for _ in range(GRAPHS // 2))]:
        drawn = draw_graph(rng, is_coupled=True, coupling=kind)
        path = tmp_path / "model.onnx"
        path.write_bytes(drawn.model.SerializeToString())
        assert judge_rows(path).verdict != "independent", drawn.coupling


@pytest.mark.parametrize("part", range(PARTS))
def test_most_independent_graphs_are_shown_to_be(tmp_path: Path, part: int) -> None:
    """And what is said of each tensor on the way is what runs show."""
    rng = np.random.default_rng([2, part])
    verdicts, reasons = Counter[str](), list[str]()
    for _ in range(GRAPHS):
        drawn = draw_graph(rng, is_coupled=False)
        path = tmp_path / "model.onnx"
        path.write_bytes(drawn.model.SerializeToString())
        judgement = judge_rows(path)
        verdicts[judgement.verdict] += 1
        reasons.append(judgement.reason)
        rows, others = drawn.make_rows(rng, 3), drawn.make_rows(rng, 3)
        assert find_false_claims(path, drawn.model, rows, others) == []
    assert not any("a form that is not understood" in reason for reason in reasons)
    assert verdicts["dependent"] == 0
    assert verdicts["independent"] >= PROVEN * GRAPHS - 4, sorted(filter(None, reasons))  # four are chance


@pytest.mark.parametrize("part", range(PARTS))
def test_each_operator_is_followed(tmp_path: Path, part: int) -> None:
    """Nothing is said of a tensor beside it that runs disprove."""
    rng = np.random.default_rng([3, part])
    for operator in sorted(DRAWN_OPERATORS)[part::PARTS]:
        drawn = draw_graph(rng, is_coupled=False, operator=operator)
        path = tmp_path / "model.onnx"
        path.write_bytes(drawn.model.SerializeToString())
        assert judge_rows(path).verdict != "dependent", operator
        rows, others = drawn.make_rows(rng, 3), drawn.make_rows(rng, 3)
        assert find_false_claims(path, drawn.model, rows, others) == [], operator


def test_runs_disprove_a_false_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else runs that disprove nothing would say nothing."""
    model = parse_model("(float[N, 4] x) => (float[N, 4] y) { y = Softmax<axis = 0>(x) }")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    rows, others = ({"x": np.random.default_rng(each).random((3, 4), np.float32)} for each in (5, 6))
    assert find_false_claims(path, model, rows, others) == []
    monkeypatch.setattr("runtime.rows.values.Call.refuse_axis", lambda *_: None)
    assert find_false_claims(path, model, rows, others)
