"""The ledger of several servers in PostgreSQL; each keeps a replica in SQLite, from which all is read.

The database has the events, their head and their base: it puts appends in order and makes them durable. Its
one way in is the function `append` (migrations/postgres), which the server's role may call; only the owner's
role, by command, may change the schema. See `docs/decisions/0054`.

- `connection`: an address, a connection with its limits, the database's clock, translated errors
- `schema`: migrations by the owner, and what a server checks before it uses a database
- `storage`: `Storage` for the writer: append in the database, then store in the replica
- `transfer`: events into an empty database, and out of one
"""
