"""The store: our private, content-addressed copies of model versions, which workers load from.

The way of a version: `store.Store.take` copies it from the repository (`runtime.repository.VersionFolder`)
into an incoming folder; a session may be created from there while `hash_copy` hashes the copy; `settle` gives
the folder its name, the digest of its contents, and `make_durable` syncs it and writes its `manifest`. Later
loads of the same bytes ask `find`; whether the repository still has them says `find_source`.

To change: whether a load takes a version from the store or from the repository: `contents`. How bytes are
copied: `copying`. What is recorded of a version, and whether a file is still the one that was hashed:
`manifest`. Folders, names and access rights: `folder`. Limits, sweeps and verification: `store`.

All functions block: call them in threads.
"""
