"""The descriptors of gRPC's messages, from their .proto files."""

from pathlib import Path
from tempfile import TemporaryDirectory

from grpc_tools import protoc

FOLDER = Path("features/grpc")
SOURCES = ("open_inference.proto", "health.proto")
DESCRIPTORS = FOLDER / "protocol.pb"


def descriptors(root: Path) -> bytes:
    """Return the encoded FileDescriptorSet of the .proto files in a tree."""
    with TemporaryDirectory() as made:
        path = Path(made) / DESCRIPTORS.name
        arguments = ("protoc", f"--proto_path={root / FOLDER}", f"--descriptor_set_out={path}", *SOURCES)
        if protoc.main(arguments):
            raise ValueError(f"{', '.join(SOURCES)}: protoc refuses them")
        return path.read_bytes()
