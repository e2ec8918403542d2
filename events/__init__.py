"""The ledger: event types, the hash-chained log, projections, tails. Proof is in `audit`, SQL in `sqlite`.

The way of a command: `log` queues it, `accept` has it decide itself on `state`, `codec` writes the events as
canonical JSON and chains their hashes, `sqlite.storage` commits them in one transaction, and `tail` wakes the
readers.

- A new event or field: `types`, with `values` that several have, then the folds in `jobs`, `models`,
  `versions` and `tokens`, then `counters` and `eventtext`. What a model serves from: `serving`. Rows of the
  past: `history`, `presence`.
- Conditions and idempotency keys: `accept`. What the state allows and duplicates, for each command where it
  is: `jobcommands`, `versioncommands`, those about tokens in `registercommands`; their base: `commands`.
- The live state and its transactions: `state`; what concerns no model: `registers`; the queue of commands,
  groups of events, group commit and failures of writing: `log`.
- What servers sign: `statements`; names of devices: `devices`.
- Times, ids: `clock`; files, complete or absent: `files`; refusals: `errors`; the writer's needs: `storage`.

This package knows no HTTP and no ONNX, and imports neither `runtime` nor `server`.
"""
