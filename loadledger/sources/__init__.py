"""Versions by name: resolved and downloaded on this machine, with this person's credentials, and then sent.

- `names`: a source's name; pure
- `fetch`: the way of one: what its name means now, the files that its version needs, and their download
- `origin`: the interface of a source's module
- `downloads`: resumable downloads, each a file in the folder of downloads
- `web`: files at URLs, and the HTTPS client; `oci`, `huggingface` and `cloud`: the other sources
- `unpack`: archives, which layers of a registry may be
- `folder`: a version written into a folder, in place of a server

The libraries of `huggingface` and `cloud` are extras.
"""
