"""The store: our private, content-addressed copies of model versions, which workers load from.

The way of a version: `store.Store.take` copies it from the repository into an incoming folder (`sources`
reads the repository through one folder descriptor, `copying` copies and hashes); a session may be created
from there while `hash_copy` hashes the copy; `settle` gives the folder its name, the digest of its contents,
and `make_durable` syncs it and writes its `manifest`. Later loads of the same bytes ask `find`; whether the
repository still has them says `find_source`.

To change: which files may be read: `sources`. How bytes are copied: `copying`. What is recorded of a
version: `manifest`. Whether a file is still the one that was hashed: `identities`. Folders, names and access
rights: `folder`. Which version is swept, and limits: `bounds`. Checks of everything that is stored:
`verification`. Error codes: `problems`.

All functions block: call them in threads.
"""
