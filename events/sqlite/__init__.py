"""The embedded storage: the ledger in one SQLite file, `<data>/ledger.db`.

One connection writes (`storage`), in a thread of its own: a group of events, the models and jobs that they
change, and a row for each change (`history`). All others read through `readonly`: pages of events and jobs
(`listing`), and the past (`timetravel`), in short transactions, so that the write-ahead log begins anew.

- `schema`: opening for writing, migrations, comparison of the schema
- `storage`: the writer's connection, checkpoints, rebuilding stored projections (`FOLDS`)
- `queries`: the SQL of events, models, jobs and idempotency keys
- `readonly`: the one way to open a ledger for reading; copies that lack their write-ahead log
- `listing`, `timetravel`: what the server reads, now and at a past moment
- `timeline`: models and servers over a range of time
- `datalock`: one process per data directory and file
- `history`: the rows of what each event changed
- `proof`, `projections`: what `events.audit` reads; comparison of the stored projections with a fold
"""
