"""The ledger of several servers in PostgreSQL; each keeps a replica in SQLite, from which all is read.

The database has the events and their head: it puts appends in order and makes them durable. Its
one way in is the function `append` (migrations/postgres), which the server's role may call; only the owner's
role, by command, may change the schema. See `docs/decisions/0054`.

Where the database fails or refuses, functions raise `events.storage.StorageError`; nothing was changed then,
unless a docstring says otherwise.

- `connection`: an address, a connection with its limits, the database's clock, translated errors
- `schema`: migrations by the owner, and what a server checks before it uses a database
- `log`: the writer's log: catching up with other servers, deciding anew what they changed
- `storage`: `Storage` for the writer: append in the database, then store in the replica
- `admin`: what commands do with it: migrate, copy a stopped server's ledger into it, verify, discard
- `transfer`: a ledger into an empty database, and out of one
"""
