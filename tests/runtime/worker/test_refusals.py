"""Errors of a refused model: plain words and the cure come first, ONNX Runtime's own text after them."""

from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto, helper
from support import models
from support.models import FLOAT, model, save, value
from support.workers import Serve, ask, floats, order_of, refusal

from runtime.errors import InvalidInput
from runtime.process.pool import WorkerPool


def of_operator(operator: str, domain: str = "", element: int = FLOAT) -> ModelProto:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    made = model([node], [value("x", element, [1])], [value("y", element, [1])])
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def versioned(*, ir_version: int | None = None, opset: int | None = None) -> ModelProto:
    made = models.identity()
    made.ir_version = ir_version or made.ir_version
    made.opset_import[0].version = opset or made.opset_import[0].version
    return made


REFUSED = {
    "IR version": (versioned(ir_version=99), "the file has IR version 99", "or update onnxruntime"),
    "opset": (
        versioned(opset=99),
        "opset 99 of ai.onnx",
        "or lower, or update onnxruntime",
    ),
    "no operator": (of_operator("Frobnicate"), "has no operator Frobnicate", "with a newer opset"),
    "later operator": (
        of_operator("Swish"),
        "opset 18, which",
        "with a newer opset",
    ),
    "custom operator": (of_operator("Foo", "com.acme"), "the operator Foo of com.acme", "standard operators"),
    "datatype": (
        of_operator("Erf", element=TensorProto.BOOL),
        "tensor(bool) to the operator Erf",
        "FP32",
    ),
}


@pytest.mark.parametrize(("onnx_model", "wrong", "cure"), REFUSED.values(), ids=list(REFUSED))
async def test_refused_model_says_what_is_wrong_and_the_cure_first(
    pool: WorkerPool, tmp_path: Path, onnx_model: ModelProto, wrong: str, cure: str
) -> None:
    save(onnx_model, tmp_path, "m")
    plain, says, original = str(await refusal(pool, order_of(tmp_path))).partition(" ONNX Runtime says: ")
    assert wrong in plain
    assert cure in plain
    assert says
    for noise in ("[ONNXRuntimeError]", "onnxruntime_src", str(tmp_path), "Load model from"):
        assert noise not in original


async def test_refused_length_names_input_and_dimension(serve: Serve) -> None:
    worker = await serve(models.identity(shape=(2,)))
    with pytest.raises(InvalidInput, match=r"input .x. has the length 3 in dimension 0, and .* takes 2"):
        await ask(worker, [floats("x", 1, 2, 3)])


async def test_refused_rank_names_the_input(serve: Serve) -> None:
    worker = await serve(models.identity(shape=(2, 2)))
    with pytest.raises(InvalidInput, match="input 'x' has 1 dimensions, and the model takes 2"):
        await ask(worker, [floats("x", 1, 2)])
