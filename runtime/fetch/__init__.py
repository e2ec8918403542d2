"""Versions that come from a source: fetched once, pinned to their bytes, added as an upload is.

A fetch is an add, never a load: a job that ends with `VersionAdded`. What talks to the network runs in a
process of its own, which has no ledger, no key and no file to write: it resolves the name, and sends the
bytes through a pipe to the server, which limits, hashes and writes them (`runtime.uploads`).

- `sources`: a source's name, and which of them the operator allows; pure
- `adds`: the way of one add, and which of them run
- `process`: the fetch process as the server sees it; `messages`: what the two say to each other
- `main`: the fetch process; `origin`: what it knows of each source's module, and the errors that end a fetch
- `web`: its HTTPS client; `huggingface`, `oci` and `cloud`: its sources
- `unpack`: unpacks one archive, in a process without network
"""
