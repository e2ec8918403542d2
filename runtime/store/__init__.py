"""The store: private, content-addressed copies of model versions, which workers load from.

A load enters `versions.Versions.version`. Known bytes are found in the store; others are copied from the
repository into an incoming folder (`store.Store.take`). The session may be created from there while
`HeldVersion.hash` hashes the copy; `settle` gives the folder its name, the digest of its contents, and
`make_durable` syncs it and writes its `manifest`.

To change: store or repository, threads, what is given back: `versions`. Copying, hashing, records and
identities of files, access rights: `folder`. Limits, sweeps and verification: `store`.
"""
