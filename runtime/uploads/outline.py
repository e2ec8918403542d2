"""Whether a file is an ONNX file, by its outline: for what nobody has loaded, and nobody is about to."""

import mmap
from pathlib import Path

from runtime.onnxfields import ReferenceReader, TooManyFields, Unparsable
from runtime.onnxfile import describe_foreign_content, read_head

GRAPH = 7
"""The field of an ONNX file that has its graph."""


def describe_foreign_file(path: Path) -> str | None:
    """Return what a file is instead of an ONNX file, as `describe_foreign_content`; None if it has a graph.

    Only the outline of the whole file is looked at; weights are not read.

    Raises:
        OSError: it cannot be read.
    """
    foreign = describe_foreign_content(*read_head(path))
    if foreign is not None:
        return foreign
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            has_graph = any(each.number == GRAPH for each in ReferenceReader(data).read_all(0, len(data)))
        except (Unparsable, TooManyFields):
            has_graph = False
    return None if has_graph else "is no ONNX file, or not all of one"
