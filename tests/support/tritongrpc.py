"""Triton's client of gRPC, unchanged, with a pool of descriptors of its own.

Its messages have the names of KServe's, and all modules of a process share one pool by default.
"""

from importlib import import_module
from typing import Any
from unittest.mock import patch

from google.protobuf import descriptor_pool

triton_pool = descriptor_pool.DescriptorPool()
with patch.object(descriptor_pool, "Default", return_value=triton_pool):
    triton_grpc: Any = import_module("tritonclient.grpc")
    triton_grpc_aio: Any = import_module("tritonclient.grpc.aio")
    _messages = import_module("tritonclient.grpc.service_pb2")


def triton_message(name: str) -> Any:
    """Return the class of a message, such as `ModelInferRequest`."""
    return getattr(_messages, name)
