"""The messages of `open_inference.proto` and `health.proto`, from their descriptors in `protocol.pb`.

`make generated` writes that file. The messages have a descriptor pool of their own, so they do not collide
with those of a client's package in the same process.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

DESCRIPTORS = "protocol.pb"
MALFORMED = (DecodeError, UnicodeDecodeError)
"""Errors of decoding; the second one is of the library's implementation in Python."""

pool = DescriptorPool()
for _file in FileDescriptorSet.FromString(files(__package__).joinpath(DESCRIPTORS).read_bytes()).file:
    pool.Add(_file)  # type: ignore[no-untyped-call]


def message_class(name: str) -> Any:
    """Return the class of a message by its full name, such as `inference.ModelInferRequest`."""
    return GetMessageClass(pool.FindMessageTypeByName(name))  # type: ignore[no-untyped-call]
