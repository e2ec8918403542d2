"""Triton's Python backend around a session: the `model.py` of each model in its repository.

It runs in Triton's own environment, beside its model, so it imports nothing of ours.
"""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb  # type: ignore[import-not-found]


class TritonPythonModel:
    """One session of ONNX Runtime's defaults, with the number of threads that the configuration has."""

    def initialize(self, args: dict[str, str]) -> None:
        """Create the session."""
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["threads"]["string_value"])
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs = (
            [tensor["name"] for tensor in config[kind]] for kind in ("input", "output")
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer what Triton hands over at once, one after the other."""
        return [pb.InferenceResponse(self._run(request)) for request in requests]

    def _run(self, request: Any) -> list[Any]:
        values = {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        return list(map(pb.Tensor, self._outputs, self._session.run(self._outputs, values)))
