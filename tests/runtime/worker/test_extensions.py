"""Operators of ONNX Runtime Extensions: in confined workers, and the advice where they are not installed."""

import base64
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from support import models
from support.models import FLOAT, STRING, save, value
from support.workers import Serve, answer

from runtime.errors import LoadRefused
from runtime.onnxfile import read_domains
from runtime.wire import Tensor
from runtime.worker import extensions, sessions

pytest.importorskip("onnxruntime_extensions", reason="it is made for Python 3.11 to 3.13")

JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5a"
    "YVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wAAR"
    "CAAIAAgDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAL/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFAEBAAAAAAAAAAAAAAAAAAAA"
    "Bf/EABQRAQAAAAAAAAAAAAAAAAAAAAD/2gAMAwEAAhEDEQA/AJADn3//2Q=="
)
"""8 by 8 pixels of one colour: red 200, green 100, blue 50."""


def model(
    domain: str, nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, *weights: Any
) -> onnx.ModelProto:
    made = models.model(nodes, inputs, outputs, weights)
    made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def mean_colour() -> onnx.ModelProto:
    """The mean of an image's colours, halved by a convolution; it takes the bytes of a file."""
    domain = "com.microsoft.extensions"
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    kernel = helper.make_tensor("kernel", FLOAT, [3, 3, 1, 1], [0.5, 0, 0, 0, 0.5, 0, 0, 0, 0.5])
    nodes = [
        helper.make_node("DecodeImage", ["image"], ["pixels"], domain=domain),
        helper.make_node("Cast", ["pixels"], ["floats"], to=FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[2, 0, 1]),
        helper.make_node("Unsqueeze", ["planes", "first"], ["batch"]),
        helper.make_node("Conv", ["batch", "kernel"], ["halved"]),
        helper.make_node("ReduceMean", ["halved", "axes"], ["mean"], keepdims=0),
    ]
    first = helper.make_tensor("first", TensorProto.INT64, [1], [0])
    inputs, outputs = [value("image", TensorProto.UINT8, [None])], [value("mean", FLOAT, [1, 3])]
    return model(domain, nodes, inputs, outputs, axes, kernel, first)


def upper_case() -> onnx.ModelProto:
    node = helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")
    return model("ai.onnx.contrib", [node], [value("x", STRING, [None])], [value("y", STRING, [None])])


async def test_model_that_takes_a_jpeg_answers_in_a_confined_worker(serve: Serve) -> None:
    worker = await serve(mean_colour())  # not warmed up on zeros, which end the process
    [means] = await answer(worker, Tensor("image", "UINT8", (len(JPEG),), JPEG))
    assert means == pytest.approx([25, 50, 100], abs=2)  # the operator has blue first


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "LIBRARY", None)
    folder = save(mean_colour(), tmp_path, "m")
    with pytest.raises(LoadRefused, match=r"pip install 'loadledger\[extensions\]'") as refused:
        sessions.create_checked(folder, tmp_path, sessions.session_options(1), "")
    assert refused.value.code == "invalid_model"
    folder = save(models.unknown_operator(), tmp_path, "unknown")
    with pytest.raises(LoadRefused) as refused:
        sessions.create_checked(folder, tmp_path, sessions.session_options(1), "")
    assert "extensions" not in str(refused.value)


def test_operator_sets_of_a_model_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m" / "1" / "model.onnx"
    for made, domains in ((models.add(), {""}), (upper_case(), {"", "ai.onnx.contrib"})):
        save(made, tmp_path, "m")
        assert read_domains(path) == domains | {each.domain for each in made.opset_import}
        path.write_bytes(path.read_bytes()[:-3])
        read_domains(path)
    empty = tmp_path / "empty.onnx"
    empty.touch()
    assert read_domains(empty) == frozenset()
