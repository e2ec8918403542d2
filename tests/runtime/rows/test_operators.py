"""The table of operators beside the definitions of ONNX and ONNX Runtime."""

from collections import defaultdict

import numpy as np
import onnx.defs
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from support.rowgraphs import COUPLINGS, DRAWN_OPERATORS, draw_graph

from runtime.rows.operators import MICROSOFT, NEWEST, TABLE

ONLY_OF_RUNTIME = "SimplifiedLayerNormalization"
"""ONNX Runtime has it in ONNX's own domain, where `onnx` does not know it: no drawn model may have it."""


def defined_versions(domain: str) -> dict[str, set[int]]:
    found = defaultdict[str, set[int]](set)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == domain:
            found[schema.name].add(schema.since_version)
    return found


@pytest.mark.parametrize("domain", ["", "ai.onnx.ml"])
def test_each_version_of_an_operator_was_read(domain: str) -> None:
    """A new version of an operator is in no line until somebody has read its page."""
    defined = defined_versions(domain)
    newest = onnx.defs.onnx_opset_version() if not domain else max(map(max, defined.values()))
    assert newest <= NEWEST[domain]
    for name, line in TABLE[domain].items():
        if name != ONLY_OF_RUNTIME:
            assert defined[name] <= set(line.versions), name
            assert {each for each in line.versions if each <= newest} == defined[name], name


def test_each_contributed_operator_exists() -> None:
    names = {each.name for each in runtime.get_all_operator_schema() if each.domain == "com.microsoft"}
    assert set(MICROSOFT) <= names


def test_each_operator_of_the_table_is_drawn() -> None:
    """As a step that keeps rows apart, or as one that couples them."""
    rng = np.random.default_rng(7)
    coupled = {
        name for kind in COUPLINGS for name in draw_graph(rng, is_coupled=True, coupling=kind).operators
    }
    wanted = {f"{domain}.{name}" if domain else name for domain in TABLE for name in TABLE[domain]}
    assert wanted - DRAWN_OPERATORS - coupled == {ONLY_OF_RUNTIME}
