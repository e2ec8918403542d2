"""Translates errors of ONNX Runtime, about a model or its inputs, into plain words with the remedy.

ONNX Runtime's texts begin with codes, folders of this server and places in its source. These patterns match
the texts of 1.31 and 1.32, and of OpenVINO's plugin 1.8.1.
"""

import re

import onnxruntime as ort

_NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : "  # the code
    r"|Load model from .*? failed:"  # a path in the store
    r"|/onnxruntime_src/\S+ .*?\)(?: const)? (?=\S)"  # a place in the source, and the function
    r"|This is an invalid model\. |Fatal error: |Exception during initialization: "
    # Of OpenVINO, places in its source and the report around the one line that says why:
    r"|Check '[^']*' failed at \S+:\d+:|Exception from \S+:\d+:|\[OpenVINO-EP\] \S+:\d+ - "
    r"|FrontEnd API failed with \w+:|Model wasn't fully converted\. .*? log:|-- \S+ with a message:"
    r"|While validating node '[^']*' with friendly_name '[^']*':|Summary:\s+-- Conversion .*"
    r"|Non-zero status code returned while running OpenVINO\S+ node\. Name:'\S+' Status Message: ",
    re.DOTALL,
)
MAX_CHARACTERS = 4096
"""Length of a text that is read: a model's names may be in it."""
_RUNTIME = f"this server's ONNX Runtime {ort.__version__}"
_KNOWN = {
    re.compile(pattern, re.DOTALL): " ".join(text.split())
    for pattern, text in {
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)": rf"""
            the file has IR version \1, and {_RUNTIME} reads versions up to \2: export the model again with an
            older onnx package, or set model.ir_version to \2, or update onnxruntime""",
        r"Opset (\d+) is under development.*domain (\S+) is till opset (\d+)": rf"""
            the model declares opset \1 of \2, and {_RUNTIME} supports up to \3: export it again with opset \3
            or lower, or update onnxruntime""",
        r"No Op registered for (\w+) with domain_version of (\d+)": r"""
            opset \2, which the model declares, has no operator \1: export the model again with a newer opset,
            or without that operator""",
        r"(\S+?):(\w+)\(-?\d+\) is not a registered function/op": rf"""
            {_RUNTIME} does not have the operator \2 of \1: export the model again with standard operators""",
        r"Could not find an implementation for (\w+)\((\d+)\)": rf"""
            {_RUNTIME} has no \1 (opset \2) for these datatypes on a CPU: export the model again in FP32""",
        r"Type '(.+?)' of input parameter \(.*?\) of operator \((\w+)\)": r"""
            the model gives \1 to the operator \2, which does not take it: export it again in FP32""",
        r"Got invalid dimensions for input: (\S+) .*?index: (\d+) Got: (\d+) Expected: (\d+)": r"""
            input '\1' has the length \3 in dimension \2, and the model takes \4""",
        r"Invalid rank for input: (\S+) Got: (\d+) Expected: (\d+)": r"""
            input '\1' has \2 dimensions, and the model takes \3""",
    }.items()
}
"""Patterns of errors, and the plain words that go before each error."""


def strip_noise(text: str) -> str:
    """Return a text of ONNX Runtime without its codes, the server's folders and places in its source."""
    return " ".join(_NOISE.sub("", text[:MAX_CHARACTERS]).split())


def explain_refusal(text: str, otherwise: str) -> str:
    """Return an error of ONNX Runtime with plain words before its own text.

    Args:
        text: the text of ONNX Runtime's exception.
        otherwise: the plain words for an error that is not recognised.
    """
    said = strip_noise(text)
    found = ((pattern.search(said), plain) for pattern, plain in _KNOWN.items())
    plain = next((match.expand(plain) for match, plain in found if match is not None), otherwise)
    return f"{plain}. ONNX Runtime says: {said}"
