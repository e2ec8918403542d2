"""The messages of Triton's gRPC client, in a descriptor pool of their own.

KServe's client registers the same names in the pool that all modules of a process share, so a process of its
own imports Triton's.
"""

import subprocess
import sys
from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_SCRIPT = """
import sys
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2
found = FileDescriptorSet()
for module in (model_config_pb2, service_pb2):
    module.DESCRIPTOR.CopyToProto(found.file.add())
sys.stdout.buffer.write(found.SerializeToString())
"""


@cache
def triton_pool() -> DescriptorPool:
    """Return the descriptors of `model_config.proto` and `grpc_service.proto`."""
    printed = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, stdout=subprocess.PIPE).stdout
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(printed).file:
        pool.Add(file)  # type: ignore[no-untyped-call]
    return pool


def triton_message(name: str) -> Any:
    """Return the class of a message, such as `ModelInferRequest`."""
    found = triton_pool().FindMessageTypeByName(f"inference.{name}")  # type: ignore[no-untyped-call]
    return GetMessageClass(found)
