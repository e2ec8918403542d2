"""Triton's Python backend around the model that adds one: the `model.py` of its repository.

It runs in Triton's own environment, beside its model, so it imports nothing of ours.
"""

from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb  # type: ignore[import-not-found]


class TritonPythonModel:
    """One session of one thread, as a worker of ours has."""

    def initialize(self, args: dict[str, str]) -> None:
        """Create the session."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer what Triton hands over at once, one after the other."""
        return [pb.InferenceResponse([pb.Tensor("y", self._run(request))]) for request in requests]

    def _run(self, request: Any) -> Any:
        values = pb.get_input_tensor_by_name(request, "x").as_numpy()
        return self._session.run(["y"], {"x": values})[0]
