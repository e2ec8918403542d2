"""The store: our private, content-addressed copies of model versions, which workers load from.

The way of a version: a load enters `versions.Versions.version`. Known bytes are found in the store; others
are copied from the repository (`runtime.repository.VersionFolder`) into an incoming folder by
`store.Store.take`. A session may be created from there while `HeldVersion.hash` hashes the copy; `settle`
gives the folder its name, the digest of its contents, and other instances load from there; `make_durable`
syncs it and writes its `manifest`.

To change: whether a version comes from the store or from the repository, threads, and what is given back:
`versions`. How bytes are copied and hashed, what is recorded of a version, whether a file is still the one
that was hashed, names and access rights: `folder`. Limits, sweeps and verification: `store`.
"""
