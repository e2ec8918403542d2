"""Model versions that callers put into the repository, or remove from it.

An upload arrives in a staging folder inside the repository, becomes durable as an event, and is then visible
by one rename. A start of the server finishes what has its event, and discards the rest.

- `paths`: which paths a version's files may have
- `tarstream`: reads a tar as it arrives, and trusts nothing in it
- `outline`: whether a file is an ONNX file
- `receiving`: one upload on its way to the disk: limits, hashes, and what is no model
- `staging`: the staging folder, the rename, and what is left of uploads that ended early
- `uploads`: the way of one upload or removal, in threads with time limits, and its event
"""
